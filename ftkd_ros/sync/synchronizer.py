# SPDX-License-Identifier: Apache-2.0
"""SurroundSynchronizer: a message_filters filter that outputs rounds of N cameras.

A matcher (`SurroundMatcher`, `AnchorMatcher` or `AutoMatcher`) contains the logic without ROS;
`SurroundSynchronizer` provides it with the API of message_filters. On nuScenes stamps,
ApproximateTimeSynchronizer mixes two rounds in up to 83 % of its sets, and it stops when one camera stops;
this filter does neither.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import message_filters

from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.sync.matcher import MatchedRound
from ftkd_ros.sync.matcher_interface import Matcher


class SurroundSynchronizer(message_filters.SimpleFilter):
    """Filter over N camera filters; its callbacks receive one `MatchedRound` of messages.

    Use it as the other synchronizers: `SurroundSynchronizer([Subscriber(...), ...], ...)`, then
    `registerCallback`. A timer (10 ms) must call `poll`, which releases incomplete rounds at their deadline.
    `now_ns` reads the clock of the deadline. All messages need a header. Exceptions of callbacks are counted
    and passed to `on_error`, because an exception in a subscription would stop the executor.
    """

    def __init__(
        self,
        filters: Sequence[Any],
        matcher: Matcher,
        *,
        now_ns: Callable[[], int],
        on_error: Callable[[Exception], None],
    ) -> None:
        super().__init__()
        if len(filters) != len(matcher.cameras):
            raise ValueError(
                f"{len(filters)} filters for {len(matcher.cameras)} cameras; expected one per camera"
            )
        self.matcher = matcher
        self._now_ns = now_ns
        self._on_error = on_error
        self.callback_errors = 0
        self._lock = threading.Lock()
        self.connectInput(filters)

    def connectInput(self, filters: Sequence[Any]) -> None:  # noqa: N802 (name of the message_filters API)
        """Register with the filters, in the order of the cameras."""
        self.input_connections = [
            camera_filter.registerCallback(self.add, index) for index, camera_filter in enumerate(filters)
        ]

    def add(self, message: Any, camera: int) -> None:
        """Add a message and signal the rounds that it completes."""
        with self._lock:
            rounds = self.matcher.add(camera, stamp_to_ns(message.header.stamp), message, self._now_ns())
        self._signal(rounds)

    def poll(self) -> None:
        """Signal the rounds whose deadline has passed."""
        with self._lock:
            rounds = self.matcher.poll(self._now_ns())
        self._signal(rounds)

    def clear(self) -> None:
        """Clear the queues, as after a jump of the clock."""
        with self._lock:
            self.matcher.clear()

    def _signal(self, rounds: Sequence[MatchedRound[Any]]) -> None:
        """Call the callbacks without holding the lock, so that they may call this filter."""
        for matched in rounds:
            try:
                self.signalMessage(matched)
            except Exception as error:
                self.callback_errors += 1
                self._on_error(error)
