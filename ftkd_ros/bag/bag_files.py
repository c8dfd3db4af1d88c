# SPDX-License-Identifier: Apache-2.0
"""Files of a bag, read with `rosbags`: a rosbag2 folder, a folder without usable metadata.yaml, or one file.

Without usable metadata (a bag after `ros2 bag reindex` on Humble has no storage identifier; an interrupted or
copied bag has no metadata.yaml) the storage files are read directly; their suffix tells what they are.
"""

import heapq
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Final

from rosbags.interfaces import Connection, MessageDefinition, MessageDefinitionFormat
from rosbags.rosbag2 import Reader, storage_mcap
from rosbags.rosbag2.reader import zstd  # type: ignore[attr-defined]  # of Python 3.14 or a backport
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ftkd_core.errors import UserError

STORAGE_SUFFIXES: Final = (".mcap", ".db3")
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ROS1_MAGIC: Final = b"#ROSBAG V"
_known_definitions = storage_mcap.get_msgdef


def _any_definition(schema: storage_mcap.Schema | None) -> MessageDefinition:
    """Return the definition of a schema; none for encodings that `rosbags` does not know, such as JSON."""
    try:
        return _known_definitions(schema)
    except KeyError:
        return MessageDefinition(MessageDefinitionFormat.NONE, "")


# rosbags 0.11 refuses a whole file for one topic with a JSON or protobuf schema.
storage_mcap.get_msgdef = _any_definition


class BagFiles:
    """Open storage of a bag: connections, times, and serialized messages in the order of log times.

    Raises UserError for a path that is no bag; `rosbags` raises its own errors for damaged files.
    """

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._direct = False
        try:
            self._readers = [self._stack.enter_context(Reader(file)) for file in self._sources(path)]
        except BaseException:
            self._stack.close()
            raise
        self.connections = _merged(self._readers)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    @property
    def message_count(self) -> int:
        """Number of messages."""
        return sum(reader.message_count for reader in self._readers)

    @property
    def start_time(self) -> int:
        """Log time of the first message."""
        return min(reader.start_time for reader in self._readers)

    @property
    def end_time(self) -> int:
        """Log time after the last message."""
        return max(reader.end_time for reader in self._readers)

    def messages(self, connections: Sequence[Connection]) -> Iterator[tuple[Connection, int, bytes]]:
        """Yield (connection, log time, serialized message) of some connections."""
        wanted = {_key(connection): connection for connection in connections}
        streams = []
        merged: dict[int, Connection] = {}
        for reader in self._readers:
            own = [connection for connection in reader.connections if _key(connection) in wanted]
            merged |= {id(connection): wanted[_key(connection)] for connection in own}
            if own:
                streams.append(reader.messages(connections=own))
        for connection, log_time_ns, content in heapq.merge(*streams, key=lambda item: item[1]):
            if self._direct and content[:4] == _ZSTD_MAGIC:  # no serialized message begins with these bytes
                content = zstd.decompress(content)
            yield merged.get(id(connection)) or wanted[_key(connection)], log_time_ns, content

    def _sources(self, path: Path) -> list[Path]:
        """Return the folder of a complete bag, or the storage files of another one."""
        _refuse_ros1(path)
        if path.is_dir() and _is_complete(path):
            return [path]
        self._direct = True
        return [self._unpacked(file) for file in _storage_files(path)]

    def _unpacked(self, file: Path) -> Path:
        if file.suffix in STORAGE_SUFFIXES:
            return file
        folder = Path(self._stack.enter_context(TemporaryDirectory()))
        with zstd.open(file, "rb") as packed, (folder / file.stem).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        return folder / file.stem


def storage_files(folder: Path) -> list[Path]:
    """Return the files in a folder that hold messages of a bag, in order of their names."""
    endings = tuple(f"{suffix}{packed}" for suffix in STORAGE_SUFFIXES for packed in ("", ".zstd"))
    return sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(endings) and entry.is_file()),
        key=lambda entry: (len(entry.name), entry.name),
    )


def _storage_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = storage_files(path)
    if not files:
        raise UserError(
            f"bag {str(path)!r} has no metadata.yaml; give the folder that contains it, "
            "or a .mcap or .db3 file"
        )
    return files


def _is_complete(folder: Path) -> bool:
    """Whether metadata.yaml describes the files of the folder.

    Raises UserError if some, but not all, of its files are missing.
    """
    path = folder / "metadata.yaml"
    if not path.is_file():
        return False
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        information = content["rosbag2_bagfile_information"]
        names = [PurePath(name).name for name in information["relative_file_paths"]]
        storage = information["storage_identifier"]
        formats = {
            topic["topic_metadata"]["serialization_format"]
            for topic in information["topics_with_message_count"]
        }
    except (YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return not storage_files(folder)  # the reader then names the fault
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and len(missing) < len(names):
        raise UserError(
            f"bag {str(folder)!r} is incomplete: {len(missing)} of its {len(names)} files are missing, first "
            f"{missing[0]!r}; copy the whole folder"
        )
    if missing:
        return not storage_files(folder)  # the files were renamed, or there are none
    return bool(storage) and formats <= {"cdr"}


def _refuse_ros1(path: Path) -> None:
    """Raise UserError for a bag of ROS 1."""
    file = path
    if path.is_dir() and not (path / "metadata.yaml").is_file() and not storage_files(path):
        file = next(iter(sorted(path.glob("*.bag"))), path)
    if not file.is_file():
        return
    with file.open("rb") as content:
        if content.read(len(_ROS1_MAGIC)) == _ROS1_MAGIC:
            raise UserError(
                f"{str(file)!r} is a bag of ROS 1; convert it: "
                f"rosbags-convert --src {file} --dst {file.with_suffix('')}_ros2"
            )


def _key(connection: Connection) -> tuple[str, str, str]:
    return connection.topic, connection.msgtype, repr(connection.ext)


def _merged(readers: Sequence[Reader]) -> list[Connection]:
    """Return one connection per topic, type and QoS of all files, with the sum of their messages."""
    found: dict[tuple[str, str, str], Connection] = {}
    for reader in readers:
        for connection in reader.connections:
            known = found.get(_key(connection))
            total = connection.msgcount + (known.msgcount if known else 0)
            found[_key(connection)] = (known or connection)._replace(msgcount=total)
    return list(found.values())
