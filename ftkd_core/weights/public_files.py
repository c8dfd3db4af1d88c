# SPDX-License-Identifier: Apache-2.0
"""Public checkpoints to start from: their addresses, sizes and hashes."""

from dataclasses import dataclass
from typing import Final

_OPENMMLAB: Final = "https://download.openmmlab.com/mmdetection3d/v0.1.0_models/nuimages_semseg"
_STREAM_PETR: Final = "https://github.com/exiawsh/storage/releases/download/v1.0"
_TORCHVISION: Final = "https://download.pytorch.org/models"
_DRIVE: Final = "https://drive.google.com/file/d"
_IN_NAME: Final = "first eight digits, in the file name"
_OTHERS: Final = "stated by {} that use the file, not by its publisher"


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A public checkpoint: description, address, name of the file; size in bytes, None if unknown; sha256,
    all 64 digits or the first of them, empty if unknown, and the source of the digits; whether the address
    gives the file itself, or a page for a browser."""

    what: str
    url: str
    file: str
    size: int | None = None
    sha256: str = ""
    hash_source: str = "unknown"
    direct: bool = True


def _direct(what: str, folder: str, file: str, **known: object) -> PublicFile:
    return PublicFile(what=what, url=f"{folder}/{file}", file=file, **known)  # type: ignore[arg-type]


PUBLIC_FILES: Final[dict[str, PublicFile]] = {
    "nuimages_r50": _direct(
        "2-D detector of nuImages with ResNet-50: backbone of the R50 recipes",
        f"{_OPENMMLAB}/cascade_mask_rcnn_r50_fpn_coco-20e_20e_nuim",
        "cascade_mask_rcnn_r50_fpn_coco-20e_20e_nuim_20201009_124951-40963960.pth",
        sha256="40963960", hash_source=_IN_NAME,
    ),
    "nuimages_r101": _direct(
        "2-D detector of nuImages with ResNet-101: backbone of the R101 recipes",
        f"{_OPENMMLAB}/cascade_mask_rcnn_r101_fpn_1x_nuim",
        "cascade_mask_rcnn_r101_fpn_1x_nuim_20201024_134804-45215b1e.pth",
        sha256="45215b1e", hash_source=_IN_NAME,
    ),
    "imagenet_r50": _direct(
        "torchvision's ResNet-50 of ImageNet: backbone of stream_petr_r50_900q",
        _TORCHVISION, "resnet50-0676ba61.pth", size=102_530_333,
        sha256="0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
        hash_source="eight digits in the file name, all of them " + _OTHERS.format("several public projects"),
    ),
    "imagenet_r101": _direct(
        "torchvision's ResNet-101 of ImageNet",
        _TORCHVISION, "resnet101-63fe2227.pth",
        sha256="63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a",
        hash_source="eight digits in the file name, all of them " + _OTHERS.format("a public project"),
    ),
    "stream_petr_r50_428q": _direct(
        "StreamPETR R50, 428 queries, NDS 54.6",
        _STREAM_PETR, "stream_petr_r50_flash_704_bs2_seq_428q_nui_60e.pth",
        sha256="72900a1c9bfbbd65dd52165b46e2de4931d5a4a7a04e58bf68a9add80cdd2c5f",
        hash_source=_OTHERS.format("a public project"),
    ),
    "stream_petr_r50_900q": _direct(
        "StreamPETR R50, 900 queries, NDS 53.7",
        _STREAM_PETR, "stream_petr_r50_flash_704_bs2_seq_90e.pth",
        sha256="e6323ae5c31adf1eedd46d6dd4fd3c73d95aa26f18cc8aa23c196494b7de3451",
        hash_source=_OTHERS.format("several public projects"),
    ),
    "sparse_bev_r50": PublicFile(
        what="SparseBEV R50, 900 queries, NDS 55.6", file="r50_nuimg_704x256.pth", direct=False,
        url=f"{_DRIVE}/1ft34-pxLpHGo2Aw-jowEtCxyXcqszHNn/view",
    ),
    "sparse_bev_r50_400q": PublicFile(
        what="SparseBEV R50, 400 queries, NDS 55.8", file="r50_nuimg_704x256_400q_36ep.pth", direct=False,
        url=f"{_DRIVE}/1C_Vn3iiSnSW1Dw1r0DkjJMwvHC5Y3zTN/view",
    ),
    "sparse_bev_r101": PublicFile(
        what="SparseBEV R101, 1408x512, NDS 59.2", file="r101_nuimg_1408x512.pth", direct=False,
        url=f"{_DRIVE}/1dKu5cR1fuo-O0ynyBh-RCPtHrgut29mN/view",
    ),
}  # fmt: skip
"""Addresses: the README files of exiawsh/StreamPETR and MCG-NJU/SparseBEV, and torchvision."""


def table() -> str:
    """Return the files as a Markdown table."""
    lines = ["| name | what | size | SHA-256 | address |", "|---|---|---|---|---|"]
    for name, public in PUBLIC_FILES.items():
        size = "unknown" if public.size is None else f"{public.size / 1e6:.1f} MB"
        digits = f"`{public.sha256}` ({public.hash_source})" if public.sha256 else "unknown"
        lines.append(f"| {name} | {public.what} | {size} | {digits} | {public.url} |")
    return "\n".join(lines)
