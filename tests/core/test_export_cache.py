# SPDX-License-Identifier: Apache-2.0
"""The cache of exported models: written once, bounded, and clean after interrupted exports.

An export takes half a minute; here it writes small text files.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from ftkd_core.errors import UserError
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime import engine_choice, export_cache
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.export import rig_path
from ftkd_core.runtime.export_cache import KEPT, cached_export
from tests.core.helpers import small_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> StreamPETR:
    return small_model()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTKD_CACHE", str(tmp_path))
    return tmp_path


class TextEngine:
    """Reads a file as an engine does: a damaged one is refused."""

    def __init__(self, path: Path, *_: object, **__: object) -> None:
        if path.read_text() != "a graph":
            raise UserError(f"cannot read {str(path)!r}")


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were exported."""
    names = []

    def write(_: StreamPETR, path: Path, **__: Any) -> None:
        names.append(path.name)
        for file in (path, rig_path(path)):
            file.write_text("a graph")

    monkeypatch.setattr(export_cache, "export_onnx", write)
    monkeypatch.setattr(engine_choice, "ExportedEngine", TextEngine)
    return names


def age(path: Path, hours: float) -> None:
    """Set the last use of an export to some hours ago."""
    time = path.stat().st_mtime - 3600 * hours
    os.utime(path, (time, time))


def test_a_detector_exports_its_model_once(model: StreamPETR, cache: Path, exports: list[str]) -> None:
    for limit in (50, 50, 40):
        found = Detector(model, weights_name="small", device=CPU, max_detections=limit, runtime="onnx")
        assert isinstance(found.engine, TextEngine) and found.runtime == "onnx"
    assert len(exports) == len(set(exports)) == 2  # one per limit
    assert {file.suffix for file in cache.iterdir()} == {".onnx"}  # no lock, nothing half-written


def test_exports_that_were_not_used_for_longest_are_removed(
    model: StreamPETR, cache: Path, exports: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    paths = [cached_export(model, f"weights {index}", 50) for index in range(KEPT)]
    for index, path in enumerate(paths):
        age(path, 10 - index)
    assert cached_export(model, "weights 0", 50) == paths[0]  # the oldest is used again
    newest = cached_export(model, "weights 99", 50)
    left = {file for file in cache.iterdir() if not file.name.endswith(".rig.onnx")}
    assert left == {paths[0], *paths[2:], newest}
    assert {rig_path(path) for path in left} == {file for file in cache.iterdir() if file not in left}
    assert f"removed {paths[1].name} from the cache" in caplog.text
    assert len(exports) == KEPT + 1


def test_leftovers_of_an_interrupted_export_neither_block_nor_stay(
    model: StreamPETR, cache: Path, exports: list[str]
) -> None:
    killed = f"""
import os, sys
from filelock import FileLock
lock = FileLock({str(cache / "export.lock")!r})
lock.acquire()
open({str(cache / "small.onnx.1.partial")!r}, "w").write("half")
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == 9
    assert {file.name for file in cache.iterdir()} == {"export.lock", "small.onnx.1.partial"}
    path = cached_export(model, "a", 50)
    assert {file.name for file in cache.iterdir()} == {path.name, rig_path(path).name}
    rig_path(path).unlink()  # an export that was stopped between its two files
    cached_export(model, "a", 50)
    assert rig_path(path).is_file() and len(exports) == 2


def test_a_process_that_exports_for_too_long_is_reported(
    model: StreamPETR, cache: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_cache, "WAIT_S", 0.1)
    with (
        FileLock(cache / "export.lock"),
        pytest.raises(UserError, match="another process has been exporting into .*FTKD_CACHE"),
    ):
        cached_export(model, "a", 50)
    assert exports == []
    cached_export(model, "a", 50)


def test_a_damaged_cached_file_is_written_again(
    model: StreamPETR, cache: Path, exports: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    Detector(model, weights_name="small", device=CPU, max_detections=50, runtime="onnx")
    file = cache / exports[0]
    file.write_text("a gra")
    found = Detector(model, weights_name="small", device=CPU, max_detections=50, runtime="onnx")
    assert isinstance(found.engine, TextEngine) and len(exports) == 2
    assert "cannot read" in caplog.text and "(a cached file)" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(
    model: StreamPETR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTKD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot export tiny into '.*file/cache'.*FTKD_CACHE"):
        cached_export(model, "a", 50)
