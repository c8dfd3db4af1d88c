# SPDX-License-Identifier: Apache-2.0
"""Interface of the matchers, which group images into rounds."""

from collections import Counter
from typing import Any, Protocol

from ftkd_ros.sync.matcher import MatchedRound


class Matcher(Protocol):
    """Common interface of the matchers."""

    cameras: tuple[str, ...]

    @property
    def policy(self) -> str: ...

    @property
    def counts(self) -> Counter[str]: ...

    @property
    def offsets_ns(self) -> tuple[int | None, ...]: ...

    @property
    def held(self) -> int: ...

    def clear(self) -> None: ...

    def add(self, camera: int, stamp_ns: int, message: Any, now_ns: int) -> list[MatchedRound[Any]]: ...

    def poll(self, now_ns: int) -> list[MatchedRound[Any]]: ...

    def take_events(self) -> list[str]: ...

    def fault(self, camera: int) -> str | None: ...

    def warnings(self) -> list[str]: ...
