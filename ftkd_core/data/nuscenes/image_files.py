# SPDX-License-Identifier: Apache-2.0
"""Image files of a data set: reading, and finding those that are missing or cut off."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError

_ADVICE: Final = "copy this part of the data set again"
_TAIL_BYTES: Final = 4096
_SHOWN: Final = 3


def read_image(path: Path, *, half: bool = False) -> NDArray[np.uint8]:
    """Read an image file as RGB (h, w, 3).

    half: decode at half width and height, rounded up; for a JPEG this takes half the time. Raises UserError
    with the path if the file is missing, cut off or damaged.
    """
    mode = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"image {str(path)!r} is missing; {_ADVICE}") from None
    except OSError as error:
        raise UserError(f"image {str(path)!r} cannot be read ({error.strerror}); {_ADVICE}") from error
    problem = content_problem(content)
    if problem is not None:
        raise UserError(f"image {str(path)!r} {problem}; {_ADVICE}")
    bgr = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), mode)
    if bgr is None:
        raise UserError(f"image {str(path)!r} cannot be decoded; {_ADVICE}")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def content_problem(content: bytes) -> str | None:
    """Return why the content of an image file is unusable; None if it is a complete JPEG or PNG.

    libjpeg fills the missing part of a cut-off JPEG with grey and reports no error. Therefore the end marker
    is required.
    """
    if content.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image"
    if content.startswith(b"\xff\xd8"):
        return None if b"\xff\xd9" in content[-_TAIL_BYTES:] else "is cut off (a JPEG without its end)"
    if content.startswith(b"\x89PNG"):
        return None if b"IEND" in content[-64:] else "is cut off (a PNG without its end)"
    return "is empty" if not content else "is neither JPEG nor PNG"


def find_faults(
    root: Path, paths: Iterable[str | Path], *, existence_only: bool = False, threads: int = 8
) -> dict[str, str]:
    """Return what is wrong by path, of those image files below `root` that are missing or cut off.

    Reads the first and the last bytes of each file, or nothing with `existence_only`.
    """
    names = [str(path) for path in paths]
    with ThreadPoolExecutor(threads) as pool:
        problems = list(pool.map(partial(_file_problem, root, existence_only), names, chunksize=64))
    return {name: problem for name, problem in zip(names, problems, strict=True) if problem is not None}


def faults_text(faults: dict[str, str], total: int) -> str:
    """Return one sentence without a full stop on unusable images: how many, and the first ones by name."""
    shown = ", ".join(f"{name} {problem}" for name, problem in list(faults.items())[:_SHOWN])
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return f"{len(faults)} of {total} images cannot be used: {shown}{more}"


def _file_problem(root: Path, existence_only: bool, name: str) -> str | None:
    try:
        if existence_only:
            return None if (root / name).is_file() else "is missing"
        with (root / name).open("rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(len(head), size - _TAIL_BYTES))
            return content_problem(head + file.read())
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
