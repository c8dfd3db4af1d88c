# SPDX-License-Identifier: Apache-2.0
"""Images of a bag -> rounds, by the synchronization policies of the detector node.

Rounds are planned from stamps only, before any image is read. A round has the index of each image.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from ftkd_core.errors import UserError
from ftkd_ros.node.matchers import make_matcher
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.sync.matcher import MatchedRound, RoundMatcher
from ftkd_ros.sync.surround import SLOP_OF_PERIOD
from ftkd_ros.sync.time_offsets import MIN_STAMPS, estimate_offsets_ns, shortest_period_ns

_NO_DEADLINE_NS: Final = 1 << 61
_JITTER: Final = 1.1  # jitter shortens the measured period by up to 10 %
_NO_OFFSET: Final = "its stamps have no constant offset to those of the other cameras"

Round = MatchedRound[int]


class ImageStamp(NamedTuple):
    """An image of a bag: index of its camera, header stamp, log time."""

    camera: int
    stamp_ns: int
    log_ns: int


@dataclass
class RoundPlan:
    """Rounds of a bag in order. policy: the one in use; offsets_ns: time offset per camera, None if it has
    none; faults: images that are in no round because of their camera, by reason."""

    rounds: list[Round]
    policy: str
    offsets_ns: tuple[int | None, ...]
    faults: Counter[str] = field(default_factory=Counter)


def plan_rounds(
    images: Sequence[ImageStamp],
    parameters: DetectorParameters,
    topics: Sequence[str],
    offsets_ns: Sequence[int | None] | None = None,
) -> RoundPlan:
    """Group the images of a bag into rounds.

    The node must release a round soon after its exposures; a bag needs no deadline, and the time offsets of
    `surround` are estimated from all stamps. `auto` and `anchor` decide as the node, with log times as times
    of arrival. If the node's own matcher places more images than offsets from all stamps (clocks that drift),
    its rounds are used.
    """
    if parameters.sync_policy in ("exact", "approximate"):
        return _plan_stock(images, parameters)
    if parameters.sync_policy == "anchor":
        return _plan_live(images, parameters)
    live = _plan_live(images, parameters)
    if live.policy == "anchor":
        return live
    whole = _plan_surround(images, parameters, topics, offsets_ns)
    return live if _placed(live.rounds) > _placed(whole.rounds) else whole


def _placed(rounds: Sequence[Round]) -> int:
    """Return the number of images in complete rounds, then in all rounds, as one number to compare."""
    complete = sum(len(matched.stamps_ns) for matched in rounds if matched.is_complete)
    return complete * 1_000_000 + sum(stamp is not None for r in rounds for stamp in r.stamps_ns)


def _plan_live(images: Sequence[ImageStamp], parameters: DetectorParameters) -> RoundPlan:
    """Return the rounds of the node's matcher for images that arrive at their log times."""
    matcher = make_matcher(parameters)
    rounds: list[Round] = []
    last_ns = 0
    for index, image in enumerate(images):
        last_ns = max(last_ns, image.log_ns)
        rounds += matcher.add(image.camera, image.stamp_ns, index, image.log_ns)
    rounds += matcher.poll(last_ns + _NO_DEADLINE_NS)
    faults: Counter[str] = Counter()
    counts = Counter(image.camera for image in images)
    for camera, name in enumerate(matcher.cameras):
        if (fault := matcher.fault(camera)) is not None:
            faults[f"{name}: {fault}"] = counts[camera]
    return RoundPlan(rounds, matcher.policy, matcher.offsets_ns, faults)


def _plan_surround(
    images: Sequence[ImageStamp],
    parameters: DetectorParameters,
    topics: Sequence[str],
    given_ns: Sequence[int | None] | None,
) -> RoundPlan:
    """Match with time offsets from all stamps (or given ones), without a deadline."""
    stamps: list[list[int]] = [[] for _ in parameters.cameras]
    for image in images:
        stamps[image.camera].append(image.stamp_ns)
    offsets = list(given_ns) if given_ns is not None else _offsets(stamps, parameters)
    matcher: RoundMatcher[int] = RoundMatcher(
        num_cameras=len(parameters.cameras),
        slop_ns=_slop_ns(stamps, parameters),
        deadline_ns=_NO_DEADLINE_NS,
        min_cameras=parameters.min_round_cameras,
    )
    faults: Counter[str] = Counter()
    rounds: list[Round] = []
    for index, image in enumerate(images):
        offset_ns = offsets[image.camera]
        if offset_ns is None:
            faults[f"{topics[image.camera]}: {_NO_OFFSET}"] += 1
        else:
            rounds += matcher.add(image.camera, image.stamp_ns, index, 0, offset_ns)
    rounds += matcher.poll(_NO_DEADLINE_NS)
    return RoundPlan(rounds, "surround", tuple(offsets), faults)


