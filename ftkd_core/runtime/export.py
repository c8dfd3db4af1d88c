# SPDX-License-Identifier: Apache-2.0
"""Export a streaming detector to ONNX or to a torch.export program.

A StreamPETR is two files: FILE.onnx, one round of the stream, and FILE.rig.onnx, the encoding of the cameras,
which only has to run when a camera's calibration or mask changes. A SparseBEV is one file. Inputs and outputs
are documented in `streaming_graph` and `window_graph`. All numbers are float32, int64, bool or uint8:
TensorRT has no float64. Shapes are fixed."""

import contextlib
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from ftkd_core.config import DetectorConfig, SparseBEVConfig, to_dict
from ftkd_core.errors import UserError
from ftkd_core.models.build import StreamingModel
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.inference_model import inference_model
from ftkd_core.runtime.streaming_graph import (
    FRAME_INPUTS,
    GEOMETRY,
    MEMORY,
    OUTPUTS,
    RIG_INPUTS,
    FrameGraph,
    RigGraph,
    start_memory,
)
from ftkd_core.runtime.window_graph import WindowGraph, start_window_memory, window_memory_names

OPSET: Final = 18
METADATA_KEY: Final = "ftkd"
"""Under it a file's metadata hold one JSON object, see `describe`."""
ONNX_PACKAGES: Final = ("onnx", "onnxscript")
GRAPH_VERSION: Final = 2
"""Raised whenever the exported files change, so that cached files of the earlier form are not used."""


class Graph(NamedTuple):
    """A module with example inputs, and the names of its inputs and outputs."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


def rig_path(path: Path) -> Path:
    """The file of the rig's encoding that belongs to an exported FILE.onnx or FILE.pt2."""
    return path.with_name(f"{path.stem}.rig{path.suffix}")


def exported_files(path: Path, config: DetectorConfig | SparseBEVConfig) -> tuple[Path, ...]:
    """Return the files of an export, that of the round first."""
    return (path,) if isinstance(config, SparseBEVConfig) else (path, rig_path(path))


def streaming_graphs(model: StreamingModel, max_detections: int) -> tuple[Graph, ...]:
    """Return the graphs of `exported_files`, of a copy of the model for inference, on the CPU."""
    model = inference_model(model, torch.device("cpu"), torch.float32)
    if isinstance(model, SparseBEV):
        return (_window_graph(model, max_detections),)
    return _frame_and_rig_graphs(model, max_detections)


def _frame_and_rig_graphs(model: StreamPETR, max_detections: int) -> tuple[Graph, Graph]:
    rig = _example_rig(model.config)
    rig_module, frame_module = RigGraph(model).eval(), FrameGraph(model, max_detections).eval()
    with torch.no_grad():
        geometry = tuple(value.clone() for value in rig_module(*rig))
    frame = Graph(
        frame_module,
        (*_example_frame(model.config), *rig, *geometry, *start_memory(model)),
        (*FRAME_INPUTS, *RIG_INPUTS, *GEOMETRY, *MEMORY),
        (*OUTPUTS, *(f"next_{name}" for name in MEMORY)),
    )
    return frame, Graph(rig_module, rig, RIG_INPUTS, GEOMETRY)


def _window_graph(model: SparseBEV, max_detections: int) -> Graph:
    names = window_memory_names(model.config)
    return Graph(
        WindowGraph(model, max_detections).eval(),
        (*_example_frame(model.config), *_example_rig(model.config), *start_window_memory(model)),
        (*FRAME_INPUTS, *RIG_INPUTS, *names),
        (*OUTPUTS, *(f"next_{name}" for name in names)),
    )


def _example_rig(config: DetectorConfig | SparseBEVConfig) -> tuple[Tensor, Tensor, Tensor]:
    cameras, image = len(config.channels), config.image
    focal = float(image.width)
    intrinsics = torch.tensor([[focal, 0, image.width / 2], [0, focal, image.height / 2], [0, 0, 1.0]])
    return (
        intrinsics.repeat(cameras, 1, 1),
        torch.eye(4).repeat(cameras, 1, 1),
        torch.ones(cameras, dtype=torch.bool),
    )


