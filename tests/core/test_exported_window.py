# SPDX-License-Identifier: Apache-2.0
"""An exported SparseBEV streams as the plain engine does, with its memory of past frames."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftkd_core.config import to_dict
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import compare_detectors
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.engines import WindowEngine
from ftkd_core.runtime.export import export_onnx, streaming_graphs
from ftkd_core.runtime.exported_engine import Arrays, ExportedEngine, OpenSession
from ftkd_core.runtime.sessions import OnnxSession, OpenVinoSession
from ftkd_core.types import CameraRound
from ftkd_core.weights import save_weights
from tests.core.helpers import small_sparse
from tests.core.rounds import far_away, make_round, turn_camera

CPU = torch.device("cpu")
SESSIONS: dict[str, OpenSession] = {
    "onnx": partial(OnnxSession, device=CPU, threads=1),
    "openvino": partial(OpenVinoSession, threads=1),
}


class GraphSession:
    """The graph that is exported, run by torch."""

    def __init__(self, model: SparseBEV) -> None:
        (self.graph,) = streaming_graphs(model, 50)
        self.notes = {"preset": model.config.preset}
        named = zip(self.graph.input_names, self.graph.inputs, strict=True)
        self.shapes = {name: tuple(value.shape) for name, value in named}

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """See `Session`."""
        given = [torch.from_numpy(np.asarray(inputs[name])) for name in self.graph.input_names]
        with torch.no_grad():
            found = dict(zip(self.graph.output_names, self.graph.module(*given), strict=True))
        return [found[name].numpy() for name in outputs]


def detector(model: SparseBEV, engine: ExportedEngine | None = None) -> Detector:
    found = Detector(
        model, weights_name="small", device=CPU, score_threshold=0.0, max_detections=50, runtime="plain"
    )
    if engine is not None:
        found.engine = engine
    return found


def graph_engine(model: SparseBEV, file: Path) -> ExportedEngine:
    file.touch()
    return ExportedEngine(file, model.config, lambda _: GraphSession(model))


def stream(count: int) -> list[CameraRound]:
    """Rounds far from the map's origin, one with a missing and one with a turned camera."""
    rounds = [far_away(make_round(index, missing=4 if index == 3 else None), index) for index in range(count)]
    rounds[count // 2] = turn_camera(rounds[count // 2])
    return rounds


@pytest.mark.parametrize(
    ("settings", "past", "queries"),
    [((), 2, 24), ((), 2, 0), (("decoder.as_published=true",), 3, 0), ((), 0, 24)],
)
def test_the_graph_streams_as_the_plain_engine(
    settings: tuple[str, ...], past: int, queries: int, tmp_path: Path
) -> None:
    model = small_sparse(*settings, past=past, image_queries=queries)
    plain, other = detector(model), detector(model, graph_engine(model, tmp_path / "a.onnx"))
    assert isinstance(plain.engine, WindowEngine)
    agreement = compare_detectors(plain, other, stream(7), top=20)
    assert agreement.unmatched == 0 and agreement.compared == 140
    assert agreement.center_m < 2e-3 and agreement.score < 1e-3


def test_a_reset_forgets_the_earlier_stream(tmp_path: Path) -> None:
    model = small_sparse(past=2, image_queries=24)
    for make in (lambda: detector(model), lambda: detector(model, graph_engine(model, tmp_path / "a.onnx"))):
        used, fresh = make(), make()
        for camera_round in stream(3):
            used.step(camera_round)
        used.reset()
        for camera_round in stream(5)[3:]:
            a, b = used.step(camera_round), fresh.step(camera_round)
            assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)


def test_a_restored_stream_continues_as_the_first(tmp_path: Path) -> None:
    model = small_sparse(past=2, image_queries=24)
    for make in (lambda: detector(model), lambda: detector(model, graph_engine(model, tmp_path / "a.onnx"))):
        first, second = make(), make()
        assert second.state()[0] == {"start_ns": None}
        for camera_round in stream(4):
            second.observe(camera_round)
            first.step(camera_round)
        second.restore(*first.state())
        for camera_round in stream(6)[4:]:
            a, b = first.step(camera_round), second.step(camera_round)
            assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)


def test_the_memory_matters() -> None:
    model = small_sparse(past=2, image_queries=24)
    streaming, alone = detector(model), detector(model)
    for camera_round in stream(3):
        last = streaming.step(camera_round)
    assert not np.allclose(last.boxes, alone.step(stream(3)[-1]).boxes, atol=1e-3)


@pytest.mark.slow
def test_an_exported_file_streams_as_the_plain_engine(tmp_path: Path) -> None:
    model, file = small_sparse(past=2, image_queries=24), tmp_path / "small.onnx"
    assert export_onnx(model, file, weights_hash="0123", max_detections=50) == [file]
    for name, session in SESSIONS.items():
        engine = ExportedEngine(file, model.config, session, weights_hash="0123")
        agreement = compare_detectors(detector(model), detector(model, engine), stream(7), top=20)
        assert agreement.unmatched == 0 and agreement.compared == 140, name
        assert agreement.center_m < 2e-3 and agreement.score < 1e-3, name


def test_a_weights_file_runs_as_its_model_and_a_teacher_is_refused(tmp_path: Path) -> None:
    model, teacher = small_sparse(past=2, image_queries=24), small_sparse(past=1, future=1)
    for name, each in (("online", model), ("teacher", teacher)):
        save_weights(tmp_path / f"{name}.safetensors", each.state_dict(), each.config, half=False)
    arguments: dict[str, Any] = {"device": "cpu", "score_threshold": 0.0, "max_detections": 50}
    arguments["camera_model"] = "as_is"
    loaded = Detector.from_weights(tmp_path / "online.safetensors", runtime="plain", **arguments)
    built = detector(model)
    for camera_round in stream(3):
        a, b = loaded.step(camera_round), built.step(camera_round)
        assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)
    assert to_dict(loaded.config) == to_dict(model.config)
    with pytest.raises(UserError, match="offline teacher with 1 future frames"):
        Detector.from_weights(tmp_path / "teacher.safetensors", **arguments)
    with pytest.raises(UserError, match="runtime fast runs a StreamPETR only"):
        Detector.from_weights(tmp_path / "online.safetensors", runtime="fast", **arguments)


def test_an_export_of_another_preset_is_refused(tmp_path: Path) -> None:
    model = small_sparse(past=2)
    other = dataclasses.replace(model.config, preset="sparse_bev_small")
    (tmp_path / "a.onnx").touch()
    with pytest.raises(UserError, match="from preset 'sparse_bev_tiny'; expected 'sparse_bev_small'"):
        ExportedEngine(tmp_path / "a.onnx", other, lambda _: GraphSession(model))
