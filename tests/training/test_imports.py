# SPDX-License-Identifier: Apache-2.0
"""The training pipeline does not depend on the study."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pipeline_does_not_import_the_study() -> None:
    modules = sorted(path.stem for path in (ROOT / "training").glob("*.py") if path.stem != "__init__")
    assert {"train", "distill", "validate", "trainer", "tasks"} <= set(modules)
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module("training." + name)
print([name for name in sys.modules if name.startswith("training.study")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
