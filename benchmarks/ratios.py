# SPDX-License-Identifier: Apache-2.0
"""Ratios of the detector's engines, and a comparison with committed ones.

    make bench            # benchmarks.run, then these ratios
    make bench-compare    # exit code 1 if a ratio is worse than the committed one beyond noise
    python -m benchmarks.ratios --json benchmarks/results/ratios_cpu.json

A ratio compares two engines on the same rounds, interleaved in one process, so it depends less on the machine
and its load than a time does. Higher is better. Each is measured in several passes: the value is their
median, the noise is half of the range of the middle half of the passes, divided by the median. A ratio is
worse beyond noise if it lies below the committed one by more than 10 % and by more than three times the noise
of both. Ratios of another device class are not compared.

Exit codes: 0 no ratio is worse, 1 a ratio is worse, 2 bad input, no figures for this device class, or too
much noise to compare.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.engines import make_detectors
from benchmarks.report import environment, rounded, write_figures
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import (
    driving_rounds,
    load_preset_model,
    network_rig,
    time_detectors,
)
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.devices import processor_name
from ftkd_core.runtime.export import export_onnx

COMMITTED: Final = Path(__file__).parent / "results" / "ratios_cpu.json"
_CPU: Final = torch.device("cpu")
_ROUNDS: Final = 4
_LEAST_LOSS: Final = 0.1
_NOISE_FACTOR: Final = 3.0
_MOST_NOISE: Final = 0.25


class Ratio(NamedTuple):
    """A ratio with its noise, a share of the value."""

    value: float
    noise: float


def summarize_passes(values: Sequence[float]) -> Ratio:
    """Return median and noise of the values of several passes."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Ratio(float(median), float((high - low) / 2 / median))


def device_class() -> str:
    """Describe the processor: figures of different classes are not comparable."""
    return f"{processor_name()}, {os.cpu_count()} cores"


def measure(presets: Sequence[str], threads: int, repeats: int, passes: int) -> dict[str, Ratio]:
    """Return the ratios of all engines to the plain one, and of the exported ones to the fast one."""
    torch.set_num_threads(threads)
    ratios: dict[str, Ratio] = {}
    for preset in presets:
        medians = _medians(preset, threads, repeats, passes)
        for engine in ("fast", "onnx", "openvino"):
            pairs = zip(medians["plain"], medians[engine], strict=True)
            ratios[f"{preset}: plain / {engine}"] = summarize_passes([a / b for a, b in pairs])
        for engine in ("onnx", "openvino"):
            pairs = zip(medians["fast"], medians[engine], strict=True)
            ratios[f"{preset}: fast / {engine}"] = summarize_passes([a / b for a, b in pairs])
    return ratios


def _medians(preset: str, threads: int, repeats: int, passes: int) -> dict[str, list[float]]:
    """Return the median milliseconds of each engine per pass."""
    model, _ = load_preset_model(preset)
    rounds = driving_rounds(_ROUNDS, network_rig(model))
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model.onnx"
        export_onnx(model, exported, weights_hash="")
        plain = Detector(model, weights_name="", device=_CPU, score_threshold=0.0, runtime="plain")
        detectors = {"plain": plain, **make_detectors(model, exported, threads)}
        found: dict[str, list[float]] = {name: [] for name in detectors}
        for number in tqdm(range(passes), desc=preset, unit="pass"):
            warm_up = 2 if number == 0 else 0
            times = time_detectors(list(detectors.values()), rounds, repeats=repeats, warm_up=warm_up)
            for name, each in zip(detectors, times, strict=True):
                found[name].append(each.wall.p50 or 0.0)
    return found


def table(ratios: Mapping[str, Ratio], committed: Mapping[str, Ratio] | None = None) -> str:
    """Return the ratios as Markdown, next to the committed ones if they are given."""
    lines = ["| ratio | value | noise |" + ("" if committed is None else " committed |")]
    lines.append("|---" * (3 if committed is None else 4) + "|")
    for name, ratio in ratios.items():
        line = f"| {name} | {ratio.value:.2f} | {ratio.noise:.0%} |"
        if committed is not None:
            line += f" {committed[name].value:.2f} |" if name in committed else " |"
        lines.append(line)
    return "\n".join(lines)


def losses(ratios: Mapping[str, Ratio], committed: Mapping[str, Ratio]) -> list[str]:
    """Return a sentence for each ratio that is worse than the committed one beyond noise."""
    found = []
    for name, before in committed.items():
        now = ratios.get(name)
        if now is None:
            continue
        allowed = max(_LEAST_LOSS, _NOISE_FACTOR * (now.noise + before.noise))
        if now.value < before.value * (1 - allowed):
            found.append(f"{name}: {now.value:.2f}, committed {before.value:.2f} (allowed: -{allowed:.0%})")
    return found


def read_committed(path: Path, device: str) -> dict[str, Ratio]:
    """Return the committed ratios of a device class. Errors: UserError if there are none."""
    how = "write them on a quiet machine: python -m benchmarks.ratios --json"
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
        classes = {entry["device_class"]: entry["ratios"] for entry in stored}
        if device not in classes:
            known = "; ".join(sorted(classes)) or "none"
            raise UserError(f"{str(path)!r} has no figures of {device} (only {known}); {how} {path}")
        return {name: Ratio(row["value"], row["noise"]) for name, row in classes[device].items()}
    except FileNotFoundError:
        raise UserError(f"no committed figures {str(path)!r}; {how} {path}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is not a list of ratios ({error!r}); {how} {path}") from None


def store(path: Path, device: str, ratios: Mapping[str, Ratio]) -> None:
    """Write the ratios of a device class; those of other classes in the file stay."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    values = {name: ratio._asdict() for name, ratio in ratios.items()}
    entry = {"device_class": device, "environment": environment(None), "ratios": rounded(values)}
    write_figures(path, [*(e for e in entries if e["device_class"] != device), entry])


def compare(ratios: Mapping[str, Ratio], committed: Mapping[str, Ratio]) -> int:
    """Print the comparison and return the exit code."""
    print(table(ratios, committed))
    worse = losses(ratios, committed)
    for sentence in worse:
        print(f"worse: {sentence}")
    noisy = [name for name, ratio in ratios.items() if ratio.noise > _MOST_NOISE]
    if noisy and not worse:
        print(f"too much noise to compare {', '.join(noisy)}; try again on a quiet machine", file=sys.stderr)
        return 2
    if not worse:
        print("no ratio is worse than the committed one beyond noise")
    return 1 if worse else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ratios",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", default="tiny,r50_704x256_428q", help="comma-separated (default %(default)s)")
    add("--threads", type=int, default=1, help="threads of each engine (default 1)")
    add("--repeats", type=int, default=4, help="timed rounds of each engine per pass (default 4)")
    add("--passes", type=int, default=5, help="passes (default 5)")
    add("--compare", action="store_true", help="compare with the committed ratios")
    add("--committed", type=Path, default=COMMITTED, metavar="FILE", help="the committed ratios")
    add("--json", type=Path, metavar="FILE", help="store the ratios of this device class in this file")
    options = parser.parse_args(argv)
    try:
        if min(options.threads, options.repeats, options.passes) < 1:
            raise UserError("--threads, --repeats and --passes: expected at least 1")
        device = device_class()
        committed = read_committed(options.committed, device) if options.compare else None
        presets = options.presets.split(",")
        ratios = measure(presets, options.threads, options.repeats, options.passes)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        store(options.json, device, ratios)
    if committed is not None:
        return compare(ratios, committed)
    print(f"{device}\n{table(ratios)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
