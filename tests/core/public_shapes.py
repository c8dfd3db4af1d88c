# SPDX-License-Identifier: Apache-2.0
"""Tensor names and shapes of public checkpoints, written by hand; no public file is needed."""

from collections.abc import Callable

import torch
from torch import Tensor

from ftkd_core.weights.importing.resnet import BLOCKS

Shapes = dict[str, tuple[int, ...]]
HEAD = "pts_bbox_head."


def linear(name: str, outputs: int, *inputs: int) -> Shapes:
    """Return the shapes of a layer with weight and bias; of a norm if there are no inputs."""
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def public_resnet(depth: int, prefix: str) -> Shapes:
    """Return the shapes of torchvision's and mmdet's ResNet without classifier."""
    grow = 1 if depth < 50 else 4
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7)} | batch_norm("bn1", 64)
    inputs = 64
    for stage in range(4):
        width = 64 << stage
        for block in range(BLOCKS[depth][stage]):
            name = f"layer{stage + 1}.{block}."
            if depth < 50:
                convs = [(width, inputs, 3, 3), (width, width, 3, 3)]
            else:
                convs = [(width, inputs, 1, 1), (width, width, 3, 3), (grow * width, width, 1, 1)]
            for index, shape in enumerate(convs):
                shapes[f"{name}conv{index + 1}.weight"] = shape
                shapes |= batch_norm(f"{name}bn{index + 1}", shape[0])
            if inputs != grow * width:
                shapes[f"{name}downsample.0.weight"] = (grow * width, inputs, 1, 1)
                shapes |= batch_norm(f"{name}downsample.1", grow * width)
            inputs = grow * width
    return {prefix + name: shape for name, shape in shapes.items()}


def batch_norm(name: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in vectors} | {f"{name}.num_batches_tracked": ()}


def public_attention(name: str) -> Shapes:
    packed: Shapes = {f"{name}.in_proj_weight": (768, 256), f"{name}.in_proj_bias": (768,)}
    return packed | linear(f"{name}.out_proj", 256, 256)


def public_stream_petr(learned: int, propagated: int) -> Shapes:
    shapes = public_resnet(50, "img_backbone.")
    for level, inputs in enumerate((1024, 2048)):
        shapes |= linear(f"img_neck.lateral_convs.{level}.conv", 256, inputs, 1, 1)
    shapes |= linear("img_neck.fpn_convs.0.conv", 256, 256, 3, 3)
    for tower in ("shared_reg", "shared_cls"):
        shapes |= linear(f"img_roi_head.{tower}.0", 256, 256, 3, 3) | linear(f"img_roi_head.{tower}.1", 256)
    for name, outputs in (("cls", 10), ("centerness", 1), ("ltrb", 4), ("center2d", 2)):
        shapes |= linear(f"img_roi_head.{name}", outputs, 256, 1, 1)
    shapes |= {
        HEAD + name: (count,)
        for name, count in (
            ("code_weights", 10),
            ("match_costs", 10),
            ("pc_range", 6),
            ("position_range", 6),
            ("coords_d", 64),
        )
    }
    shapes[f"{HEAD}reference_points.weight"] = (learned, 3)
    shapes[f"{HEAD}pseudo_reference_points.weight"] = (propagated, 3)
    for name, outputs, inputs in (
        ("position_encoder.0", 1024, 192),
        ("position_encoder.2", 256, 1024),
        ("memory_embed.0", 256, 256),
        ("memory_embed.2", 256, 256),
        ("featurized_pe.conv_reduce", 256, 256),
        ("featurized_pe.conv_expand", 256, 256),
        ("query_embedding.0", 256, 384),
        ("query_embedding.2", 256, 256),
        ("time_embedding.0", 256, 256),
    ):
        shapes |= linear(HEAD + name, outputs, inputs)
    shapes |= linear(f"{HEAD}time_embedding.1", 256)
    for name, inputs in (("spatial_alignment", 8), ("ego_pose_pe", 180), ("ego_pose_memory", 180)):
        shapes |= linear(f"{HEAD}{name}.reduce.0", 256, inputs)
        shapes |= linear(f"{HEAD}{name}.gamma", 256, 256) | linear(f"{HEAD}{name}.beta", 256, 256)
    for layer in range(6):
        name = f"{HEAD}transformer.decoder.layers.{layer}."
        shapes |= public_attention(f"{name}attentions.0.attn") | public_attention(f"{name}attentions.1.attn")
        shapes |= linear(f"{name}ffns.0.layers.0.0", 2048, 256) | linear(f"{name}ffns.0.layers.1", 256, 2048)
        for place in range(3):
            shapes |= linear(f"{name}norms.{place}", 256)
        for place, rest in ((0, (256,)), (1, ()), (3, (256,)), (4, ())):
            shapes |= linear(f"{HEAD}cls_branches.{layer}.{place}", 256, *rest)
        shapes |= linear(f"{HEAD}cls_branches.{layer}.6", 10, 256)
        for place, outputs in ((0, 256), (2, 256), (4, 10)):
            shapes |= linear(f"{HEAD}reg_branches.{layer}.{place}", outputs, 256)
    return shapes | linear(f"{HEAD}transformer.decoder.post_norm", 256)


