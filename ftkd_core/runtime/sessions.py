# SPDX-License-Identifier: Apache-2.0
"""Exported graphs in ONNX Runtime (TensorRT, CUDA or CPU) and in OpenVINO (CPU).

threads: 0 leaves their number to the library. On a vehicle other processes need the cores too, so ONNX
Runtime's threads sleep while they wait instead of spinning."""

import ctypes
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.runtime.export import METADATA_KEY, require_packages
from ftkd_core.runtime.exported_engine import Arrays

PROVIDERS: Final = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
"""ONNX Runtime's, in the order in which they are tried on a GPU; on a CPU only the last."""
_REFUSED_OPERATOR: Final = ("NOT_IMPLEMENTED", "is not a registered function/op", "No conversion rule")
_log = logging.getLogger(__name__)


class OnnxSession:
    """A graph in ONNX Runtime, on the best provider that runs all of its operators.

    A provider that refuses the graph is replaced by the next one, with a warning that holds its reason, which
    names the operator. Errors: UserError if onnxruntime is not installed, the file cannot be read, or no
    provider runs the graph.
    """

    def __init__(self, path: Path, device: torch.device, threads: int = 0) -> None:
        require_packages(("onnxruntime",), "onnx", "runtime onnx")
        import onnxruntime

        providers = providers_for(device, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        while True:
            try:
                self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
                break
            except Exception as error:  # the library raises many types of its own, without a common base
                if len(providers) == 1 or _is_unreadable(error):
                    raise _refused(path, error) from None
                refusing, *providers = providers
                _log.warning("%s: %s refuses it (%s)", path.name, refusing, _reason(error))
        used = self._session.get_providers()
        if used[0] != providers[0]:
            _log.warning("%s: %s could not be used; using %s", path.name, providers[0], used[0])
        self.notes = read_notes(self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), path)
        self.shapes = {value.name: tuple(value.shape) for value in self._session.get_inputs()}

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """See `Session`."""
        found: list[NDArray[Any]] = self._session.run(list(outputs), dict(inputs))
        return found


class OpenVinoSession:
    """A graph in OpenVINO, on the CPU in float32. Errors: as `OnnxSession`."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        require_packages(("openvino",), "openvino", "runtime openvino")
        core = _openvino_core()
        model = _open(path, lambda: core.read_model(str(path)))
        text = model.get_rt_info(["framework", METADATA_KEY]).astype(str) if _has_notes(model) else None
        self.notes = read_notes(text, path)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        compiled = _open(path, lambda: core.compile_model(model, "CPU", settings))
        self._request = compiled.create_infer_request()
        # One tensor may have several names; an output may share its tensor with an inner value.
        self._inputs = {name: index for index, port in enumerate(compiled.inputs) for name in port.names}
        self._outputs = {name: index for index, port in enumerate(compiled.outputs) for name in port.names}
        self.shapes = {name: tuple(compiled.inputs[index].shape) for name, index in self._inputs.items()}

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """See `Session`."""
        given = {self._inputs[name]: value for name, value in inputs.items()}
        self._request.infer(given, share_inputs=True)
        return [
            np.array(self._request.get_output_tensor(self._outputs[name]).data) for name in outputs
        ]  # copies: the request's own buffers are overwritten by the next round


@lru_cache(maxsize=1)
def _openvino_core() -> Any:
    """Return the OpenVINO of this process, which is never destroyed.

    Its CPU plugin gives the thread that creates it a stack for signal handlers, and afterwards the earlier
    stack again. If two plugins end in the order of their creation, the thread is left with the freed stack of
    the first (OpenVINO 2026.4), and the next signal, Ctrl-C or the end of a child process, kills the process
    with a segmentation fault.
    """
    import openvino

    core = openvino.Core()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))  # also not when the interpreter ends
    return core


def _has_notes(model: Any) -> bool:
    return bool(model.has_rt_info(["framework", METADATA_KEY]))


def providers_for(device: torch.device, available: Sequence[str]) -> list[str]:
    """The execution providers to try on a device, best first. UserError if a GPU is asked for and this
    onnxruntime has no provider for one."""
    if device.type != "cuda":
        return [PROVIDERS[-1]]
    found = [name for name in PROVIDERS if name in available]
    if found == [PROVIDERS[-1]]:
        raise UserError(
            f"runtime onnx on {device}: this onnxruntime has only {', '.join(available)}; install "
            "onnxruntime-gpu, or use device cpu"
        )
    return found


def _open(path: Path, work: Any) -> Any:
    try:
        return work()
    except Exception as error:  # the library raises many types of its own, without a common base
        raise _refused(path, error) from None


def _refused(path: Path, error: Exception) -> UserError:
    """Return the error for a file that a library cannot read, or whose operators it does not have."""
    reason = _reason(error)
    if any(text in str(error) for text in _REFUSED_OPERATOR):
        return UserError(
            f"{str(path)!r} has an operator that this version of the library does not run: {reason}; use "
            "runtime fast or plain, or another version"
        )
    return UserError(f"cannot read {str(path)!r}: {reason}; export it again")


def _is_unreadable(error: Exception) -> bool:
    """Whether the file itself is at fault, for ONNX Runtime."""
    return type(error).__name__ in ("InvalidProtobuf", "NoSuchFile", "InvalidGraph")


def _reason(error: Exception) -> str:
    """Return the last line of an error's text, in which both libraries name the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def read_notes(text: str | None, path: Path) -> dict[str, Any]:
    """The metadata of an exported file. UserError if it was not written by `ftkd export`."""
    if text is None:
        raise UserError(f"{str(path)!r} was not written by ftkd export; expected its metadata")
    notes: dict[str, Any] = json.loads(text)
    return notes
