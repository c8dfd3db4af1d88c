# SPDX-License-Identifier: Apache-2.0
"""Distillation adds no cost at inference: a distilled student has the graph of a plain one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.memory import Memory
from ftkd_core.models.predictions import decode
from ftkd_core.types import CameraRig, Frame
from ftkd_core.weights import load_into, read_weights
from tests.core.helpers import make_frame
from tests.training.helpers import make_trainer, paired_data, streaming_task

Node = tuple[str, str, tuple[str, ...]]


def graph_of(weights: Path) -> tuple[list[Node], int, Tensor]:
    """Return the operations that `torch.compile` captures for one frame of a weights file's model, its number
    of parameters and its boxes."""
    state, config, _ = read_weights(weights)
    model = build_stream_petr(config)
    load_into(model, state, "test")
    model.eval().requires_grad_(False)
    frame, found = make_frame(config, 0), []

    def capture(graph: fx.GraphModule, _inputs: list[Any]) -> Any:
        found.extend(
            (node.op, str(node.target), tuple(argument.name for argument in node.all_input_nodes))
            for node in graph.graph.nodes
        )
        return graph

    def step(images: Tensor, intrinsics: Tensor, poses: Tensor, memory: Memory) -> Tensor:
        rig = CameraRig(intrinsics, poses, frame.rig.mask)
        inputs = Frame(images, rig, frame.global_from_ego, frame.time, frame.is_first)
        return decode(model(inputs, memory)[0]).boxes

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=capture)
    with torch.no_grad():
        boxes = compiled(frame.images, frame.rig.intrinsics, frame.rig.ego_from_camera, model.start_memory())
    return found, sum(p.numel() for p in model.parameters()), boxes


@pytest.mark.timeout(600)
def test_distilled_student_has_the_graph_of_a_plain_one(tmp_path: Path) -> None:
    graphs = {}
    for method in ("ftkd", ""):
        trainer = make_trainer(tmp_path / f"with{method}", streaming_task(method), 2)
        for step in range(2):
            item = paired_data()[step]
            trainer.train_step(item if method else item[0])
        trainer.save()
        graphs[method] = graph_of(trainer.out / "weights.safetensors")
    (distilled, count, boxes), (plain, plain_count, plain_boxes) = graphs["ftkd"], graphs[""]
    assert len(distilled) > 300 and distilled == plain
    assert count == plain_count
    assert not torch.equal(boxes, plain_boxes)  # the two students differ
