# SPDX-License-Identifier: Apache-2.0
"""JSON files are replaced as a whole or not at all."""

import json
import os
import threading
from pathlib import Path

import pytest

from ftkd_core.json_files import write_json


def test_written_value_is_read_back_and_no_other_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    for value in ({"a": 1}, {"a": [1.5, None, "ü"]}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": object()}])
def test_failed_write_keeps_the_earlier_file(tmp_path: Path, value: object) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, value, allow_nan=False)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_interrupted_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("{}")
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}


def test_pipe_is_written_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(timeout=10)
    assert json.loads(received[0]) == {"a": 1}
