# SPDX-License-Identifier: Apache-2.0
"""Import rules: training and ftkd_ros import ftkd_core, which imports neither of them nor ROS."""

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
    "errors", "classes", "geometry", "lens", "canonical_cameras", "types", "duplicates", "boxes",
    "config_class", "config", "presets", "runtime.preprocess", "runtime.remap", "runtime.camera_assignment",
    "runtime.virtual_camera", "data", "models", "losses", "distillation", "weights", "runtime", "evaluation",
)  # fmt: skip
"""Modules and packages of ftkd_core, lowest first; datasets see images and cameras by the functions of the
runtime."""
TRAINING_COMMANDS = ROOT / "ftkd_ros" / "commands" / "training.py"  # `ftkd train` and its siblings
DEVKIT_READERS = ("ftkd_core/data/nuscenes/", "ftkd_core/data/synthetic/export.py", "ftkd_core/evaluation/")


def imported_names(source: str, package: tuple[str, ...] = ()) -> set[str]:
    """Return the full names of all imported modules; `package` resolves relative imports."""
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
    """Return the top-level packages that a file imports."""
    package = path.relative_to(ROOT).parts[:-1]
    return {name.partition(".")[0] for name in imported_names(path.read_text(encoding="utf-8"), package)}


def sources(*folders: str) -> list[Path]:
    """Return all Python files under these folders of the repository."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files under {folders}"
    return found


def is_ros(package: str) -> bool:
    """Return whether a top-level package belongs to ROS."""
    return package in ROS_PACKAGES or package.endswith(ROS_ENDINGS)


def test_every_form_of_import_is_found() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\n"
    source += "def late():\n    import h as x\n    importlib.import_module('i.j')\n"
    names = imported_names(source, ("package", "inner"))
    expected = {"a.b", "c.d", "package.inner.e", "package.f.g", "h", "i.j"}
    assert expected <= names


@pytest.mark.parametrize("package", ["rclpy", "std_msgs", "builtin_interfaces", "std_srvs"])
def test_ros_packages_are_recognised_by_name_or_ending(package: str) -> None:
    assert is_ros(package)
    assert not is_ros("torch")


def test_core_imports_neither_ros_nor_ftkd_ros_nor_training() -> None:
    for path in sources("ftkd_core"):
        wrong = {name for name in top_levels(path) if is_ros(name) or name in ("ftkd_ros", "training")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; ftkd_core must stand alone"


def test_runtime_imports_neither_the_synthetic_world_nor_the_evaluation() -> None:
    for path in sources("ftkd_core/runtime"):
        names = imported_names(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[:-1])
        upwards = {name for name in names if name.startswith(("ftkd_core.data", "ftkd_core.evaluation"))}
        assert not upwards, f"{path.relative_to(ROOT)} imports {sorted(upwards)}"


def core_layer(module: str) -> int | None:
    """Position in CORE_LAYERS of a full module name; None if it belongs to no layer."""
    layers = [
        index for index, name in enumerate(CORE_LAYERS) if f"{module}.".startswith(f"ftkd_core.{name}.")
    ]
    return max(layers, key=lambda index: len(CORE_LAYERS[index]), default=None)


def without_types(source: str) -> str:
    """Return a source without the imports that only a type checker reads."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def upward_imports(path: Path) -> set[str]:
    """Modules of a higher layer than its own that a file of ftkd_core imports when it runs."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = core_layer(".".join(parts))
    names = imported_names(without_types(path.read_text(encoding="utf-8")), parts[:-1])
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


def test_training_and_ftkd_ros_do_not_import_each_other() -> None:
    for path in sources("training"):
        wrong = {name for name in top_levels(path) if is_ros(name) or name == "ftkd_ros"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; training must not use ROS"
    for path in sources("ftkd_ros"):
        if path != TRAINING_COMMANDS:
            assert "training" not in top_levels(path), f"{path.relative_to(ROOT)} imports training"


def test_only_a_few_modules_import_the_devkit() -> None:
    for path in sources(*PACKAGES):
        relative = path.relative_to(ROOT).as_posix()
        if "nuscenes" in top_levels(path):
            assert relative.startswith(DEVKIT_READERS), (
                f"{relative} imports the devkit; use ftkd_core.data.nuscenes"
            )


def test_no_module_imports_pip_ros_by_name() -> None:
    for path in sources(*PACKAGES, "tests"):
        assert "pip_ros" not in top_levels(path), f"{path.relative_to(ROOT)} imports pip_ros by name"


def test_package_xml_lists_every_imported_ros_package() -> None:
    manifest = ElementTree.parse(ROOT / "package.xml").getroot()
    declared = {element.text for kind in ("depend", "exec_depend") for element in manifest.findall(kind)}
    for path in sources("ftkd_ros", "launch"):
        missing = {name for name in top_levels(path) if is_ros(name)} - declared
        assert not missing, f"{path.relative_to(ROOT)} imports {sorted(missing)}, not in package.xml"
