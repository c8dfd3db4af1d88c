# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a detector, and how it is made.

`auto` takes the fastest engine that is proven on the device: on a CPU OpenVINO, if it is installed, then ONNX
Runtime, then our own fast engine (`python -m benchmarks.engines`); on a GPU our fast engine, if it
passes its self-check there, else the plain one. Engines of exported graphs need a file: one that was exported
before, or one that is exported now and cached.
"""

import hashlib
import logging
import platform
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import torch

from ftkd_core.errors import UserError
from ftkd_core.models.build import StreamingModel
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime import RUNTIMES
from ftkd_core.runtime.engines import Engine, PlainEngine, WindowEngine
from ftkd_core.runtime.export import ONNX_PACKAGES, require_packages
from ftkd_core.runtime.export_cache import cache_folder, cached_export, discard
from ftkd_core.runtime.exported_engine import ExportedEngine, OpenSession
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.self_check import Verdict, check_engine, remembered, self_check_key
from ftkd_core.runtime.sessions import OnnxSession, OpenVinoSession

EXPORTED: Final = {"openvino": "openvino", "onnx": "onnxruntime"}
"""Engines of exported graphs, fastest first, and the package that each needs."""
_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The name of an engine, and the reason for it in words."""

    name: str
    reason: str


def choose_runtime(
    runtime: str, device: torch.device, *, exported: bool = False, own: str = "fast"
) -> Choice:
    """The engine to try first. exported: an exported file is at hand, so that none has to be written. own:
    the engine to take if no library for exported graphs is installed, see `own_engine`.

    Errors: UserError for an unknown name.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"runtime {runtime!r}: expected one of {', '.join(RUNTIMES)}")
    if runtime != "auto":
        return Choice(runtime, "requested")
    if device.type == "cuda":
        return Choice(own, "fastest measured on a GPU" if own == "fast" else "our only engine of this model")
    exporter = exported or all(find_spec(name) is not None for name in ONNX_PACKAGES)
    for name, package in EXPORTED.items():
        if find_spec(package) is not None and exporter:
            return Choice(name, f"{package} is installed: fastest measured on a CPU")
    return Choice(own, "neither openvino nor onnxruntime with onnx and onnxscript is installed")


def own_engine(model: StreamingModel) -> str:
    """Our fastest engine of a model; the fast engine runs a StreamPETR only."""
    return "plain" if isinstance(model, SparseBEV) else "fast"


class EngineOptions(NamedTuple):
    """What engines are made with: see `Detector`."""

    max_detections: int
    weights_hash: str = ""
    exported: Path | None = None
    threads: int = 0


def select_engine(
    runtime: str, model: StreamingModel, device: torch.device, options: EngineOptions
) -> tuple[Engine, Choice]:
    """The engine of a runtime and the reason for it.

    `auto` replaces an engine that cannot be made or does not pass its self-check, with a warning. Errors:
    UserError if the requested engine cannot be made.
    """
    own = own_engine(model)
    choice = choose_runtime(runtime, device, exported=options.exported is not None, own=own)
    if runtime != "auto":
        return make_engine(choice.name, model, device, options), choice
    if device.type == "cuda" and isinstance(model, StreamPETR):
        verdict = _self_check(model, device, options)
        choice = Choice("fast" if verdict.passed else "plain", verdict.reason)
        return make_engine(choice.name, model, device, options), choice
    try:
        return make_engine(choice.name, model, device, options), choice
    except Exception as error:  # exporters and other libraries raise anything; our engines need neither
        reason = f"{choice.name} could not be used: {str(error).splitlines()[0] if str(error) else error!r}"
        _log.warning("%s; using the %s engine", reason, own)
        return make_engine(own, model, device, options), Choice(own, reason)


def _self_check(model: StreamPETR, device: torch.device, options: EngineOptions) -> Verdict:
    """The cached verdict on the fast engine for this GPU, torch and weights."""
    key = self_check_key(device, options.weights_hash or state_hash(model))
    fast, plain = (partial(make_engine, name, model, device, options) for name in ("fast", "plain"))
    return remembered(cache_folder() / "self_checks.json", key, lambda: check_engine(fast, plain(), model))


def make_engine(name: str, model: StreamingModel, device: torch.device, options: EngineOptions) -> Engine:
    """The engine of that name; without an exported file, engines that need one export the model into the
    cache. Errors: UserError as the engines raise."""
    max_detections, weights_hash, exported, threads = options
    if isinstance(model, SparseBEV):
        if name == "fast":
            raise UserError("runtime fast runs a StreamPETR only; use auto, plain, onnx or openvino")
        if name == "plain":
            return WindowEngine(model, device, max_detections)
    elif name in ("plain", "fast"):
        return (PlainEngine if name == "plain" else FastEngine)(model, device, max_detections)
    if name == "openvino":
        if device.type != "cpu":
            raise UserError(f"runtime openvino on {device}: it runs on a CPU only; give device cpu")
        require_packages(("openvino",), "openvino", "runtime openvino")
        open_session: OpenSession = partial(OpenVinoSession, threads=threads)
    else:
        require_packages(("onnxruntime",), "onnx", "runtime onnx")
        open_session = partial(OnnxSession, device=device, threads=threads)
    if exported is not None:
        return ExportedEngine(exported, model.config, open_session, weights_hash=weights_hash)
    return _engine_of_cache(model, weights_hash or state_hash(model), max_detections, open_session)


def _engine_of_cache(
    model: StreamingModel, weights_hash: str, max_detections: int, open_session: OpenSession
) -> ExportedEngine:
    """The engine of the cached export. A file that cannot be read is written again, once."""
    path = cached_export(model, weights_hash, max_detections)
    try:
        return ExportedEngine(path, model.config, open_session)
    except UserError as error:
        _log.warning("%s (a cached file)", error)
        discard(path)
        path = cached_export(model, weights_hash, max_detections)
        return ExportedEngine(path, model.config, open_session)


def state_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    digest = hashlib.sha256(platform.machine().encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
