# SPDX-License-Identifier: Apache-2.0
"""Exported detectors: ONNX Runtime and OpenVINO stream as the plain engine does; bad files are refused."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import compare_detectors
from ftkd_core.geometry import invert_rigid
from ftkd_core.models.memory import Memory
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime import engine_choice, export
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.engine_choice import choose_runtime
from ftkd_core.runtime.export import METADATA_KEY, export_onnx, export_pt2, operators, rig_path
from ftkd_core.runtime.exported_engine import ExportedEngine, OpenSession
from ftkd_core.runtime.sessions import OnnxSession, OpenVinoSession, providers_for
from ftkd_core.runtime.streaming_graph import MEMORY, relative_to
from ftkd_core.types import CameraRound
from tests.core.helpers import small_model
from tests.core.rounds import far_away, make_round, turn_camera

CPU = torch.device("cpu")
SESSIONS: dict[str, OpenSession] = {
    "onnx": partial(OnnxSession, device=CPU, threads=1),
    "openvino": partial(OpenVinoSession, threads=1),
}
HASH = "0123"


@pytest.fixture(scope="module")
def model() -> StreamPETR:
    return small_model()


@pytest.fixture(scope="module")
def exported(model: StreamPETR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    export_onnx(model, path, weights_hash=HASH, max_detections=50)
    return path


def detector(model: StreamPETR, engine: ExportedEngine | None = None) -> Detector:
    found = Detector(
        model, weights_name="small", device=CPU, score_threshold=0.0, max_detections=50, runtime="plain"
    )
    if engine is not None:
        found.engine = engine
    return found


def hide_half(camera_round: CameraRound, model: StreamPETR) -> CameraRound:
    """The round with the upper half of its first camera not visible."""
    image = model.config.image
    visible = np.ones((image.height // 16, image.width // 16), dtype=np.float32)
    visible[: len(visible) // 2] = 0
    first, *others = camera_round.views
    assert first is not None
    return dataclasses.replace(camera_round, views=(dataclasses.replace(first, visible=visible), *others))


@pytest.mark.parametrize("library", SESSIONS)
def test_an_exported_detector_streams_as_the_plain_one(
    library: str, model: StreamPETR, exported: Path
) -> None:
    """20 rounds with ego motion, a missing camera, a turned camera, and one of which half is hidden."""
    rounds = [far_away(make_round(index, missing=4 if index == 7 else None), index) for index in range(20)]
    rounds[12] = turn_camera(rounds[12])
    rounds[15] = hide_half(rounds[15], model)
    engine = ExportedEngine(exported, model.config, SESSIONS[library], weights_hash=HASH)
    agreement = compare_detectors(detector(model), detector(model, engine), rounds, top=20)
    assert agreement.unmatched == 0 and agreement.compared == 400
    assert agreement.center_m < 1e-3 and agreement.score < 1e-3


@pytest.mark.parametrize("library", SESSIONS)
def test_a_reset_forgets_the_earlier_stream(library: str, model: StreamPETR, exported: Path) -> None:
    used, fresh = (
        detector(model, ExportedEngine(exported, model.config, SESSIONS[library])) for _ in range(2)
    )
    for index in range(3):
        used.step(far_away(make_round(index), index))
    used.reset()
    for index in range(3, 5):
        a, b = (each.step(far_away(make_round(index), index)) for each in (used, fresh))
        assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)


SIGNAL_AFTER_CLOSING = """
import gc, os, signal, sys
from pathlib import Path
from ftkd_core.runtime.sessions import OpenVinoSession
received = []
signal.signal(signal.SIGINT, lambda *_: received.append("SIGINT"))
first, second = (OpenVinoSession(Path(sys.argv[1]), threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGINT)
print(received)
"""


def test_a_signal_after_the_last_openvino_session_is_handled(exported: Path) -> None:
    """OpenVINO leaves freed memory registered for signal handlers if its plugin is destroyed."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_AFTER_CLOSING, str(exported)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "['SIGINT']"), done.stderr


def test_a_published_configuration_is_exported_too(tmp_path: Path) -> None:
    """The form of imported StreamPETR weights, whose model frame is not the vehicle's."""
    published = small_model(
        "decoder.as_published=true", "decoder.num_depths=32", "backbone.neck_channels=32",
        "model_from_ego=[[0, -1, 0, 0.5], [1, 0, 0, 0], [0, 0, 1, -1.8], [0, 0, 0, 1]]", image_queries=0,
    )  # fmt: skip
    path = tmp_path / "published.onnx"
    export_onnx(published, path, weights_hash=HASH, max_detections=50)
    engine = ExportedEngine(path, published.config, SESSIONS["onnx"])
    rounds = [far_away(make_round(index), index) for index in range(6)]
    agreement = compare_detectors(detector(published), detector(published, engine), rounds, top=20)
    assert agreement.unmatched == 0 and agreement.center_m < 1e-3 and agreement.score < 1e-3


def test_a_torch_export_program_computes_as_the_graph_it_was_made_from(
    model: StreamPETR, tmp_path: Path
) -> None:
    frame, rig = export.streaming_graphs(model, 50)
    files = export_pt2(model, tmp_path / "small.pt2", weights_hash=HASH, max_detections=50)
    for graph, file in zip((frame, rig), files, strict=True):
        extra = {METADATA_KEY: ""}
        program = torch.export.load(file, extra_files=extra)
        with torch.no_grad():
            expected, found = graph.module(*graph.inputs), program.module()(*graph.inputs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))
        assert json.loads(extra[METADATA_KEY])["preset"] == model.config.preset


