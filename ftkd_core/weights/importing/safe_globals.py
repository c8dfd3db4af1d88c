# SPDX-License-Identifier: Apache-2.0
"""Allow-list of the names that public checkpoints contain beside tensors, for `torch.load(weights_only)`.

numpy numbers and arrays are created by numpy; objects of training frameworks become `Inert`, which stores
nothing and runs nothing. Any other name is refused.
"""

import re
from typing import Any, Final

import numpy as np

try:
    from numpy._core import multiarray  # numpy 2
except ImportError:
    from numpy.core import multiarray  # type: ignore[no-redef]

_FRAMEWORKS: Final = re.compile(
    r"(mmengine|mmcv|mmdet|mmdet3d|mmcls|mmpretrain|pytorch_lightning|lightning)\.[\w.]+"
)
_MULTIARRAY: Final = re.compile(r"numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)")
_NUMPY: Final = {"numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray}


def numpy_types() -> dict[str, Any]:
    """Return the types of numpy numbers, whose state torch sets; without objects."""
    names = [name for name in dir(np.dtypes) if name.endswith("DType") and name != "ObjectDType"]
    return {f"numpy.dtypes.{name}": getattr(np.dtypes, name) for name in names}


class Inert:
    """Stands for an object of another package; takes any arguments and state and ignores them."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def safe_global(name: str) -> Any | None:
    """Return the object that stands for a name such as `numpy.dtype` in a file; None if it is not allowed."""
    if _FRAMEWORKS.fullmatch(name):
        return Inert
    if name == "getattr":
        return _no_attribute
    if match := _MULTIARRAY.fullmatch(name):
        return getattr(multiarray, match[2])
    return _encode if name == "_codecs.encode" else _NUMPY.get(name)


def _no_attribute(*arguments: Any) -> Inert:
    """Stand for `getattr`, with which frameworks name the methods of a history."""
    return Inert()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand for `_codecs.encode`, with which Python 2 protocols store bytes."""
    return str(text).encode("latin1")
