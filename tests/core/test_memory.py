# SPDX-License-Identifier: Apache-2.0
"""The streaming memory: initial state, updates at intervals, and linking of image anchors to it."""

import numpy as np
import pytest
import torch

from ftkd_core.errors import UserError
from ftkd_core.geometry import yaw_transform
from ftkd_core.models.anchored_stream_petr import AnchoredStreamPETR
from ftkd_core.models.anchors import Anchors
from ftkd_core.models.dense_head import ImageProposals
from ftkd_core.models.memory import align_memory, keep_interval
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import Frame
from tests.core.helpers import drive, make_frame, small_config, small_model, stream


def test_a_stream_starts_with_the_pseudo_points_only() -> None:
    model = small_model()
    memory = model.start_memory(1)
    with torch.no_grad():
        for frame in drive(model.config, 3, seed=50):
            _, memory = model(frame, memory)
    assert all(value.any() for value in memory)  # memory of another stream
    frame = make_frame(model.config, 0, time=7.0, pose=yaw_transform(0.4, (9.0, -3.0, 0.0)))
    points = model.points_in_metres(model.pseudo_points)
    past = align_memory(memory, frame, points)
    assert torch.equal(past.centers_ego[0, :6], points)
    assert torch.equal(past.ego_from_past[0, :6], torch.eye(4).expand(6, 4, 4))
    assert not past.centers_ego[0, 6:].any() and not past.ego_from_past[0, 6:].any()
    others = (past.embedding, past.velocity_ego, past.shape_ego, past.logits, past.age)
    assert not any(value.any() for value in others)


def test_the_memory_is_detached_and_has_a_fixed_shape() -> None:
    model = small_model().train()
    memory = model.start_memory(1)
    shapes = [value.shape for value in memory]
    for frame in drive(model.config, 3):
        _, memory = model(frame, memory)
        assert [value.shape for value in memory] == shapes
        assert not any(value.requires_grad for value in memory)
    assert np.allclose(memory.time[0, ::6].numpy(), [1.0, 0.5, 0.0])


def test_image_anchors_start_with_the_velocity_that_links_them_to_the_memory() -> None:
    """A car at 10 m/s over ground in the memory of a vehicle at 4 m/s."""
    model = small_model("decoder.memory_length=19")  # three frames of six slots, and one extra slot
    frame = drive(model.config, 1)[0]._replace(
        is_first=torch.tensor([False]), time=torch.tensor([1.5], dtype=torch.float64)
    )
    poses = [yaw_transform(0.0, (4.0 * time, 0.0, 0.0)) for time in (1.0, 0.5, 0.0, -0.5)]
    memory = model.start_memory(1)
    for frame_number, time in enumerate((1.0, 0.5, 0.0)):
        slots = slice(6 * frame_number, 6 * frame_number + 6)
        memory.centers_global[0, slots] = torch.tensor([40.0, -30.0, 0.0]).double()  # slots without evidence
        memory.centers_global[0, slots.start] = torch.tensor([20.0 + 10 * time, 0.0, 0.0]).double()
        memory.logits[0, slots.start, 0] = 8.0
        memory.time[0, slots] = time
        memory.global_from_ego[0, slots] = torch.from_numpy(poses[frame_number])
    frame = frame._replace(global_from_ego=torch.from_numpy(yaw_transform(0.0, (6.0, 0.0, 0.0)))[None])
    past = align_memory(memory, frame, model.points_in_metres(model.pseudo_points))
    seen = Anchors(torch.zeros(1, 2, 10), torch.full((1, 2, 10), -9.0))
    seen.codes[0, 0, 0], seen.codes[0, 1, 0] = 29.0, -20.0  # x = 35 m in global; the second has no match
    seen.logits[0, :, 0] = 2.0
    proposals = ImageProposals(seen, torch.zeros(1, 2, model.config.backbone.neck_channels))
    assert isinstance(model, AnchoredStreamPETR)
    linked = model.link(proposals, past).anchors
    assert linked.codes[0, 0, 8:].tolist() == pytest.approx([10.0, 0.0], abs=1.5)  # reduced by the prior
    assert torch.allclose(linked.codes[0, 1], seen.codes[0, 1], atol=1e-6)
    start = align_memory(memory, frame._replace(is_first=torch.tensor([True])), model.pseudo_points * 0)
    # The memory of a new stream contains no boxes.
    assert torch.allclose(model.link(proposals, start).anchors.codes, seen.codes, atol=1e-6)


def at_times(model: StreamPETR, times: list[float], *, first: bool = True) -> list[Frame]:
    """Return frames at these times of a vehicle at 2 m/s."""
    frames = []
    for index, time in enumerate(times):
        frame = drive(model.config, 1)[0]
        generator = torch.Generator().manual_seed(int(1000 * time))
        frames.append(
            frame._replace(
                images=torch.randn(frame.images.shape, generator=generator),
                global_from_ego=torch.from_numpy(yaw_transform(0.0, (2.0 * time, 0.0, 0.0)))[None],
                time=torch.tensor([time], dtype=torch.float64),
                is_first=torch.tensor([first and index == 0]),
            )
        )
    return frames


def test_frames_within_the_memory_interval_leave_the_memory_unchanged() -> None:
    """Predictions for key frames in a 12 Hz stream equal those in a stream of key frames."""
    model = small_model("decoder.memory_interval_s=0.45")
    key_times = [0.0, 0.5, 1.0, 1.5]
    times = sorted({*key_times, *(round(t / 12, 3) for t in range(18))})
    key = dict(zip(key_times, stream(model, at_times(model, key_times)), strict=True))
    whole = dict(zip(times, stream(model, at_times(model, times)), strict=True))
    for time in key_times:
        assert torch.equal(whole[time].codes, key[time].codes)
    every = small_model("decoder.memory_interval_s=0")
    other = dict(zip(times, stream(every, at_times(every, times)), strict=True))
    assert not torch.allclose(other[1.5].codes, key[1.5].codes, atol=1e-3)
    alone = stream(model, at_times(model, [times[1]]))[0]  # frames in between use the memory too
    assert not torch.allclose(whole[times[1]].logits, alone.logits, atol=1e-3)


def test_the_memory_interval_is_checked_per_stream_of_a_batch() -> None:
    """Due, not due, start of a stream, and time that jumps back."""
    before = small_model().start_memory(4)._replace(time=torch.full((4, 18), 10.0).double())
    after = before._replace(embedding=before.embedding + 1, time=before.time + 1)
    frame = drive(small_config(), 1)[0]._replace(
        time=torch.tensor([10.5, 10.1, 10.1, 9.0]).double(),
        is_first=torch.tensor([False, False, True, False]),
    )
    kept = keep_interval(before, after, frame, 0.4)
    assert kept.embedding.flatten(1)[:, 0].tolist() == [1, 0, 1, 1]
    assert kept.time[:, 0].tolist() == [11, 10, 11, 11]
    with pytest.raises(UserError, match="memory_interval_s is -1"):
        small_config("decoder.memory_interval_s=-1")
