# SPDX-License-Identifier: Apache-2.0
"""The demo: data -> bag -> ROS 2 replay through the detector node -> recording -> metrics -> page.

It starts three ROS processes on this machine: recorder, detector and player. Each starts when the previous
one is ready, so that no message is lost during discovery.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ftkd_core.data.nuscenes import open_dataset, scene_names, scene_samples
from ftkd_core.data.synthetic.rig_presets import DEFAULT_RIG
from ftkd_core.data.synthetic.varied_rigs import check_rig_name
from ftkd_core.errors import UserError
from ftkd_core.runtime import RUNTIMES
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, SUMMARY_NAME, VELOCITIES_TOPIC
from ftkd_ros.bag.evaluate import evaluate_recording, summary_lines
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.replay_rounds import Drive
from ftkd_ros.bag.report import report_results
from ftkd_ros.processes import ProcessGroup

MARKER_NAME: Final = ".ftkd_demo"
SYNTHETIC_VERSION: Final = "v1.0-synth"
SYNTHETIC_SEED: Final = 900_000
_SYNTHETIC_WIDTH: Final = 800
_SYNTHETIC_SECONDS: Final = 20.0
_READY_TIMEOUT_S: Final = 180.0
_STOP_TIMEOUT_S: Final = 60.0
# Wait after the last image: deadline of a partial round, and rounds in progress.
_GRACE_S: Final = 3.0
# By `sweeps`. Key frames are 0.5 s apart, so a slow machine can have a long deadline; sweeps are 83 ms apart.
_DEADLINE_S: Final = {True: 0.1, False: 0.35}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `ftkd demo`. dataroot None: render a synthetic scene with the cameras of `rig`; domain_id
    None: choose a domain."""

    output: Path = Path("build/demo")
    dataroot: Path | None = None
    version: str | None = None
    scene: str | None = None
    rig: str = DEFAULT_RIG
    sweeps: bool = False
    rate: float = 1.0
    domain_id: int | None = None
    weights: Path | None = None
    device: str = "auto"
    runtime: str = "auto"

    def __post_init__(self) -> None:
        if self.dataroot is None and (self.version or self.scene):
            raise UserError("--version and --scene need a data set; give --dataroot as well")
        if self.dataroot is not None and not self.version:
            raise UserError(f"--dataroot {str(self.dataroot)!r} needs --version, such as v1.0-mini")
        check_rig_name(self.rig)
        if self.dataroot is not None and self.rig != DEFAULT_RIG:
            raise UserError(
                f"--rig {self.rig!r} with --dataroot: the data set has its own cameras; leave it out"
            )
        if not 0.01 <= self.rate <= 100:
            raise UserError(f"--rate {self.rate}; expected 0.01 to 100")
        if self.runtime not in RUNTIMES:
            raise UserError(f"--runtime {self.runtime!r}; expected {' or '.join(RUNTIMES)}")
        if self.domain_id is not None and not 0 <= self.domain_id <= 101:
            raise UserError(f"--domain-id {self.domain_id}; expected 0 to 101")


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run all steps, write the results to `options.output` and return the content of metrics.json.

    An output folder of an earlier demo is replaced; any other folder with files is refused. Raises UserError
    for bad input and if a process fails.
    """
    started = time.monotonic()
    dataroot, version, scene = _choose_scene(options)
    output = options.output
    prepare_output(output)
    _print(f"[1/4] converting {scene} to a bag")
    convert_scene(dataroot, version, scene, output / "input", sweeps=options.sweeps)
    environment = ros_environment(options.domain_id)
    _print(
        f"[2/4] replaying the bag through the detector node on ROS_DOMAIN_ID {environment['ROS_DOMAIN_ID']}"
    )
    replay(options, environment)
    _print("[3/4] evaluating the recorded detections")
    metrics = evaluate_recording(
        output / "detections",
        output / "input",
        dataroot=dataroot,
        version=version,
        output=output,
        summary_file=output / SUMMARY_NAME,
    )
    _print("[4/4] writing the page")
    page = report_results(output, output / "detections", output / "input")
    _print("")
    for line in summary_lines(metrics):
        _print(line)
    if metrics["rounds_dropped"]:
        _print(
            f"hint: the detector was slower than the cameras; use --rate {options.rate / 2:g} to play slower"
        )
    _print(f"done in {time.monotonic() - started:.0f} s; open {page.resolve()}")
    return metrics


def prepare_output(output: Path) -> None:
    """Create an empty output folder with a marker file; remove the output of an earlier demo.

    Raises UserError for a file, and for a folder with files but without the marker.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"output {str(output)!r} is not a folder; remove it or give another --output")
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER_NAME).is_file():
            raise UserError(
                f"output folder {str(output)!r} contains files that the demo did not write; "
                "give another --output"
            )
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER_NAME).write_text(
            "created by `ftkd demo`, which may replace this folder\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(
            f"output {str(output)!r} cannot be written ({error.strerror}); give another"
        ) from error


def ros_environment(domain_id: int | None) -> dict[str, str]:
    """Return the environment of the ROS processes: discovery on this machine only, and a domain.

    Without `domain_id`, the domain is ROS_DOMAIN_ID (set by `make demo`) or depends on the process id.
    """
    domain = (
        str(domain_id)
        if domain_id is not None
        else os.environ.get("ROS_DOMAIN_ID") or str(os.getpid() % 100 + 1)
    )
    changes = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_DOMAIN_ID": domain, "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **changes}


