# SPDX-License-Identifier: Apache-2.0
"""Bags on disk, without ROS: read any rosbag2 bag, write MCAP bags for `ros2 bag play` and Foxglove.

A written bag is a folder with metadata.yaml and one .mcap file. Log times are int nanoseconds.
"""

import errno
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import apsw
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
from rosbags.typesys import TypesysError
from rosbags.typesys.store import Typestore

from ftkd_core.errors import UserError
from ftkd_core.unfinished import UnfinishedFolder
from ftkd_ros.bag.bag_files import BagFiles, storage_files
from ftkd_ros.bag.bag_types import store_of
from ftkd_ros.bag.message_definitions import ensure_known, message_types

_FOREVER: Final = QosTime(9223372036, 854775807)
# Newest metadata version that Humble, Jazzy and Kilted can read.
_METADATA_VERSION: Final = 8
_RECOVERY: Final = "run `mcap recover` on the file, then `ros2 bag reindex` on the folder"
_UNSUPPORTED: Final = ("not supported", "Profile is not ros2", "Unrecognized storage")
"""Parts of the messages of `rosbags` for files that are whole but of another kind."""
_READ_ERRORS: Final = (
    ReaderError,
    SerdeError,
    TypesysError,
    apsw.Error,
    EOFError,
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
    """Return the offered QoS for the metadata of a bag; `latched` is durability transient local."""
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
    """Return the QoS that the publishers of a recorded topic offered; empty if the bag has none."""
    ext = connection.ext
    return ext.offered_qos_profiles if isinstance(ext, ConnectionExtRosbag2) else ()


def is_latched(connection: Connection) -> bool:
    """Return True if late subscribers must receive the last messages of a recorded topic."""
    profiles = offered_qos(connection)
    if profiles:
        return any(profile.durability is QosDurability.TRANSIENT_LOCAL for profile in profiles)
    return connection.topic == "/tf_static"


class BagReader:
    """A bag open for reading; a context manager.

    Raises UserError for a path without a bag and for a bag that is damaged or truncated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stores: dict[str, Typestore] = {}
        if not self.path.exists():
            raise UserError(
                f"bag {str(self.path)!r} does not exist; give the folder that contains metadata.yaml"
            )
        try:
            self._files = BagFiles(self.path)
        except UserError:
            raise
        except PermissionError as error:
            raise UserError(
                f"bag {str(self.path)!r} cannot be read ({error.strerror}); change its permissions"
            ) from error
        except _READ_ERRORS as error:
            raise _unreadable(self.path, error) from error

    def __enter__(self) -> "BagReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    @property
    def connections(self) -> list[Connection]:
        """Recorded topics with type, definition, message count and QoS."""
        return self._files.connections

    @property
    def topics(self) -> dict[str, str]:
        """Message type by topic."""
        return {connection.topic: connection.msgtype for connection in self.connections}

    @property
    def message_count(self) -> int:
        """Number of messages."""
        return self._files.message_count

    @property
    def start_ns(self) -> int:
        """Log time of the first message."""
        return self._files.start_time

    @property
    def end_ns(self) -> int:
        """Log time of the last message."""
        return self._files.end_time - 1

    def raw(
        self, topics: Sequence[str] | None = None, *, optional: bool = False
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """Yield (connection, log time, serialized message) of some topics (None: all) in the order of log
        times.

        Raises UserError for a missing topic unless `optional`, and for a damaged bag.
        """
        names = self.topics
        missing = [] if topics is None or optional else [topic for topic in topics if topic not in names]
        if missing:
            raise UserError(
                f"bag {str(self.path)!r} has no topic {missing[0]}; "
                f"it has {', '.join(sorted(names)) or 'none'}"
            )
        selected = [
            connection for connection in self.connections if topics is None or connection.topic in topics
        ]
        if not selected:
            return
        try:
            yield from self._files.messages(selected)
        except _READ_ERRORS as error:
            raise UserError(f"bag {str(self.path)!r} is damaged ({_reason(error)}); copy it again") from error

    def messages(self, topics: Sequence[str], *, optional: bool = False) -> Iterator[tuple[str, int, Any]]:
        """Yield (topic, log time, message) of some topics in the order of log times.

        Raises UserError as `raw`.
        """
        for connection, log_time_ns, content in self.raw(topics, optional=optional):
            yield connection.topic, log_time_ns, self.deserialize(connection, content)

    def deserialize(self, connection: Connection, content: bytes) -> Any:
        """Return the message. Raises UserError if the content does not fit the definition of its type."""
        try:
            store = self._stores.get(connection.topic)
            if store is None:
                store = self._stores[connection.topic] = store_of(connection)
            return store.deserialize_cdr(content, connection.msgtype)
        except UserError as error:
            raise UserError(f"bag {str(self.path)!r}: {error}") from error
        except _READ_ERRORS as error:
            raise UserError(
                f"bag {str(self.path)!r}: a message of {connection.topic} is not a valid "
                f"{connection.msgtype} ({_reason(error)})"
            ) from error


class BagWriter:
    """Writes a new MCAP bag with message definitions and QoS; a context manager.

    Chunks have 1 MiB, without compression (JPEG images do not compress further) and without checksums. With
    `atomic` the bag gets its name when it is complete, and an error leaves no bag. Without it the bag grows
    in place, which a recorder needs. Raises UserError for an output that exists or cannot be created, and for
    a full disk.
    """

    def __init__(
        self, output: str | Path, *, atomic: bool = True, custom_data: Mapping[str, str] | None = None
    ) -> None:
        self.output = Path(output)
        self.counts: Counter[str] = Counter()
        self._connections: dict[str, Connection] = {}
        check_new(self.output)
        try:
            self._unfinished = UnfinishedFolder(self.output) if atomic else None
        except OSError as error:
            raise self._not_created(error) from error
        folder = self._unfinished.content if self._unfinished else self.output
        self._writer = Writer(folder, version=_METADATA_VERSION, storage_plugin=StoragePlugin.MCAP)
        for key, value in (custom_data or {}).items():
            self._writer.set_custom_data(key, value)
        try:
            self._writer.open()
        except OSError as error:
            self.abandon()
            raise self._not_created(error) from error

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
        """Add a topic. Raises UserError for a type without a definition."""
        ensure_known(msgtype)
        profile = qos(depth=depth, latched=latched, reliable=reliable)
        self._connections[topic] = self._writer.add_connection(
            topic, msgtype, typestore=message_types(), offered_qos_profiles=[profile]
        )

    def write(self, topic: str, log_time_ns: int, message: Any) -> None:
        """Serialize and append a message of `message_types()`."""
        content = message_types().serialize_cdr(message, self._connections[topic].msgtype)
        self.write_raw(topic, log_time_ns, content)

    def write_raw(self, topic: str, log_time_ns: int, content: bytes | memoryview) -> None:
        """Append a serialized message. Raises UserError if the disk is full."""
        try:
            self._writer.write(self._connections[topic], log_time_ns, content)
        except OSError as error:
            raise self._disk_error(error) from error
        self.counts[topic] += 1

    def flush(self) -> None:
        """Write all messages so far to disk as a complete chunk; a killed process loses only later messages.

        Raises UserError if the disk is full.
        """
        storage = self._writer.storage
        if not isinstance(storage, McapWriter) or not storage.chunk.bio.tell():
            return
        try:
            storage.close_chunk()
            storage.bio.flush()
        except OSError as error:
            raise self._disk_error(error) from error

    def close(self) -> None:
        """Write index and metadata.yaml, and rename the bag. Raises UserError if the disk is full."""
        try:
            self._writer.close()
            if self._unfinished is not None:
                check_new(self.output)
                self._unfinished.publish()
        except OSError as error:
            self.abandon()
            raise self._disk_error(error) from error
        except UserError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Stop writing without finishing the bag; a bag written in place keeps its complete chunks."""
        with suppress(OSError):  # a full disk cannot store the buffered data
            self._writer.abort()
        if self._unfinished is not None:
            self._unfinished.discard()

    def _not_created(self, error: OSError) -> UserError:
        return UserError(
            f"bag {str(self.output)!r} cannot be created ({error.strerror}); give another folder"
        )

    def _disk_error(self, error: OSError) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else str(error.strerror)
        return UserError(
            f"bag {str(self.output)!r} cannot be written: {reason}; free disk space or give another folder"
        )


def check_new(output: Path) -> None:
    """Raise UserError if the output exists, so that nothing is overwritten."""
    if output.exists() or output.is_symlink():
        raise UserError(f"output {str(output)!r} exists already; remove it or give another folder")


def _unreadable(path: Path, error: BaseException) -> UserError:
    """Return the error for a bag that cannot be opened: interrupted, damaged, or of another kind."""
    without_metadata = path.is_dir() and not (path / "metadata.yaml").is_file()
    if without_metadata:
        files = ", ".join(file.name for file in storage_files(path)[:3])
        return UserError(
            f"bag {str(path)!r} has no metadata.yaml and cannot be read ({_reason(error)}); it contains "
            f"{files}, so its recording was interrupted: {_RECOVERY}"
        )
    if any(text in str(error) for text in _UNSUPPORTED):
        return UserError(
            f"bag {str(path)!r} cannot be read ({_reason(error)}); "
            "expected a ROS 2 bag of MCAP or SQLite files"
        )
    return UserError(
        f"bag {str(path)!r} cannot be read ({_reason(error)}); it is damaged or its "
        f"recording was interrupted: {_RECOVERY}"
    )


def _reason(error: BaseException) -> str:
    """Return the first line of an error message, or the type of the error if the message is empty."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
