# SPDX-License-Identifier: Apache-2.0
"""Simulation of camera stamps through the synchronizer: rounds found, mixed and partial, messages held.

    python -m benchmarks.sync --json FILE

A case is a rig of six cameras: rate, time offsets, jitter, transport delay, drops, clock drift, and cameras
that are absent, die or have a wrong clock. Each case runs through policy `auto` with its default parameters
(no time offsets given) and through the stock `ApproximateTimeSynchronizer`.

`complete_rounds`: rounds with an image of every camera that lives and has a usable clock; for rigs without a
trigger, images of the anchor with an image of each other camera within `max_camera_time_diff_s`.
`found`: those that came out with all these images. `mixed`: rounds with images of two triggers (without a
trigger: farther apart than allowed). `partial`: rounds without all cameras. `held_max`: largest number of
messages held at any time. `policy` is the policy that `auto` ends with.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import message_filters
import numpy as np
from numpy.typing import NDArray

from benchmarks.report import write_figures
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import make_header
from ftkd_ros.sync.anchor import AnchorMatcher
from ftkd_ros.sync.auto import AutoMatcher
from ftkd_ros.sync.matcher import MatchedRound
from ftkd_ros.sync.matcher_interface import Matcher
from ftkd_ros.sync.surround import SurroundMatcher

MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
START_NS: Final = 1_532_402_927 * SECOND
CAMERAS: Final = ("front", "front_right", "front_left", "back", "back_left", "back_right")
NUSCENES_MS: Final = (7.6, 15.5, 0.0, 32.7, 42.6, 23.0)
SLOP_NS: Final = 20 * MS
DEADLINE_NS: Final = 100 * MS
MAX_DIFFERENCE_NS: Final = 150 * MS
_POLL_NS: Final = 10 * MS


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rig and its faults. `rates_hz`: one for all cameras or one per camera; `nuscenes`: 50 and 100 ms."""

    name: str
    rates_hz: tuple[float, ...] = (12.0,)
    nuscenes: bool = False
    seconds: float = 60.0
    offsets_ms: tuple[float, ...] = (0.0,) * 6
    jitter_ms: float = 0.5
    delay_ms: float = 20.0
    drop: float = 0.0
    drift_ppm: tuple[float, ...] = (0.0,) * 6
    free_running: bool = False
    absent: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    clock_shift_s: dict[int, float] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()
    seed: int = 0

    @property
    def has_trigger(self) -> bool:
        return not self.free_running and len(set(self.rates_hz)) == 1

    @property
    def usable(self) -> frozenset[int]:
        """Cameras that send with a right clock."""
        return frozenset(range(6)) - {*self.absent, *self.clock_shift_s, *self.frozen}


class Image(NamedTuple):
    """One image: time of arrival, camera, stamp, number of its trigger."""

    now_ns: int
    camera: int
    stamp_ns: int
    trigger: int


