# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: training and ftkd_ros build on ftkd_core, which knows neither them nor ROS."""

import ast
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ftkd_core", "ftkd_ros", "training")
ROS_PACKAGES = {
    "ament_index_python",
    "cv_bridge",
    "launch",
    "launch_ros",
    "message_filters",
    "rclpy",
    "rosbag2_py",
    "tf2_py",
    "tf2_ros",
}
ROS_ENDINGS = ("_msgs", "_interfaces", "_srvs")
CORE_LAYERS = (
    "errors", "classes", "geometry", "types", "boxes", "config_class", "config", "presets",
    "runtime.preprocess", "data", "models", "losses", "distillation", "weights", "runtime", "evaluation",
)  # fmt: skip
"""Modules and packages of ftkd_core, lowest first; datasets use the pure functions of `runtime.preprocess`.
"""
DEVKIT_READERS = ("ftkd_core/data/nuscenes.py", "ftkd_core/data/synthetic/export.py", "ftkd_core/evaluation/")


def imported_names(source: str, package: tuple[str, ...] = ()) -> set[str]:
    """Full names of all modules that a source imports anywhere; package resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            names |= {str(value.value) for value in node.args[:1] if isinstance(value, ast.Constant)}
    return names


def top_levels(path: Path) -> set[str]:
    """The first parts of the names that a file of this repository imports."""
    package = path.relative_to(ROOT).parts[:-1]
    return {name.partition(".")[0] for name in imported_names(path.read_text(encoding="utf-8"), package)}


def sources(*folders: str) -> list[Path]:
    """All Python files under these folders of the repository."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files under {folders}"
    return found


def is_ros(package: str) -> bool:
    """Whether a top-level package comes from ROS."""
    return package in ROS_PACKAGES or package.endswith(ROS_ENDINGS)


def test_imports_are_seen_in_every_form() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\n"
    source += "def late():\n    import h as x\n    importlib.import_module('i.j')\n"
    names = imported_names(source, ("package", "inner"))
    expected = {"a.b", "c.d", "package.inner.e", "package.f.g", "h", "i.j"}
    assert expected <= names


@pytest.mark.parametrize("package", ["rclpy", "std_msgs", "builtin_interfaces", "std_srvs"])
def test_ros_packages_are_known_by_name_or_ending(package: str) -> None:
    assert is_ros(package)
    assert not is_ros("torch")


def test_core_imports_neither_ros_nor_what_builds_on_it() -> None:
    for path in sources("ftkd_core"):
        wrong = {name for name in top_levels(path) if is_ros(name) or name in ("ftkd_ros", "training")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; ftkd_core must stand alone"


def core_layer(module: str) -> int | None:
    """Position in CORE_LAYERS of a full module name; None if it belongs to no layer."""
    layers = [
        index for index, name in enumerate(CORE_LAYERS) if f"{module}.".startswith(f"ftkd_core.{name}.")
    ]
    return max(layers, key=lambda index: len(CORE_LAYERS[index]), default=None)


def upward_imports(path: Path) -> set[str]:
    """Modules of a higher layer than its own that a file of ftkd_core imports."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = core_layer(".".join(parts))
    names = imported_names(path.read_text(encoding="utf-8"), parts[:-1])
    layers = {name: core_layer(name) for name in names}
    return {name for name, layer in layers.items() if own is not None and layer is not None and layer > own}


def test_core_modules_import_only_from_their_own_layer_or_below() -> None:
    for path in sources("ftkd_core"):
        assert not (wrong := upward_imports(path)), (
            f"{path.relative_to(ROOT)} imports upwards: {sorted(wrong)}"
        )


def test_losses_use_only_the_outputs_of_models() -> None:
    allowed = "ftkd_core.models.predictions"
    for path in sources("ftkd_core/losses"):
        names = {
            n for n in imported_names(path.read_text(encoding="utf-8")) if n.startswith("ftkd_core.models")
        }
        wrong = {name for name in names if not name.startswith(allowed)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; expected only {allowed}"


def test_training_and_ros_stay_apart() -> None:
    for path in sources("training"):
        wrong = {name for name in top_levels(path) if is_ros(name) or name == "ftkd_ros"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; training knows no ROS"
    for path in sources("ftkd_ros"):
        assert "training" not in top_levels(path), f"{path.relative_to(ROOT)} imports training"


def test_the_devkit_is_read_in_few_places() -> None:
    for path in sources(*PACKAGES):
        relative = path.relative_to(ROOT).as_posix()
        if "nuscenes" in top_levels(path):
            assert relative.startswith(DEVKIT_READERS), (
                f"{relative} imports the devkit; use ftkd_core.data.nuscenes"
            )


def test_nothing_names_the_stand_ins_folder() -> None:
    for path in sources(*PACKAGES, "tests"):
        assert "pip_ros" not in top_levels(path), f"{path.relative_to(ROOT)} imports pip_ros by name"


def test_every_ros_package_that_is_imported_is_a_dependency() -> None:
    manifest = ElementTree.parse(ROOT / "package.xml").getroot()
    declared = {element.text for kind in ("depend", "exec_depend") for element in manifest.findall(kind)}
    for path in sources("ftkd_ros", "launch"):
        missing = {name for name in top_levels(path) if is_ros(name)} - declared
        assert not missing, f"{path.relative_to(ROOT)} imports {sorted(missing)}, not in package.xml"
