# SPDX-License-Identifier: Apache-2.0
"""The ament_python package: what `colcon build` installs, and what `pip install -e .` puts on the path."""

from glob import glob

from setuptools import find_packages, setup

NAME = "ftkd_ros"

setup(
    name=NAME,
    version="0.1.0",
    description="Camera-only 3-D object detection with future temporal knowledge distillation, for ROS 2",
    license="Apache-2.0",
    maintainer="ftkd_ros developers",
    maintainer_email="ftkd-ros@users.noreply.github.com",
    packages=find_packages(include=["ftkd_core*", "ftkd_ros*", "training*"]),
    package_data={
        "ftkd_core": ["py.typed", "weights/*.safetensors", "weights/*.json", "weights/*.md"],
        "ftkd_ros": ["py.typed", "bag/templates/*"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", sorted(glob("launch/*.py"))),
        (f"share/{NAME}/config", sorted(glob("config/*.yaml"))),
        (f"share/{NAME}/rviz", sorted(glob("rviz/*"))),
    ],
    python_requires=">=3.10",
    # Loose, since a ROS machine brings its own; what is tested stands in requirements/.
    install_requires=[
        "setuptools",
        "numpy",
        "pydantic>=2.10",
        "pyyaml",
        "safetensors",
        "scipy",
        "torch>=2.6",
        "tqdm",
    ],
    extras_require={"test": ["hypothesis", "pytest", "pytest-timeout"]},
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "detector = ftkd_ros.node.detector_node:main",
            "player = ftkd_ros.bag.player:main",
            "recorder = ftkd_ros.bag.recorder:main",
            "ftkd = ftkd_ros.cli:main",
        ]
    },
)