def _example_frame(config: DetectorConfig | SparseBEVConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values of FRAME_INPUTS."""
    images = torch.zeros(len(config.channels), config.image.height, config.image.width, 3, dtype=torch.uint8)
    return images, torch.eye(4), torch.zeros(1), torch.ones(1, dtype=torch.bool)


def describe(model: StreamingModel, weights: str, max_detections: int) -> dict[str, Any]:
    """The metadata of an export: preset, cameras, classes, input size, hash of the weights, configuration."""
    config = model.config
    return {
        "preset": config.preset,
        "cameras": list(config.channels),
        "classes": list(config.class_names),
        "input_width": config.image.width,
        "input_height": config.image.height,
        "max_detections": max_detections,
        "weights_hash": weights,
        "config": to_dict(config),
        "torch": torch.__version__,
        "opset": OPSET,
    }


def names_of(graph: Graph) -> dict[str, Any]:
    """Return the names of a graph's inputs and outputs for the metadata; torch.export stores none."""
    return {"inputs": list(graph.input_names), "outputs": list(graph.output_names)}


def export_onnx(
    model: StreamingModel, path: Path, *, weights_hash: str, max_detections: int = 300, replace: bool = False
) -> list[Path]:
    """Write FILE.onnx and, for a StreamPETR, FILE.rig.onnx; return the files written. replace: existing
    files are replaced.

    Errors: UserError if a file exists already, its name does not end in .onnx, or a package is missing.
    """
    require_packages(ONNX_PACKAGES, "onnx", "exporting to ONNX")
    if path.suffix != ".onnx":
        raise UserError(f"output {str(path)!r}: expected a name that ends in .onnx")
    files = list(exported_files(path, model.config))
    refuse_existing(() if replace else files)
    graphs = streaming_graphs(model, max_detections)
    notes = describe(model, weights_hash, max_detections)
    path.parent.mkdir(parents=True, exist_ok=True)
    for graph, file in reversed(list(zip(graphs, files, strict=True))):
        program = to_onnx(graph)
        program.metadata_props[METADATA_KEY] = json.dumps(notes | names_of(graph))
        _save(program, file)
    return files


def export_pt2(
    model: StreamingModel, path: Path, *, weights_hash: str, max_detections: int = 300
) -> list[Path]:
    """Write the same as FILE.pt2 and FILE.rig.pt2, programs of torch.export. Errors: as `export_onnx`."""
    if path.suffix != ".pt2":
        raise UserError(f"output {str(path)!r}: expected a name that ends in .pt2")
    files = list(exported_files(path, model.config))
    refuse_existing(files)
    notes = describe(model, weights_hash, max_detections)
    path.parent.mkdir(parents=True, exist_ok=True)
    for graph, file in zip(streaming_graphs(model, max_detections), files, strict=True):
        partial = file.with_name(file.name + ".partial.pt2")
        extra = {METADATA_KEY: json.dumps(notes | names_of(graph))}
        torch.export.save(to_program(graph), partial, extra_files=extra)
        partial.replace(file)
    return files


def refuse_existing(files: Sequence[Path]) -> None:
    """UserError if one of the files exists."""
    for file in files:
        if file.exists():
            raise UserError(f"{str(file)!r} exists already; delete it or give another --output")


def require_packages(names: Sequence[str], extra: str, what: str) -> None:
    """UserError with the pip command if a package is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'ftkd_ros[{extra}]'")


def to_program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph as torch.export captures it, without operators that ONNX lacks."""
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph.module, graph.inputs, strict=False)
        plain: torch.export.ExportedProgram = program.run_decompositions(
            {
                torch.ops.aten._cdist_forward.default: _pairwise_distance,
                torch.ops.aten.cdist.default: _pairwise_distance,
            }
        )
        return plain


def _pairwise_distance(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """torch.cdist of Euclidean distances (p 2) by differences, in operators that ONNX has."""
    assert p == 2.0
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt()


def to_onnx(graph: Graph) -> Any:
    """The graph as a model of onnx_ir in float32."""
    with _quiet():
        program = torch.onnx.export(
            to_program(graph), args=(), dynamo=True, input_names=graph.input_names,
            output_names=graph.output_names, opset_version=OPSET, verbose=False,
        )  # fmt: skip
    assert program is not None
    to_float32(program.model)
    return program.model


def to_float32(model: Any) -> None:
    """Change every float64 value of a model of onnx_ir to float32.

    The network computes poses in float64 because they are global; here they are relative to the vehicle.
    """
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        for output in node.outputs:
            if output.dtype == ir.DataType.DOUBLE:
                output.dtype = ir.DataType.FLOAT
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.value == ir.DataType.DOUBLE:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.DOUBLE:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.dtype = ir.DataType.FLOAT


def _save(model: Any, path: Path) -> None:
    """Check a model of onnx_ir with ONNX's checker and write it; the file appears when it is complete."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may export at once
    onnx.save(proto, partial)
    partial.replace(path)


def operators(path: Path) -> dict[str, int]:
    """How often each operator occurs in an ONNX file, most frequent first."""
    import onnx

    return dict(Counter(node.op_type for node in onnx.load(path).graph.node).most_common())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
