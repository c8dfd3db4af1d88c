# SPDX-License-Identifier: Apache-2.0
"""AnchorMatcher: rounds at the images of one camera, for cameras of different rates or without a trigger.

Pure logic without ROS and without a clock: every call gets the time.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

from ftkd_ros.sync.clock_check import ClockCheck
from ftkd_ros.sync.matcher import JUMP_NS, MatchedRound

M = TypeVar("M")

_FAIL_OVER_NS: Final = 800_000_000
"""Without an image of the anchor for this long, another camera takes its place."""


class AnchorMatcher(Generic[M]):
    """Releases a round at each image of the anchor, with the newest image of each other camera.

    An image is used if its stamp is within `max_difference_ns` of the anchor's; it may be in several rounds
    if the anchor is faster. One image per camera is held. If the anchor stops or its clock is wrong, the next
    camera that sends takes its place until the anchor returns.
    """

    def __init__(
        self, cameras: Sequence[str], *, anchor: int, max_difference_ns: int, min_cameras: int = 1
    ) -> None:
        if not 0 <= anchor < len(cameras):
            raise ValueError(f"anchor {anchor} of {len(cameras)} cameras; expected 0 to {len(cameras) - 1}")
        if max_difference_ns <= 0:
            raise ValueError(f"maximum time difference {max_difference_ns} ns; expected a number above 0")
        self.cameras = tuple(cameras)
        self.anchor = anchor
        self._acting = anchor
        self._max_difference_ns = max_difference_ns
        self._min_cameras = min_cameras
        self._newest: list[tuple[int, M] | None] = [None] * len(self.cameras)
        self._arrival_ns: list[int | None] = [None] * len(self.cameras)
        self._started_ns: int | None = None
        self._clocks = ClockCheck(len(self.cameras))
        self._last_ns: int | None = None
        self._after_jump = False
        self._events: list[str] = []
        self.counts: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    @property
    def policy(self) -> str:
        return "anchor"

    @property
    def acting_anchor(self) -> str:
        """Name of the camera at whose images rounds are released."""
        return self.cameras[self._acting]

    @property
    def offsets_ns(self) -> tuple[int | None, ...]:
        """None for each camera: this policy has no time offsets."""
        return (None,) * len(self.cameras)

    @property
    def held(self) -> int:
        """Number of held messages, at most one per camera."""
        return sum(newest is not None for newest in self._newest)

    def clear(self) -> None:
        """Clear all images, as after a jump of the clock."""
        self._newest = [None] * len(self.cameras)
        self._arrival_ns = [None] * len(self.cameras)
        self._clocks.clear()
        self._started_ns = self._last_ns = None
        self._acting = self.anchor

    def add(self, camera: int, stamp_ns: int, message: M, now_ns: int) -> list[MatchedRound[M]]:
        """Add a message of camera index `camera`. Returns the round that it releases, if any."""
        self.received[self.cameras[camera]] += 1
        if self._started_ns is None or now_ns < self._started_ns:
            self._started_ns = now_ns
        unusable = self._clocks.add(camera, stamp_ns, now_ns)
        if unusable is not None:
            self.counts[unusable] += 1
            return []
        newest = self._newest[camera]
        if newest is not None and newest[0] - JUMP_NS <= stamp_ns <= newest[0]:
            self.counts["late"] += 1
            return []
        self._newest[camera] = (stamp_ns, message)
        self._arrival_ns[camera] = now_ns
        self._choose_anchor(camera, now_ns)
        return self._release(stamp_ns) if camera == self._acting else []

    def prepare(self, camera: int, stamp_ns: int, message: M, now_ns: int) -> None:
        """Hold a message without a release, while another policy is in use."""
        newest = self._newest[camera]
        if newest is None or not newest[0] - JUMP_NS <= stamp_ns <= newest[0]:
            self._newest[camera] = (stamp_ns, message)
        self._arrival_ns[camera] = now_ns
        self._started_ns = now_ns if self._started_ns is None else min(self._started_ns, now_ns)

    def take_over(self, released_ns: int | None) -> list[MatchedRound[M]]:
        """Continue after another policy, whose last round has an anchor image of stamp `released_ns`."""
        self._last_ns = released_ns
        newest = self._newest[self._acting]
        return (
            []
            if newest is None or released_ns is None or newest[0] <= released_ns
            else self._release(newest[0])
        )

    def poll(self, now_ns: int) -> list[MatchedRound[M]]:
        """Return no round: rounds are released by images only."""
        return []

    def take_events(self) -> list[str]:
        """Return sentences about changes of the anchor and clear them; the node logs them."""
        events, self._events = self._events, []
        return events

    def fault(self, camera: int) -> str | None:
        """Return why the images of a camera are in no round; None if they are or if it sends nothing."""
        return self._clocks.fault(camera)

    def warnings(self) -> list[str]:
        """Return warnings about clocks and about a lost anchor."""
        found = [
            f"{name}: {fault}; the camera is left out"
            for camera, name in enumerate(self.cameras)
            if (fault := self._clocks.fault(camera)) is not None
        ]
        if self._acting != self.anchor:
            found.append(
                f"anchor camera {self.cameras[self.anchor]} sends no usable image; "
                f"{self.acting_anchor} takes its place"
            )
        return found

    def _choose_anchor(self, camera: int, now_ns: int) -> None:
        if self._acting != self.anchor and camera == self.anchor:
            self._set_acting(camera, "is back")
            return
        assert self._started_ns is not None
        last = self._arrival_ns[self._acting]
        if camera != self._acting and now_ns - (self._started_ns if last is None else last) > _FAIL_OVER_NS:
            self._set_acting(camera, f"takes the place of {self.acting_anchor}, which sends no usable image")

    def _set_acting(self, camera: int, reason: str) -> None:
        self._acting = camera
        self._events.append(f"anchor camera: {self.cameras[camera]} {reason}")

    def _release(self, anchor_ns: int) -> list[MatchedRound[M]]:
        if self._last_ns is not None and anchor_ns <= self._last_ns:
            if anchor_ns >= self._last_ns - JUMP_NS:
                self.counts["late"] += 1
                return []
            self.counts["backward_jump"] += 1
            self._after_jump = True
        near = [
            newest if newest is not None and abs(newest[0] - anchor_ns) <= self._max_difference_ns else None
            for newest in self._newest
        ]
        self._last_ns = anchor_ns
        if sum(image is not None for image in near) < self._min_cameras:
            self.counts["too_few_cameras"] += 1
            return []
        matched = MatchedRound(
            messages=tuple(None if image is None else image[1] for image in near),
            stamps_ns=tuple(None if image is None else image[0] for image in near),
            after_jump=self._after_jump,
            anchor_ns=anchor_ns,
        )
        self._after_jump = False
        self.counts["complete" if matched.is_complete else "partial"] += 1
        return [matched]
