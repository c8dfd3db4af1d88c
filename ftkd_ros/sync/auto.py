# SPDX-License-Identifier: Apache-2.0
"""AutoMatcher: chooses between the policies `surround` and `anchor` from the stamps.

Pure logic without ROS and without a clock: every call gets the time.
"""

from collections import Counter
from typing import Generic, TypeVar

from ftkd_ros.sync.anchor import AnchorMatcher
from ftkd_ros.sync.matcher import MatchedRound
from ftkd_ros.sync.surround import SurroundMatcher

M = TypeVar("M")


class AutoMatcher(Generic[M]):
    """Matches with `surround` while the cameras have one rate and constant time offsets, else with `anchor`.

    The choice is made within 0.9 s of the first image. It changes from surround to anchor, never back, when
    cameras turn out to have different rates or wandering phases. `surround` must be made with
    `hold_misfit=True`.
    """

    def __init__(self, surround: SurroundMatcher[M], anchor: AnchorMatcher[M]) -> None:
        self.cameras = surround.cameras
        self._surround = surround
        self._anchor = anchor
        self._matcher: SurroundMatcher[M] | AnchorMatcher[M] = surround
        self._chosen = False
        self._released_ns: int | None = None  # anchor image of the last round of `surround`
        self._events: list[str] = []

    @property
    def policy(self) -> str:
        """The policy in use: surround or anchor."""
        return self._matcher.policy

    @property
    def counts(self) -> Counter[str]:
        """Sum of the counters of both policies."""
        return self._surround.counts + self._anchor.counts

    @property
    def received(self) -> Counter[str]:
        """Number of images per camera."""
        return self._surround.received + self._anchor.received

    @property
    def offsets_ns(self) -> tuple[int | None, ...]:
        """Time offset of each camera; None if unknown, and with policy anchor."""
        return self._matcher.offsets_ns

    @property
    def held(self) -> int:
        """Number of messages that are held back."""
        return self._matcher.held

    def clear(self) -> None:
        """Clear the queues, as after a jump of the clock; the choice is kept."""
        self._matcher.clear()

    def add(self, camera: int, stamp_ns: int, message: M, now_ns: int) -> list[MatchedRound[M]]:
        """Add a message of camera index `camera`, exposed at `stamp_ns` and received at `now_ns`."""
        if self._matcher is self._surround and self._surround.is_started and stamp_ns > 0:
            self._anchor.prepare(camera, stamp_ns, message, now_ns)
        return self._judge(self._matcher.add(camera, stamp_ns, message, now_ns))

    def poll(self, now_ns: int) -> list[MatchedRound[M]]:
        """Return incomplete rounds whose deadline has passed."""
        return self._judge(self._matcher.poll(now_ns))

    def take_events(self) -> list[str]:
        """Return sentences about decisions and clear them; the node logs them."""
        events, self._events = self._events + self._matcher.take_events(), []
        return events

    def fault(self, camera: int) -> str | None:
        """Return why the images of a camera are in no round; None if they are or if it sends nothing."""
        return self._matcher.fault(camera)

    def warnings(self) -> list[str]:
        """Return warnings of the policy in use."""
        return self._matcher.warnings()

    def _judge(self, rounds: list[MatchedRound[M]]) -> list[MatchedRound[M]]:
        if self._matcher is not self._surround:
            return rounds
        for matched in rounds:
            stamp_ns = matched.stamps_ns[self._anchor.anchor]
            self._released_ns = self._released_ns if stamp_ns is None else stamp_ns
        if self._surround.misfit is not None:
            return rounds + self._change_to_anchor(self._surround.misfit)
        if self._surround.is_started and not self._chosen:
            self._chosen = True
            self._events.append(
                "sync_policy auto: surround, because the cameras have one rate and constant time offsets"
            )
        return rounds

    def _change_to_anchor(self, reason: str) -> list[MatchedRound[M]]:
        self._events += [
            *self._surround.take_events(),
            f"sync_policy auto: anchor at the images of {self._anchor.acting_anchor}, because {reason}",
        ]
        self._matcher = self._anchor
        rounds: list[MatchedRound[M]] = []
        for camera, stamp_ns, message, arrival_ns in self._surround.take_held():
            self._anchor.received[self.cameras[camera]] -= 1  # the surround matcher has counted it
            rounds += self._anchor.add(camera, stamp_ns, message, arrival_ns)
        return rounds + self._anchor.take_over(self._released_ns) if self._chosen else rounds
