# SPDX-License-Identifier: Apache-2.0
"""Bags on disk, without ROS: reading any rosbag2, writing MCAP that `ros2 bag play` and Foxglove open.

A bag is a folder with metadata.yaml and one .mcap file. Log times are int nanoseconds.
"""

import errno
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from uuid import uuid4

from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import ReaderError, StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import McapWriter
from rosbags.serde import SerdeError

from ftkd_core.errors import UserError
from ftkd_ros.bag.message_definitions import ensure_known, message_types

_FOREVER: Final = QosTime(9223372036, 854775807)
# Humble, Jazzy and Kilted all read metadata of this version; Humble cannot read the next one.
_METADATA_VERSION: Final = 8
_RECOVERY: Final = "`mcap recover` saves what the file holds, then `ros2 bag reindex` the folder"
_READ_ERRORS: Final = (
    AnyReaderError,
    ReaderError,
    SerdeError,
    OSError,
    AssertionError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    MemoryError,
    struct.error,
)


def qos(*, depth: int = 10, latched: bool = False, reliable: bool = True) -> Qos:
    """Offered quality of service for a bag's metadata; latched is what ROS calls transient local."""
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=depth,
        reliability=QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=_FOREVER,
        lifespan=_FOREVER,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_FOREVER,
        avoid_ros_namespace_conventions=False,
    )


def offered_qos(connection: Connection) -> Sequence[Qos]:
    """What the publishers of a recorded topic offered; empty where the bag does not say."""
    ext = connection.ext
    return ext.offered_qos_profiles if isinstance(ext, ConnectionExtRosbag2) else ()


def is_latched(connection: Connection) -> bool:
    """Whether late subscribers shall get the last messages of a recorded topic."""
    profiles = offered_qos(connection)
    if profiles:
        return any(profile.durability is QosDurability.TRANSIENT_LOCAL for profile in profiles)
    return connection.topic == "/tf_static"