def public_sparse_bev(depth: int, queries: int, levels: int) -> Shapes:
    shapes = public_resnet(depth, "img_backbone.")
    for level, inputs in enumerate((256, 512, 1024, 2048)):
        shapes |= linear(f"img_neck.lateral_convs.{level}.conv", 256, inputs, 1, 1)
        shapes |= linear(f"img_neck.fpn_convs.{level}.conv", 256, 256, 3, 3)
    shapes |= {
        f"{HEAD}code_weights": (10,),
        f"{HEAD}init_query_bbox.weight": (queries, 10),
        f"{HEAD}label_enc.weight": (11, 255),
    }
    name = f"{HEAD}transformer.decoder.decoder_layer."
    shapes |= public_attention(f"{name}self_attn.attention.attn")
    for layer, outputs, inputs in (
        ("position_encoder.0", 256, 3),
        ("position_encoder.3", 256, 256),
        ("self_attn.gen_tau", 8, 256),
        ("sampling.sampling_offset", 48, 256),
        ("sampling.scale_weights", 16 * levels, 256),
        ("mixing.parameter_generator", 4 * (64 * 64 + 128 * 32), 256),
        ("mixing.out_proj", 256, 64 * 128 * 4),
        ("ffn.layers.0.0", 512, 256),
        ("ffn.layers.1", 256, 512),
        ("cls_branch.0", 256, 256),
        ("cls_branch.3", 256, 256),
        ("cls_branch.6", 10, 256),
        ("reg_branch.0", 256, 256),
        ("reg_branch.2", 256, 256),
        ("reg_branch.4", 10, 256),
    ):
        shapes |= linear(name + layer, outputs, inputs)
    for layer in (
        "position_encoder.1",
        "position_encoder.4",
        "norm1",
        "norm2",
        "norm3",
        "cls_branch.1",
        "cls_branch.4",
    ):
        shapes |= linear(name + layer, 256)
    return shapes


PUBLIC: dict[str, Callable[[], Shapes]] = {
    "stream_petr_r50_428q": lambda: public_stream_petr(300, 128),
    "stream_petr_r50_900q": lambda: public_stream_petr(644, 256),
    "sparse_bev_r50": lambda: public_sparse_bev(50, 900, 4),
    "sparse_bev_r50_400q": lambda: public_sparse_bev(50, 400, 4),
    "sparse_bev_r101": lambda: public_sparse_bev(101, 900, 5),
    **{
        f"torchvision_resnet{d}": lambda d=d: (
            public_resnet(d, "") | linear("fc", 1000, 512 if d < 50 else 2048)
        )
        for d in (18, 34, 50, 101)
    },
    **{
        f"mmdet_resnet{d}": lambda d=d: (
            public_resnet(d, "backbone.")
            | linear("neck.lateral_convs.0.conv", 256, 256, 1, 1)
            | linear("rpn_head.rpn_conv", 256, 256, 3, 3)
            | linear("roi_head.bbox_head.0.fc_cls", 11, 1024)
        )
        for d in (50, 101)
    },
}
CONSTANTS = {
    "code_weights": [2.0, 2.0, *[1.0] * 8],
    "match_costs": [2.0, 2.0, *[1.0] * 8],
    "pc_range": [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0],
    "position_range": [-61.2, -61.2, -10.0, 61.2, 61.2, 10.0],
    "coords_d": [1.0 + 60.2 / (64 * 65) * i * (i + 1) for i in range(64)],
}


def public_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors of these shapes, with the constants and shared heads of public files."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        last = name.removeprefix(HEAD)
        if last in CONSTANTS:
            state[name] = torch.tensor(CONSTANTS[last])
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        else:
            state[name] = torch.randn(shape, generator=generator) * 0.05
    for name in state:
        for kind in ("cls_branches", "reg_branches"):
            if name.startswith(f"{HEAD}{kind}."):
                rest = name.removeprefix(f"{HEAD}{kind}.").split(".", 1)[1]
                state[name] = state[f"{HEAD}{kind}.0.{rest}"]
    return state
