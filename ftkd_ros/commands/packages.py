# SPDX-License-Identifier: Apache-2.0
"""Optional packages: which command line installs a missing one."""

import importlib.util
from typing import Final

from ftkd_core.errors import UserError

_TRAIN: Final = "`pip install '.[train]'` in the repository"
_EVALUATE: Final = (
    "`pip install '.[evaluate]'` and `pip install --no-deps -r requirements/devkit.txt` in the repository"
)
_ROS: Final = "source a ROS 2 distribution with this package, or run `make setup` in the repository"

_ADVICE: Final = {
    **dict.fromkeys(("lightning_fabric", "tensorboard"), f"install it with {_TRAIN}"),
    **dict.fromkeys(
        ("cachetools", "matplotlib", "nuscenes", "pyquaternion", "shapely", "sklearn"),
        f"install it with {_EVALUATE}",
    ),
    **dict.fromkeys(("cv_bridge", "message_filters", "rclpy", "tf2_ros"), _ROS),
}


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return a sentence on how to install the optional package that is missing; None for any other module."""
    package = (error.name or "").partition(".")[0]
    advice = _ADVICE.get(package, _ROS if package.endswith(("_msgs", "_interfaces", "_srvs")) else None)
    return f"the Python package {package!r} is not installed; {advice}" if advice else None


def require(package: str) -> None:
    """Raise UserError, with how to install it, unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(missing_package(ModuleNotFoundError(name=package)) or f"no package {package!r}")
