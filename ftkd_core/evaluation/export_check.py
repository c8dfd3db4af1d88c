# SPDX-License-Identifier: Apache-2.0
"""Checks of an exported detector: its detections over a stream, and its operators.

Used by `ftkd export` after it has written the files.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ftkd_core.evaluation.detector_benchmark import (
    compare_detectors,
    driving_rounds,
    load_streaming_model,
    network_rig,
)
from ftkd_core.models.build import StreamingModel, build_streaming
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.export import METADATA_KEY, operators
from ftkd_core.runtime.exported_engine import Arrays, ExportedEngine, OpenSession
from ftkd_core.runtime.sessions import OnnxSession, OpenVinoSession, read_notes
from ftkd_core.types import CameraRound
from ftkd_core.weights import SHIPPED, load_into, read_streaming_weights

ROUNDS: Final = 20
_WITHIN: Final = 0.99
"""Share of boxes that must agree to 2 cm and 0.005: of two proposals with equal scores rounding may pick
either."""
_SUPPORTED: Final = (
    "Abs Add And ArgMax Atan Cast Clip Concat Constant ConstantOfShape Conv Cos Div Equal Exp Expand",
    "EyeLike Gather GatherElements GatherND Gemm Greater GreaterOrEqual GridSample Identity IsNaN",
    "Less LessOrEqual Log MatMul Max MaxPool Min Mod Mul Neg Not Or Pad Pow Reciprocal ReduceL2",
    "ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Resize ScatterElements ScatterND Shape",
    "Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tile TopK Transpose Unsqueeze Where",
)
_TENSORRT_8_5: Final = frozenset(" ".join(_SUPPORTED).split())
"""Supported according to the operator table of onnx-tensorrt for TensorRT 8.5, as far as detectors use
them."""
_LATER: Final = {"LayerNormalization": "not in TensorRT 8.5; TensorRT 8.6 or later"}


class Comparison(NamedTuple):
    """The result of a comparison in words, and whether it passed."""

    text: str
    passed: bool


class ProgramSession:
    """A graph of torch.export, run by torch."""

    def __init__(self, path: Path) -> None:
        extra = {METADATA_KEY: ""}
        self._program: Any = torch.export.load(path, extra_files=extra).module()
        self.notes = read_notes(extra[METADATA_KEY] or None, path)
        self._inputs, self._outputs = (tuple(self.notes[key]) for key in ("inputs", "outputs"))
        values = [node for node in self._program.graph.nodes if node.op == "placeholder"]
        self.shapes = {
            name: tuple(node.meta["val"].shape) for name, node in zip(self._inputs, values, strict=True)
        }

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """See `exported_engine.Session`."""
        with torch.no_grad():
            values = self._program(*(torch.from_numpy(np.asarray(inputs[name])) for name in self._inputs))
        found = dict(zip(self._outputs, values, strict=True))
        return [found[name].numpy() for name in outputs]


def load_model(weights: Path | None, preset: str | None) -> StreamingModel:
    """The model of a weights file (None: the shipped one), or of a preset with random weights."""
    if preset is not None:
        return load_streaming_model(preset)[0]
    state, config, _ = read_streaming_weights(weights or SHIPPED)
    model = build_streaming(config)
    load_into(model, state, str(weights or SHIPPED))
    return model.eval()


def compare(model: StreamingModel, path: Path, target: str, max_detections: int) -> Comparison:
    """Run the exported files and the plain engine over ROUNDS rounds of a rendered drive with ego motion, of
    which one lacks a camera."""
    session = _session_of(target)
    if session is None:
        return Comparison("not compared: neither onnxruntime nor openvino is installed", True)
    name, open_session = session
    rounds = _with_a_missing_camera(driving_rounds(ROUNDS, network_rig(model)))
    plain, other = (
        Detector(
            model, weights_name="", device=torch.device("cpu"), score_threshold=0.0,
            max_detections=max_detections, runtime="plain",
        )
        for _ in range(2)
    )  # fmt: skip
    other.engine = ExportedEngine(path, model.config, open_session)
    found = compare_detectors(plain, other, rounds)
    text = (
        f"{name} against the plain engine over {ROUNDS} rounds: {found.within:.2%} of {found.compared} boxes "
        f"within 2 cm and 0.005; largest differences {1e3 * found.center_m:.3g} mm, {found.score:.2g}"
    )
    return Comparison(text, found.within >= _WITHIN)


def _session_of(target: str) -> tuple[str, OpenSession] | None:
    if target == "pt2":
        return "torch.export", ProgramSession
    if find_spec("onnxruntime") is not None:
        return "ONNX Runtime", partial(OnnxSession, device=torch.device("cpu"))
    if find_spec("openvino") is not None:
        return "OpenVINO", OpenVinoSession
    return None


def _with_a_missing_camera(rounds: Sequence[CameraRound]) -> list[CameraRound]:
    middle = len(rounds) // 2
    views = (None, *rounds[middle].views[1:])
    return [replace(each, views=views) if index == middle else each for index, each in enumerate(rounds)]


def operator_lines(files: Sequence[Path]) -> list[str]:
    """The operators of ONNX files with the TensorRT version that supports them."""
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(operators(file))
    unknown = [name for name in counts if name not in _TENSORRT_8_5 and name not in _LATER]
    lines = [
        f"{len(counts)} kinds of operators: "
        + ", ".join(f"{name} {count}" for name, count in counts.most_common())
    ]
    lines += [f"{name}: {_LATER[name]}" for name in counts if name in _LATER]
    if unknown:
        lines.append(f"TensorRT support unknown: {', '.join(unknown)}")
    else:
        lines.append("all other operators are listed as supported by TensorRT 8.5 (read, not run)")
    return lines