class BagReader:
    """A bag open for reading; errors name the bag and, for a missing topic, the topics it has.

    Context manager. Raises UserError for a bag that does not exist, is no bag, is damaged or cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _check_is_bag(self.path)
        try:
            self._reader = AnyReader([self.path], default_typestore=message_types())
            self._reader.open()
        except _READ_ERRORS as error:
            raise UserError(
                f"bag {str(self.path)!r} cannot be read ({_reason(error)}); it is damaged or its "
                f"recording was cut off: {_RECOVERY}"
            ) from error

    def __enter__(self) -> "BagReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        self._reader.close()

    @property
    def connections(self) -> list[Connection]:
        """The recorded topics with type, definition, count and quality of service."""
        return self._reader.connections

    @property
    def topics(self) -> dict[str, str]:
        """Message type by topic."""
        return {connection.topic: connection.msgtype for connection in self.connections}

    @property
    def message_count(self) -> int:
        """Messages in the bag."""
        return self._reader.message_count

    @property
    def start_ns(self) -> int:
        """Log time of the first message."""
        return self._reader.start_time

    @property
    def end_ns(self) -> int:
        """Log time of the last message."""
        return self._reader.end_time - 1

    def raw(
        self, topics: Sequence[str] | None = None, *, optional: bool = False
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """(connection, log time, serialized message) of the topics, None for all, in log order.

        Raises UserError for a topic that is missing, unless `optional`, and where the bag breaks off.
        """
        names = self.topics
        missing = [] if topics is None or optional else [topic for topic in topics if topic not in names]
        if missing:
            raise UserError(
                f"bag {str(self.path)!r} has no topic {missing[0]}; "
                f"it has {', '.join(sorted(names)) or 'none'}"
            )
        wanted = [
            connection for connection in self.connections if topics is None or connection.topic in topics
        ]
        if not wanted:
            return
        try:
            yield from self._reader.messages(connections=wanted)
        except _READ_ERRORS as error:
            raise UserError(
                f"bag {str(self.path)!r} breaks off while reading ({_reason(error)}); copy it again"
            ) from error

    def messages(self, topics: Sequence[str], *, optional: bool = False) -> Iterator[tuple[str, int, Any]]:
        """(topic, log time, message) of the topics in log order; as `raw`."""
        for connection, log_time_ns, content in self.raw(topics, optional=optional):
            yield connection.topic, log_time_ns, self.deserialize(connection, content)

    def deserialize(self, connection: Connection, content: bytes) -> Any:
        """The message. Raises UserError for one that does not follow its own definition."""
        try:
            return self._reader.deserialize(content, connection.msgtype)
        except _READ_ERRORS as error:
            raise UserError(
                f"bag {str(self.path)!r}: a message of {connection.topic} is no valid {connection.msgtype} "
                f"({_reason(error)})"
            ) from error


class BagWriter:
    """A new MCAP bag: chunks of 1 MiB, neither compressed nor summed (JPEGs gain nothing), definitions and
    quality of service inside.

    Context manager. With `whole` (the default) the bag appears under its name when it is complete and not at
    all after an error; otherwise it grows in place, which is what a recorder wants. Raises UserError for an
    output that exists, whose folder cannot be made, and for a full disk.
    """

    def __init__(
        self, output: str | Path, *, whole: bool = True, notes: Mapping[str, str] | None = None
    ) -> None:
        self.output = Path(output)
        self.counts: Counter[str] = Counter()
        self._connections: dict[str, Connection] = {}
        check_new(self.output)
        # In the same folder, so that the finished bag is moved by a rename.
        self._workshop = self.output.with_name(f".{self.output.name}-{uuid4().hex[:8]}") if whole else None
        place = self._workshop / self.output.name if self._workshop else self.output
        self._writer = Writer(place, version=_METADATA_VERSION, storage_plugin=StoragePlugin.MCAP)
        for key, value in (notes or {}).items():
            self._writer.set_custom_data(key, value)
        try:
            self._writer.open()
        except OSError as error:
            self.abandon()
            raise UserError(
                f"bag {str(self.output)!r} cannot be made ({error.strerror}); give another folder"
            ) from error

    def __enter__(self) -> "BagWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def add_topic(
        self, topic: str, msgtype: str, *, depth: int = 10, latched: bool = False, reliable: bool = True
    ) -> None:
        """Announce a topic. Raises UserError for a type that has no definition."""
        ensure_known(msgtype)
        profile = qos(depth=depth, latched=latched, reliable=reliable)
        self._connections[topic] = self._writer.add_connection(
            topic, msgtype, typestore=message_types(), offered_qos_profiles=[profile]
        )

    def write(self, topic: str, log_time_ns: int, message: Any) -> None:
        """Serialize and append a message built from `message_types()`."""
        content = message_types().serialize_cdr(message, self._connections[topic].msgtype)
        self.write_raw(topic, log_time_ns, content)

    def write_raw(self, topic: str, log_time_ns: int, content: bytes | memoryview) -> None:
        """Append a serialized message. Raises UserError when the disk is full."""
        try:
            self._writer.write(self._connections[topic], log_time_ns, content)
        except OSError as error:
            raise self._disk_error(error) from error
        self.counts[topic] += 1

    def flush(self) -> None:
        """Bring what was written so far to disk as a complete chunk, so that a killed process loses no more
        than what comes after."""
        storage = self._writer.storage
        if not isinstance(storage, McapWriter) or not storage.chunk.bio.tell():
            return
        try:
            storage.close_chunk()
            storage.bio.flush()
        except OSError as error:
            raise self._disk_error(error) from error

    def close(self) -> None:
        """Finish the bag: index, metadata.yaml, its final name. Raises UserError when the disk is full."""
        try:
            self._writer.close()
            if self._workshop is not None:
                check_new(self.output)
                (self._workshop / self.output.name).rename(self.output)
                self._workshop.rmdir()
        except OSError as error:
            self.abandon()
            raise self._disk_error(error) from error
        except UserError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Stop without finishing: a whole bag leaves nothing behind, one in place keeps its complete
        chunks."""
        with suppress(OSError):  # a full disk does not take what is still buffered
            self._writer.abort()
        if self._workshop is not None:
            shutil.rmtree(self._workshop, ignore_errors=True)

    def _disk_error(self, error: OSError) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else str(error.strerror)
        return UserError(
            f"bag {str(self.output)!r} cannot be written further: {reason}; make room or give another folder"
        )


def check_new(output: Path) -> None:
    """Raises UserError where the output exists: nothing is ever overwritten."""
    if output.exists() or output.is_symlink():
        raise UserError(f"output {str(output)!r} exists already; remove it or give another folder")


def _check_is_bag(path: Path) -> None:
    if not path.exists():
        raise UserError(f"bag {str(path)!r} does not exist; give the folder that holds metadata.yaml")
    if path.is_dir() and not (path / "metadata.yaml").is_file():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".mcap", ".db3"))
        hint = (
            f"it holds {', '.join(files[:3])}, so its recording was cut off: {_RECOVERY}"
            if files
            else "give the folder that holds it"
        )
        raise UserError(f"bag {str(path)!r} has no metadata.yaml; {hint}")


def _reason(error: BaseException) -> str:
    """The first line of an error, which may be empty for an assertion."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