def replay(options: DemoOptions, environment: Mapping[str, str]) -> None:
    """Play output/input through the detector; write output/detections and the detector's summary."""
    output = options.output.resolve()
    with BagReader(output / "input") as bag:
        drive = Drive(bag)
        cameras = drive.cameras
        topics = [f"/{camera}/{name}" for camera in cameras for name in ("image/compressed", "camera_info")]
        needed_topics = [topic for topic in [*topics, "/tf", "/tf_static"] if topic in bag.topics]
        seconds = (bag.end_ns - bag.start_ns) * 1e-9
    with ProcessGroup(output / "logs", environment) as processes:
        recorder = processes.start(
            "recorder",
            _node(
                "ftkd_ros.bag.recorder",
                {"output": str(output / "detections"), "topics": [DETECTIONS_TOPIC, VELOCITIES_TOPIC]},
            ),
        )
        recorder.wait_for("recording to", _READY_TIMEOUT_S)
        detector = processes.start(
            "detector",
            _node(
                "ftkd_ros.node.detector_node",
                detector_parameters(options, cameras, drive.offsets_ns),
                nuscenes_parameters(),
            ),
        )
        detector.wait_for("is ready", _READY_TIMEOUT_S)
        for topic in (DETECTIONS_TOPIC, VELOCITIES_TOPIC):
            recorder.wait_for(f"recording {topic}\n", _READY_TIMEOUT_S)
        player = processes.start(
            "player",
            _node(
                "ftkd_ros.bag.player",
                {"bag": str(output / "input"), "rate": options.rate, "wait_for_subscribers": needed_topics},
            ),
        )
        player.wait(_READY_TIMEOUT_S + seconds / options.rate * 3)
        time.sleep(_GRACE_S)
        detector.interrupt(_STOP_TIMEOUT_S)
        recorder.interrupt(_STOP_TIMEOUT_S)


def detector_parameters(
    options: DemoOptions, cameras: Sequence[str], offsets_ns: Sequence[int | None]
) -> dict[str, Any]:
    """Return the parameters of the node for a replay of these cameras with their time offsets."""
    parameters: dict[str, Any] = {
        "cameras": list(cameras),
        "device": options.device,
        "runtime": options.runtime,
        "summary_file": str(options.output.resolve() / SUMMARY_NAME),
        "qos_reliability": "reliable",
        "score_threshold": 0.05,  # low, because the metrics need all detections
        "sync_deadline_s": _DEADLINE_S[options.sweeps],
        # Measured in the whole bag, because the estimation at start-up needs a second of images.
        "camera_time_offsets_s": [(offset or 0) * 1e-9 for offset in offsets_ns],
    }
    if options.weights is not None:
        parameters["weights"] = str(options.weights.resolve())
    return parameters


def synthetic_dataset(folder: Path, sweeps: bool, rig: str = DEFAULT_RIG) -> Path:
    """Return the data set of the demo in `folder`; render it if it does not exist.

    Its name contains a hash of the rendering code, so that a change of the code renders it again.
    """
    from ftkd_core import lens
    from ftkd_core.data import synthetic
    from ftkd_core.data.synthetic.export import write_dataset

    source = hashlib.sha256()
    for path in [*sorted(Path(synthetic.__file__).parent.glob("*.py")), Path(lens.__file__)]:
        source.update(path.read_bytes())
    kind = "sweeps" if sweeps else "keyframes"
    kind += "" if rig == DEFAULT_RIG else f"-{rig}"
    dataroot = folder / f"synthetic-{SYNTHETIC_SEED}-{kind}-{source.hexdigest()[:8]}"
    if (dataroot / SYNTHETIC_VERSION / "sample.json").is_file():
        return dataroot
    _print(f"[0/4] rendering a synthetic scene to {dataroot} (once)")
    return write_dataset(
        dataroot,
        [SYNTHETIC_SEED],
        version=SYNTHETIC_VERSION,
        split="held_out",
        width=_SYNTHETIC_WIDTH,
        height=None,
        rig=rig,
        duration_s=_SYNTHETIC_SECONDS,
        sweeps=sweeps,
    )


def _choose_scene(options: DemoOptions) -> tuple[Path, str, str]:
    """Return (dataroot, version, scene) to replay. Raises UserError for an unknown one before any output."""
    if options.dataroot is None or options.version is None:
        dataroot, version = (
            synthetic_dataset(options.output.parent / "demo_data", options.sweeps, options.rig),
            SYNTHETIC_VERSION,
        )
    else:
        dataroot, version = options.dataroot, options.version
    dataset = open_dataset(dataroot, version)
    scene = options.scene or scene_names(dataset)[0]
    scene_samples(dataset, scene)
    return dataroot, version, scene


def nuscenes_parameters() -> Path:
    """Return the parameter file of the nuScenes rig, from the repository or the installed package."""
    file = Path(__file__).resolve().parents[1] / "config" / "nuscenes.yaml"
    if file.is_file():
        return file
    from ament_index_python.packages import get_package_share_directory

    return Path(get_package_share_directory("ftkd_ros")) / "config" / "nuscenes.yaml"


def _node(module: str, parameters: Mapping[str, Any], params_file: Path | None = None) -> list[str]:
    """Return the command line of a node; parameters are JSON, which is valid YAML, and override the file."""
    command = [sys.executable, "-m", module, "--ros-args", "--disable-external-lib-logs"]
    if params_file is not None:
        command += ["--params-file", str(params_file)]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={json.dumps(value)}"]
    return command


def _print(line: str) -> None:
    print(line, flush=True)
