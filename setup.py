# SPDX-License-Identifier: Apache-2.0
"""Metadata, dependencies, extras, programs and data files of the package.

They are in this file because colcon runs it, and because the setuptools of ROS 2 Humble (59.6) neither reads
[project] of pyproject.toml nor gives colcon a readable `python_requires` from setup.cfg.
"""

from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

NAME = "ftkd_ros"
# `colcon build --symlink-install` runs a symbolic link to this file in a folder without README.md.
README = Path(__file__).resolve().parent / "README.md"
TEST = ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist"]

setup(
    name=NAME,
    version="0.1.0",
    description="Camera-only 3-D object detection with future temporal knowledge distillation, for ROS 2",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    maintainer="ftkd_ros developers",
    maintainer_email="ftkd-ros@users.noreply.github.com",
    keywords=[
        "3D object detection",
        "nuScenes",
        "ROS 2",
        "StreamPETR",
        "SparseBEV",
        "knowledge distillation",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["ftkd_core*", "ftkd_ros*", "training*"]),
    package_data={
        "ftkd_core": ["py.typed", "weights/*.safetensors", "weights/*.json", "weights/*.md"],
        "ftkd_ros": ["py.typed", "bag/templates/*"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", sorted(glob("launch/*.py"))),
        (f"share/{NAME}/config", sorted(glob("config/*"))),
        (f"share/{NAME}/rviz", sorted(glob("rviz/*"))),
        (f"share/{NAME}/benchmarks/results", sorted(glob("benchmarks/results/rigs_*.json"))),
    ],
    # Loose bounds, because a ROS machine brings its own versions; requirements/ pins the tested ones.
    install_requires=[
        "click>=8.0",
        "filelock",
        # The devkit needs numpy 1.x, which has no wheel for Python 3.13; use the extra `evaluate` there.
        'nuscenes-devkit>=1.2; python_version < "3.13"',
        "numpy",
        "opencv-python-headless",
        "pydantic>=2.10",
        "pyyaml",
        "rosbags>=0.11",
        "safetensors",
        "scipy",
        "setuptools",
        "torch>=2.6",
        "tqdm",
    ],
    extras_require={
        "onnx": ["onnx", "onnxruntime", "onnxscript"],  # ftkd export, runtime onnx
        "openvino": ["onnx", "onnxscript", "openvino"],  # runtime openvino, the fastest on a CPU
        "ray": ["ray>=2.9"],  # --ray of ftkd convert, detect and evaluate
        "train": ["lightning-fabric", "tensorboard"],
        # The packages that the parts of nuscenes-devkit used here import: with them `pip install --no-deps
        # nuscenes-devkit` is enough on any Python version.
        "evaluate": ["cachetools", "matplotlib", "pyquaternion", "scikit-learn", "shapely>=2.0.3"],
        "test": TEST,  # read by colcon test
        "dev": [*TEST, "mypy", "ruff", "types-pyyaml", "types-tqdm"],
    },
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "ftkd = ftkd_ros.cli:main",
            "detector = ftkd_ros.programs:detector",
            "player = ftkd_ros.programs:player",
            "recorder = ftkd_ros.programs:recorder",
        ]
    },
)