def simulate(case: Case) -> list[Image]:
    """Return the images of a case in the order of their arrival."""
    random = np.random.default_rng(case.seed)
    images = []
    for camera in sorted(set(range(6)) - set(case.absent)):
        exposures = _exposures(case, camera, random)
        if camera in case.dies:
            exposures = exposures[: len(exposures) // 2]
        count = len(exposures)
        delays = random.uniform(0, case.delay_ms * MS, count).astype(np.int64)
        arrivals = np.maximum.accumulate(exposures + delays)  # transport keeps the order of a camera
        stamps = exposures + np.round((exposures - START_NS) * case.drift_ppm[camera] * 1e-6).astype(np.int64)
        stamps += round(case.clock_shift_s.get(camera, 0.0) * SECOND)
        if camera in case.frozen:
            stamps = np.full(count, stamps[0])
        kept = random.random(count) >= case.drop
        numbers = range(count)
        images += [
            Image(int(now), camera, int(stamp), number)
            for now, stamp, number, keep in zip(arrivals, stamps, numbers, kept, strict=True)
            if keep
        ]
    return sorted(images)


def _exposures(case: Case, camera: int, random: np.random.Generator) -> NDArray[np.int64]:
    rate = case.rates_hz[camera % len(case.rates_hz)]
    if case.nuscenes:
        periods = np.tile([50.0, 100.0], int(case.seconds * 20 / 3) + 1)
    else:
        periods = np.full(int(case.seconds * rate), 1e3 / rate)
    if case.free_running:  # its own oscillator and a phase that wanders
        periods = periods * (1 + random.uniform(-3e-3, 3e-3)) + random.normal(0, 1, len(periods))
    times = np.cumsum(periods) + case.offsets_ms[camera]
    if case.free_running:
        times += random.uniform(0, 1e3 / rate)
    times += random.uniform(-case.jitter_ms, case.jitter_ms, len(times))
    exposures: NDArray[np.int64] = START_NS + np.round(times * MS).astype(np.int64)
    return exposures


def make_auto() -> AutoMatcher[Image]:
    """Return the matcher of `sync_policy: auto` with the default parameters of the node."""
    surround: SurroundMatcher[Image] = SurroundMatcher(
        CAMERAS, slop_ns=SLOP_NS, deadline_ns=DEADLINE_NS, min_cameras=3, hold_misfit=True
    )
    anchor: AnchorMatcher[Image] = AnchorMatcher(
        CAMERAS, anchor=0, max_difference_ns=MAX_DIFFERENCE_NS, min_cameras=3
    )
    return AutoMatcher(surround, anchor)


def play(matcher: Matcher, images: Sequence[Image]) -> tuple[list[MatchedRound[Image]], int]:
    """Add images and poll every 10 ms as the node does. Return the rounds and the largest number held."""
    rounds: list[MatchedRound[Image]] = []
    clock = images[0].now_ns
    held = 0
    for image in images:
        while clock + _POLL_NS < image.now_ns:
            clock += _POLL_NS
            rounds += matcher.poll(clock)
        rounds += matcher.add(image.camera, image.stamp_ns, image, image.now_ns)
        held = max(held, matcher.held)
    return rounds + matcher.poll(clock + SECOND), held


def play_stock(images: Sequence[Image]) -> tuple[list[MatchedRound[Image]], int]:
    """Run the images through ApproximateTimeSynchronizer with a queue of 10 and a slop of 100 ms."""
    sources = [message_filters.SimpleFilter() for _ in CAMERAS]
    stock = message_filters.ApproximateTimeSynchronizer(sources, 10, 0.1)
    rounds: list[MatchedRound[Image]] = []

    def collect(*messages: Any) -> None:
        stamps = tuple(message.image.stamp_ns for message in messages)
        rounds.append(MatchedRound(messages=tuple(m.image for m in messages), stamps_ns=stamps))

    stock.registerCallback(collect)
    held = 0
    for image in images:
        header = make_header(RCLPY, image.stamp_ns, "")
        sources[image.camera].signalMessage(SimpleNamespace(header=header, image=image))
        held = max(held, sum(len(queue) for queue in stock.queues))
    return rounds, held


def score(case: Case, images: Sequence[Image], rounds: Sequence[MatchedRound[Image]]) -> dict[str, int]:
    """Return complete_rounds, found, mixed and partial."""
    wanted = _wanted_of_triggers(case, images) if case.has_trigger else _wanted_of_anchor(case, images)
    found: set[int] = set()
    mixed = 0
    for matched in rounds:
        members = [image for image in matched.messages if image is not None]
        usable = {image.camera for image in members} & case.usable
        if case.has_trigger:
            mixed += len({image.trigger for image in members}) > 1
            key = members[0].trigger
        else:
            anchor_ns = matched.stamps_ns[0]
            center = members[0].stamp_ns if anchor_ns is None else anchor_ns
            mixed += any(abs(image.stamp_ns - center) > MAX_DIFFERENCE_NS for image in members)
            key = -1 if anchor_ns is None else members[0].trigger
        if wanted.get(key, {-1}) <= usable:
            found.add(key)
    return {
        "complete_rounds": len(wanted),
        "found": len(found),
        "mixed": mixed,
        "partial": sum(not matched.is_complete for matched in rounds),
    }


def _wanted_of_triggers(case: Case, images: Sequence[Image]) -> dict[int, set[int]]:
    """Return the cameras of each trigger, if all living cameras have sent an image."""
    sent: dict[int, set[int]] = {}
    last = dict.fromkeys(range(6), -1)
    for image in images:
        if image.camera in case.usable:
            sent.setdefault(image.trigger, set()).add(image.camera)
            last[image.camera] = max(last[image.camera], image.trigger)
    return {
        trigger: cameras
        for trigger, cameras in sent.items()
        if cameras == {c for c in case.usable if c not in case.dies or trigger <= last[c]}
    }


def _wanted_of_anchor(case: Case, images: Sequence[Image]) -> dict[int, set[int]]:
    """Return the images of camera 0, if each usable camera has sent an image in time."""
    newest: dict[int, int] = {}
    wanted = {}
    for image in images:
        newest[image.camera] = image.stamp_ns
        near = {c for c, stamp in newest.items() if abs(stamp - image.stamp_ns) <= MAX_DIFFERENCE_NS}
        if image.camera == 0 and near >= case.usable:
            wanted[image.trigger] = set(case.usable)
    return wanted


def cases() -> list[Case]:
    """Return the rigs of the benchmark."""
    chain = tuple(index / 6 for index in range(6))
    found = []
    for rate in (2, 5, 10, 12, 20, 30, 60):
        period = 1e3 / rate
        jitter = min(0.5, 0.02 * period)
        offsets = tuple(0.5 * period * share for share in chain)
        wide = tuple(0.6 * period * share for share in chain)
        shared: dict[str, Any] = {"rates_hz": (float(rate),), "jitter_ms": jitter}
        shared["delay_ms"] = min(20.0, 0.5 * period)
        found += [
            Case(name=f"{rate} Hz, equal stamps", **shared),
            Case(name=f"{rate} Hz, offsets", offsets_ms=offsets, **shared),
            Case(name=f"{rate} Hz, offsets up to half a period", offsets_ms=wide, **shared),
            Case(name=f"{rate} Hz, offsets, 5 % dropped", offsets_ms=offsets, drop=0.05, **shared),
            Case(name=f"{rate} Hz, one camera absent", offsets_ms=offsets, absent=(3,), **shared),
            Case(name=f"{rate} Hz, one camera dies", offsets_ms=offsets, dies=(4,), **shared),
        ]
    found += [
        Case(name=f"nuScenes rhythm, {drop:.0%} dropped", nuscenes=True, offsets_ms=NUSCENES_MS, drop=drop)
        for drop in (0.0, 0.02, 0.05)
    ]
    drift = (0.0, 50.0, -50.0, 25.0, -10.0, 5.0)
    found += [
        Case(name="10 Hz, drift of 50 ppm for 3 h", rates_hz=(10.0,), drift_ppm=drift, seconds=10_800.0),
        Case(name="12 Hz, jitter of 5 ms", jitter_ms=5.0),
        Case(name="12 Hz, one clock +1 h", clock_shift_s={2: 3600.0}),
        Case(name="12 Hz, one clock -2 s", clock_shift_s={2: -2.0}),
        Case(name="12 Hz, one stamp frozen", frozen=(2,)),
        Case(name="10, 20 and 30 Hz", rates_hz=(10.0, 20.0, 30.0, 10.0, 20.0, 30.0)),
        Case(name="10 Hz, no trigger", rates_hz=(10.0,), free_running=True),
        Case(name="30 Hz, no trigger", rates_hz=(30.0,), free_running=True),
    ]
    return found


def run(selected: Sequence[Case]) -> list[dict[str, Any]]:
    """Return one row per case and policy."""
    rows = []
    for case in selected:
        images = simulate(case)
        auto = make_auto()
        rounds, held = play(auto, images)
        rows.append(_row(case, auto.policy, score(case, images, rounds), held))
        if case.seconds <= 600:  # the stock filter needs minutes for hours of images
            rounds, held = play_stock(images)
            rows.append(_row(case, "approximate", score(case, images, rounds), held))
    return rows


def _row(case: Case, policy: str, figures: dict[str, int], held: int) -> dict[str, Any]:
    return {"case": case.name, "policy": policy, **figures, "held_max": held}


def main(arguments: Sequence[str] | None = None, chosen: Callable[[], list[Case]] = cases) -> int:
    """Print a table and write the JSON file. Returns 1 if a round was lost or mixed by our policies."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    rows = run(chosen())
    print(f"{'case':36} {'policy':12} {'complete':>8} {'found':>6} {'mixed':>6} {'partial':>7} {'held':>5}")
    for row in rows:
        print(
            f"{row['case']:36} {row['policy']:12} {row['complete_rounds']:8} {row['found']:6} "
            f"{row['mixed']:6} {row['partial']:7} {row['held_max']:5}"
        )
    if options.json is not None:
        write_figures(options.json, rows)
    ours = [row for row in rows if row["policy"] != "approximate"]
    return int(any(row["mixed"] or row["found"] < row["complete_rounds"] for row in ours))


if __name__ == "__main__":
    sys.exit(main())