def test_an_export_has_metadata_and_no_float64(model: StreamPETR, exported: Path) -> None:
    import onnx

    for path in (exported, rig_path(exported)):
        proto = onnx.shape_inference.infer_shapes(onnx.load(path))
        values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
        assert not [v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE]
        notes = json.loads({p.key: p.value for p in proto.metadata_props}[METADATA_KEY])
        assert notes["weights_hash"] == HASH and notes["cameras"] == list(model.config.channels)
    assert operators(exported)["Conv"] > 5


@pytest.mark.parametrize("library", SESSIONS)
def test_files_that_do_not_fit_are_refused(
    library: str, model: StreamPETR, exported: Path, tmp_path: Path
) -> None:
    session = SESSIONS[library]
    with pytest.raises(UserError, match=r"other weights \(0123\); expected ffff"):
        ExportedEngine(exported, model.config, session, weights_hash="ffff")
    with pytest.raises(UserError, match="from preset 'tiny'; expected 'other'"):
        ExportedEngine(exported, dataclasses.replace(model.config, preset="other"), session)
    with pytest.raises(UserError, match="ftkd export --format onnx"):
        ExportedEngine(tmp_path / "missing.onnx", model.config, session)
    damaged = tmp_path / "damaged.onnx"
    for path in (damaged, rig_path(damaged)):
        path.write_bytes(exported.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read .*damaged"):
        ExportedEngine(damaged, model.config, session)


@pytest.mark.parametrize("library", SESSIONS)
def test_an_onnx_file_of_another_program_is_refused(library: str, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    with pytest.raises(UserError, match="was not written by ftkd export"):
        SESSIONS[library](path)


def unknown_operator(path: Path) -> None:
    """Write an ONNX file with an operator that no library has."""
    import onnx
    from onnx import helper

    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    node = helper.make_node("Teleport", ["a"], ["b"], domain="example.org")
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("example.org", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


@pytest.mark.parametrize("library", SESSIONS)
def test_an_operator_that_the_library_lacks_is_named(library: str, tmp_path: Path) -> None:
    unknown_operator(tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"has an operator that .*Teleport.*runtime fast or plain"):
        SESSIONS[library](tmp_path / "a.onnx")


def test_a_provider_that_refuses_an_operator_is_replaced_with_a_warning(
    exported: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    real, asked = onnxruntime.InferenceSession, []

    def refuse(path: str, options: object, providers: list[str]) -> object:
        asked.append(providers)
        if providers[0] != "CPUExecutionProvider":
            raise RuntimeError(f"{providers[0]}: engine build failed\nno kernel for GridSample(16)")
        return real(path, options, providers=providers)

    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    session = OnnxSession(exported, torch.device("cuda"), threads=1)
    assert "images" in session.shapes and asked == [available, available[1:], available[2:]]
    assert "TensorrtExecutionProvider refuses it (no kernel for GridSample(16))" in caplog.text
    assert "CUDAExecutionProvider refuses it" in caplog.text


def test_a_damaged_file_is_not_blamed_on_the_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    (tmp_path / "a.onnx").write_bytes(b"no graph")
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(UserError, match="cannot read .*a.onnx.*export it again"):
        OnnxSession(tmp_path / "a.onnx", torch.device("cuda"))
    assert "refuses" not in caplog.text


def test_an_existing_file_is_not_overwritten(model: StreamPETR, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export_onnx(model, exported, weights_hash=HASH)
    with pytest.raises(UserError, match=r"ends in \.onnx"):
        export_onnx(model, tmp_path / "small.bin", weights_hash=HASH)
    with pytest.raises(UserError, match=r"ends in \.pt2"):
        export_pt2(model, tmp_path / "small.onnx", weights_hash=HASH)


def test_a_missing_package_is_named_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript.*pip install 'ftkd_ros\[onnx\]'"):
        export.require_packages(export.ONNX_PACKAGES, "onnx", "exporting to ONNX")
    for runtime, package, extra in (("onnx", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")):
        with pytest.raises(UserError, match=rf"runtime {runtime} needs {package}: .*'ftkd_ros\[{extra}\]'"):
            engine_choice.make_engine(runtime, small_model(), CPU, engine_choice.EngineOptions(50))


def test_auto_takes_the_fastest_engine_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*names: str) -> None:
        monkeypatch.setattr(engine_choice, "find_spec", lambda name: name if name in names else None)

    install("openvino", "onnxruntime", "onnx", "onnxscript")
    assert choose_runtime("auto", CPU).name == "openvino"
    install("onnxruntime", "onnx", "onnxscript")
    assert choose_runtime("auto", CPU).name == "onnx"
    install("onnxruntime")  # nothing here can write a file for it
    assert choose_runtime("auto", CPU).name == "fast"
    assert choose_runtime("auto", CPU, exported=True).name == "onnx"
    install()
    assert choose_runtime("auto", CPU).name == "fast"
    assert choose_runtime("plain", CPU) == ("plain", "requested")
    with pytest.raises(UserError, match="runtime 'tensorrt': expected one of auto, "):
        choose_runtime("tensorrt", CPU)


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("cpu", ["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]),
        (
            "cuda",
            ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"],
            ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        ),
    ],
)
def test_providers_are_tried_best_first(device: str, available: list[str], expected: list[str]) -> None:
    assert providers_for(torch.device(device), available) == expected


def test_a_gpu_without_a_provider_is_refused() -> None:
    with pytest.raises(UserError, match="onnxruntime-gpu, or use device cpu"):
        providers_for(torch.device("cuda"), ["CPUExecutionProvider"])


def rigid(seed: int) -> NDArray[np.float64]:
    from scipy.spatial.transform import Rotation

    random = np.random.default_rng(seed)
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler(
        "xyz", random.uniform(-0.02, 0.02, 3) + np.array([0, 0, seed])
    ).as_matrix()
    pose[:3, 3] = random.uniform(-20, 20, 3)
    return pose


@pytest.mark.parametrize("seed", range(5))
def test_a_memory_moves_with_the_vehicle(seed: int) -> None:
    """Points, poses and times of a memory, and its empty slots, under a rigid motion."""
    past, pose = rigid(seed), rigid(seed + 100)
    poses = np.stack([past, np.zeros((4, 4))])[None]
    random = torch.Generator().manual_seed(seed)
    memory = Memory(
        *(torch.randn(1, 2, size, generator=random) for size in (4, 3, 2, 5, 3)),
        time=torch.tensor([[-1.0, 0.0]]),
        global_from_ego=torch.from_numpy(poses).float(),
    )
    moved = relative_to(memory, torch.from_numpy(pose)[None].float(), torch.tensor([0.5]))
    current_from_previous = invert_rigid(pose)
    points = memory.centers_global[0].numpy() @ current_from_previous[:3, :3].T + current_from_previous[:3, 3]
    assert np.allclose(moved.centers_global[0].numpy(), points, atol=1e-4)
    assert np.allclose(moved.global_from_ego[0, 0].numpy(), current_from_previous @ past, atol=1e-4)
    assert not moved.global_from_ego[0, 1].any()
    assert moved.time.tolist() == [[-1.5, -0.5]]
    assert len(moved) == len(MEMORY)
