# SPDX-License-Identifier: Apache-2.0
"""Public checkpoints as they come: wrapped, prefixed, in half precision, with objects beside the weights."""

import re
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ftkd_core.errors import UserError
from ftkd_core.weights import read_backbone, read_weights
from ftkd_core.weights.importing import import_weights, plan_import
from ftkd_ros.cli import main
from tests.core.public_shapes import HEAD, PUBLIC, public_state

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """The tensors of a ResNet-18 of torchvision."""
    return public_state(PUBLIC["torchvision_resnet18"]())


def imported(content: Any, tmp_path: Path, **options: Any) -> State:
    """Save a checkpoint, import it and return the imported tensors."""
    torch.save(content, tmp_path / "public.pth", **options)
    import_weights(plan_import(tmp_path / "public.pth"), tmp_path / "ours.safetensors")
    return read_backbone(tmp_path / "ours.safetensors")[0]


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {"state_dict": {prefix + name: value for name, value in state.items()}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"ema": s, "updates": 100},
        lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}},
        lambda s: {"ema": {"module": s, "decay": 0.9}},
        lambda s: {"model": {"state_dict": OrderedDict(s)}},
        lambda s: {"ema_state_dict": {"steps": torch.tensor(5), **{f"module.{k}": v for k, v in s.items()}}},
        prefixed("module."),
        prefixed("ema_"),
        prefixed("module.ema_model."),
        prefixed("_orig_mod.module."),
        lambda s: {"state_dict": {**s, **{f"ema_{k.replace('.', '_')}": v + 1 for k, v in s.items()}}},
    ],
    ids=[
        "plain", "state_dict", "model", "ema", "model_state_dict", "ema.module", "model.state_dict",
        "ema with steps", "module.", "ema_", "module.ema_model.", "_orig_mod.module.", "averages beside",
    ],
)  # fmt: skip
def test_wrapped_and_prefixed_states_are_found(
    wrap: Callable[[State], Any], state: State, tmp_path: Path
) -> None:
    found = imported(wrap(state), tmp_path)
    assert len(found) > 60
    for name, value in found.items():
        assert torch.equal(value, state[name].to(value.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_rounded_ranges_is_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    public = public_state(PUBLIC["stream_petr_r50_428q"]())
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in public.items()}
    assert not torch.equal(half[f"{HEAD}position_range"].float(), public[f"{HEAD}position_range"])
    torch.save({"state_dict": half}, tmp_path / "half.pth")
    import_weights(plan_import(tmp_path / "half.pth"), tmp_path / "ours.safetensors")
    found, _, _ = read_weights(tmp_path / "ours.safetensors")
    assert all(value.dtype == torch.float32 for value in found.values() if value.is_floating_point())
    half[f"{HEAD}pc_range"] = half[f"{HEAD}pc_range"] * 1.1
    torch.save({"state_dict": half}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="unexpected values .*pc_range"):
        plan_import(tmp_path / "other.pth").check()


@pytest.fixture
def history() -> Iterator[type]:
    """A class that is called as that of mmengine while a file is written, and is absent when it is read."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(5, dtype=np.float64)
            self._count_history = np.ones(5, dtype=np.int64)
            self._method = self.mean

        def mean(self) -> float:
            return 0.0

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    names = ("mmengine", "mmengine.logging", module.__name__)
    sys.modules |= {name: types.ModuleType(name) for name in names[:2]} | {names[2]: module}
    yield HistoryBuffer
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_values_and_histories_beside_the_weights_are_read(
    zipped: bool, history: type, state: State, tmp_path: Path
) -> None:
    content = {
        "state_dict": state,
        "meta": {"epoch": np.int64(3), "loss": np.float32(0.5), "time": np.array([1.0, 2.0])},
        "message_hub": {"log_scalars": OrderedDict(loss=history()), "runtime_info": {"iter": np.int32(7)}},
    }
    torch.save(content, tmp_path / "public.pth", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine"]:
        sys.modules.pop(name)
    import_weights(plan_import(tmp_path / "public.pth"), tmp_path / "ours.safetensors")
    found = read_backbone(tmp_path / "ours.safetensors")[0]
    assert torch.equal(found["conv1.weight"], state["conv1.weight"])


def test_weights_with_nan_are_named(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {name: value.clone() for name, value in state.items()}
    bad["layer1.0.conv1.weight"][0, 0] = float("nan")
    bad["bn1.bias"][3] = float("inf")
    torch.save(bad, tmp_path / "bad.pth")
    arguments = ["import-weights", str(tmp_path / "bad.pth"), "--output", str(tmp_path / "ours.safetensors")]
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "2 tensors are not finite (bn1.bias (1 of 64 values), layer1.0.conv1.weight (9 of 36864" in text
    assert not (tmp_path / "ours.safetensors").exists()


class Suspicious:
    """An object of a package that nobody knows."""

    def __init__(self) -> None:
        self.value = 1


def test_advice_for_other_objects_works_on_this_torch(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice is followed with the installed torch, and the result is imported."""
    torch.save({"state_dict": state, "extra": Suspicious()}, tmp_path / "public.pth")
    arguments = ["--output", str(tmp_path / "ours.safetensors")]
    assert main(["import-weights", str(tmp_path / "public.pth"), *arguments]) == 2
    text = capsys.readouterr().err
    assert "Suspicious would run code" in text
    (code,) = re.findall(r"(import torch; .*)$", text.strip())
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2])
    assert main(["import-weights", str(tmp_path / "public_tensors.pth"), *arguments]) == 0


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "torch.hub.load"]
)
def test_names_that_run_code_are_never_allowed(name: str) -> None:
    from ftkd_core.weights.importing.safe_globals import safe_global

    assert safe_global(name) is None