def _offsets(stamps: Sequence[Sequence[int]], parameters: DetectorParameters) -> list[int | None]:
    """Return the offsets of the parameters, or estimates; from the first stamps if a camera has few."""
    if parameters.camera_time_offsets_s:
        return [round(offset * 1e9) for offset in parameters.camera_time_offsets_s]
    present = [own for own in stamps if own]
    if not present or min(len(own) for own in present) >= MIN_STAMPS:
        return estimate_offsets_ns(stamps) if present else [None] * len(stamps)
    first = min(own[0] for own in present)
    return [own[0] - first if own else None for own in stamps]


def _slop_ns(stamps: Sequence[Sequence[int]], parameters: DetectorParameters) -> int:
    """Return the slop of the parameters, limited as in the node to 0.4 of the shortest period."""
    wanted = round(parameters.sync_slop_s * 1e9)
    periods = [period for own in stamps if (period := shortest_period_ns(own)) is not None]
    return min(wanted, round(_JITTER * SLOP_OF_PERIOD * min(periods))) if periods else wanted


class _Header(NamedTuple):
    stamp: Any


class _Message(NamedTuple):
    """What message_filters reads of a message, with the index of the image."""

    header: _Header
    image: int


def _plan_stock(images: Sequence[ImageStamp], parameters: DetectorParameters) -> RoundPlan:
    """Return the rounds of the filters of message_filters. Raises UserError if it is not installed."""
    try:
        import message_filters
        from builtin_interfaces.msg import Time
    except ModuleNotFoundError as error:
        raise UserError(
            f"sync_policy {parameters.sync_policy!r} is a filter of message_filters, which is not installed; "
            "source a ROS 2 distribution, or use auto, surround or anchor"
        ) from error
    inputs = [message_filters.SimpleFilter() for _ in parameters.cameras]
    synchronizer = (
        message_filters.TimeSynchronizer(inputs, parameters.queue_depth)
        if parameters.sync_policy == "exact"
        else message_filters.ApproximateTimeSynchronizer(
            inputs, parameters.queue_depth, parameters.sync_slop_s
        )
    )
    rounds: list[Round] = []

    def add(*messages: Any) -> None:
        stamps = tuple(images[message.image].stamp_ns for message in messages)
        indices = tuple(message.image for message in messages)
        rounds.append(MatchedRound(messages=indices, stamps_ns=stamps))

    synchronizer.registerCallback(add)
    for index, image in enumerate(images):
        seconds, nanoseconds = divmod(image.stamp_ns, 1_000_000_000)
        stamp = Time(sec=seconds, nanosec=nanoseconds)
        inputs[image.camera].signalMessage(_Message(_Header(stamp), index))
    return RoundPlan(rounds, parameters.sync_policy, (None,) * len(parameters.cameras))


def select_rounds(
    rounds: Sequence[Round], stamps_ns: Sequence[int], start_s: float, duration_s: float | None, every: int
) -> list[Round]:
    """Return every n-th round from `start_s` seconds after the first one, for `duration_s` seconds.

    stamps_ns: time of each round. Raises UserError for arguments out of range and if no round is left.
    """
    if start_s < 0 or (duration_s is not None and duration_s <= 0) or every < 1:
        raise UserError(
            f"start {start_s:g} s, duration {'all' if duration_s is None else f'{duration_s:g} s'}, every "
            f"{every}; expected start >= 0, duration > 0 and every >= 1"
        )
    if not rounds or (start_s == 0 and duration_s is None and every == 1):
        return list(rounds)
    first_ns = stamps_ns[0]
    begin_ns = first_ns + round(start_s * 1e9)
    end_ns = None if duration_s is None else begin_ns + round(duration_s * 1e9)
    chosen: list[Round] = []
    jumped = False
    wanted = (
        (matched, begin_ns <= stamp_ns and (end_ns is None or stamp_ns < end_ns))
        for matched, stamp_ns in zip(rounds, stamps_ns, strict=True)
    )
    inside = 0
    for matched, is_inside in wanted:
        jumped = jumped or matched.after_jump
        if not is_inside:
            continue
        if inside % every == 0:
            chosen.append(replace(matched, after_jump=jumped and bool(chosen)))
            jumped = False
        inside += 1
    if not chosen:
        last_s = (max(stamps_ns) - first_ns) * 1e-9
        raise UserError(
            f"no round from {start_s:g} s on; the bag has {len(rounds)} rounds over {last_s:.1f} s"
        )
    return chosen


def iterate_with_contents(
    rounds: Sequence[Round], contents: Iterator[tuple[int, Any]]
) -> Iterator[MatchedRound[Any]]:
    """Yield rounds with the contents of their images, of which few are in memory at a time.

    contents: (index of the image, content) in the order of the bag.
    """
    last_use = {
        index: number
        for number, matched in enumerate(rounds)
        for index in matched.messages
        if index is not None
    }
    held: dict[int, Any] = {}
    newest = -1
    for number, matched in enumerate(rounds):
        needed = max(index for index in matched.messages if index is not None)
        while newest < needed:
            newest, content = next(contents)
            if newest in last_use:
                held[newest] = content
        messages = tuple(None if index is None else held[index] for index in matched.messages)
        yield replace(matched, messages=messages)
        for index in [index for index in held if last_use[index] <= number]:
            del held[index]
