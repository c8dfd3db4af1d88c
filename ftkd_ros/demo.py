# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end: data -> bag -> ROS 2 replay through the detector node -> recording -> metrics
-> page.

Three ROS processes on this machine: the recorder, the detector and the player, started in that order, each
when the one before is ready, so that no message is lost to discovery.
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

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data.nuscenes import open_dataset, scene_names, scene_samples
from ftkd_core.errors import UserError
from ftkd_core.runtime import RUNTIMES
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, SUMMARY_NAME, VELOCITIES_TOPIC
from ftkd_ros.bag.evaluate import evaluate_recording, summary_lines
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.pages import report_results
from ftkd_ros.bag.replay_rounds import Drive
from ftkd_ros.processes import ProcessGroup

MARKER_NAME: Final = ".ftkd_demo"
SYNTHETIC_VERSION: Final = "v1.0-synth"
SYNTHETIC_SEED: Final = 900_000
_SYNTHETIC_SIZE: Final = (800, 450)
_SYNTHETIC_SECONDS: Final = 20.0
_READY_TIMEOUT_S: Final = 180.0
_STOP_TIMEOUT_S: Final = 60.0
# After the last image is delivered: one deadline for a partial round, and the rounds under way.
_GRACE_S: Final = 3.0
# Key frames are half a second apart, so a slow machine may take its time to deliver a round; sweeps are not.
_DEADLINE_S: Final = {True: 0.1, False: 0.35}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `ftkd demo` was asked for; dataroot None renders a synthetic scene, domain_id None takes a domain
    of its own."""

    output: Path = Path("build/demo")
    dataroot: Path | None = None
    version: str | None = None
    scene: str | None = None
    sweeps: bool = False
    rate: float = 1.0
    domain_id: int | None = None
    weights: Path | None = None
    device: str = "auto"
    runtime: str = "auto"

    def __post_init__(self) -> None:
        if self.dataroot is None and (self.version or self.scene):
            raise UserError("--version and --scene belong to a data set; give --dataroot as well")
        if self.dataroot is not None and not self.version:
            raise UserError(f"--dataroot {str(self.dataroot)!r} needs --version, such as v1.0-mini")
        if not 0.01 <= self.rate <= 100:
            raise UserError(f"--rate {self.rate}; expected 0.01 to 100")
        if self.runtime not in RUNTIMES:
            raise UserError(f"--runtime {self.runtime!r}; expected {' or '.join(RUNTIMES)}")
        if self.domain_id is not None and not 0 <= self.domain_id <= 101:
            raise UserError(f"--domain-id {self.domain_id}; expected 0 to 101")


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run the whole way and write the results into `options.output`; returns the content of metrics.json.

    The output folder is replaced where an earlier demo made it, and refused where somebody else did. Raises
    UserError for bad input and where a process fails.
    """
    started = time.monotonic()
    dataroot, version, scene = _data(options)
    output = options.output
    prepare_output(output)
    _say(f"[1/4] converting {scene} to a bag")
    convert_scene(dataroot, version, scene, output / "input", sweeps=options.sweeps)
    environment = ros_environment(options.domain_id)
    _say(f"[2/4] replaying it through the detector node on ROS_DOMAIN_ID {environment['ROS_DOMAIN_ID']}")
    replay(options, environment)
    _say("[3/4] scoring the recorded detections")
    metrics = evaluate_recording(
        output / "detections",
        output / "input",
        dataroot=dataroot,
        version=version,
        output=output,
        summary_file=output / SUMMARY_NAME,
    )
    _say("[4/4] drawing the page")
    page = report_results(output, output / "detections", output / "input")
    _say("")
    for line in summary_lines(metrics):
        _say(line)
    if metrics["rounds_dropped"]:
        _say(f"hint: this machine was slower than the cameras; --rate {options.rate / 2:g} plays slower")
    _say(f"done in {time.monotonic() - started:.0f} s; open {page.resolve()}")
    return metrics


def prepare_output(output: Path) -> None:
    """An empty output folder with our marker; what an earlier demo left is removed.

    Raises UserError for a file or a folder with content that no demo made.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"output {str(output)!r} is not a folder; remove it or give another --output")
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER_NAME).is_file():
            raise UserError(f"output folder {str(output)!r} holds files of others; give another --output")
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER_NAME).write_text(
            "made by `ftkd demo`, which may replace this folder\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(
            f"output {str(output)!r} cannot be written ({error.strerror}); give another"
        ) from error


def ros_environment(domain_id: int | None) -> dict[str, str]:
    """Environment of the ROS processes: discovery on this machine only, and one domain for them alone.

    Without `domain_id` that of the environment counts (`make demo` sets one), else one by process id.
    """
    chosen = (
        str(domain_id)
        if domain_id is not None
        else os.environ.get("ROS_DOMAIN_ID") or str(os.getpid() % 100 + 1)
    )
    own = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_DOMAIN_ID": chosen, "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own}


def replay(options: DemoOptions, environment: Mapping[str, str]) -> None:
    """Play output/input through the detector and record output/detections; the detector's summary goes beside
    it."""
    output = options.output.resolve()
    with BagReader(output / "input") as bag:
        offsets_ns = Drive(bag).offsets_ns
        topics = [
            f"/{channel.lower()}/{name}"
            for channel in CAMERA_CHANNELS
            for name in ("image/compressed", "camera_info")
        ]
        awaited = [topic for topic in [*topics, "/tf", "/tf_static"] if topic in bag.topics]
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
            "detector", _node("ftkd_ros.node.detector_node", detector_parameters(options, offsets_ns))
        )
        detector.wait_for("is ready", _READY_TIMEOUT_S)
        for topic in (DETECTIONS_TOPIC, VELOCITIES_TOPIC):
            recorder.wait_for(f"recording {topic}\n", _READY_TIMEOUT_S)
        player = processes.start(
            "player",
            _node(
                "ftkd_ros.bag.player",
                {"bag": str(output / "input"), "rate": options.rate, "wait_for_subscribers": awaited},
            ),
        )
        player.wait(_READY_TIMEOUT_S + seconds / options.rate * 3)
        time.sleep(_GRACE_S)
        detector.interrupt(_STOP_TIMEOUT_S)
        recorder.interrupt(_STOP_TIMEOUT_S)


def detector_parameters(options: DemoOptions, offsets_ns: Sequence[int | None]) -> dict[str, Any]:
    """The node's parameters for a replay whose cameras are exposed at these offsets."""
    parameters: dict[str, Any] = {
        "device": options.device,
        "runtime": options.runtime,
        "summary_file": str(options.output.resolve() / SUMMARY_NAME),
        "qos_reliability": "reliable",
        "sync_deadline_s": _DEADLINE_S[options.sweeps],
        # Told, not estimated: the node needs six rounds to estimate them, and a scene can be shorter.
        "camera_time_offsets_s": [(offset or 0) * 1e-9 for offset in offsets_ns],
    }
    if options.weights is not None:
        parameters["weights"] = str(options.weights.resolve())
    return parameters


def synthetic_dataset(folder: Path, sweeps: bool) -> Path:
    """The demo's own data set below `folder`, rendered where it is not there yet.

    Its name holds a hash of the code that renders it, so that a change of the synthetic world is never hidden
    by old images.
    """
    from ftkd_core.data import synthetic
    from ftkd_core.data.synthetic.export import write_dataset

    source = hashlib.sha256()
    for path in sorted(Path(synthetic.__file__).parent.glob("*.py")):
        source.update(path.read_bytes())
    kind = "sweeps" if sweeps else "keyframes"
    dataroot = folder / f"synthetic-{SYNTHETIC_SEED}-{kind}-{source.hexdigest()[:8]}"
    if (dataroot / SYNTHETIC_VERSION / "sample.json").is_file():
        return dataroot
    _say(f"[0/4] rendering a synthetic scene to {dataroot} (once)")
    return write_dataset(
        dataroot,
        [SYNTHETIC_SEED],
        version=SYNTHETIC_VERSION,
        split="held_out",
        width=_SYNTHETIC_SIZE[0],
        height=_SYNTHETIC_SIZE[1],
        duration_s=_SYNTHETIC_SECONDS,
        sweeps=sweeps,
    )


def _data(options: DemoOptions) -> tuple[Path, str, str]:
    """(dataroot, version, scene) to replay; a wrong one is told before anything is written."""
    if options.dataroot is None or options.version is None:
        dataroot, version = (
            synthetic_dataset(options.output.parent / "demo_data", options.sweeps),
            SYNTHETIC_VERSION,
        )
    else:
        dataroot, version = options.dataroot, options.version
    dataset = open_dataset(dataroot, version)
    scene = options.scene or scene_names(dataset)[0]
    scene_samples(dataset, scene)
    return dataroot, version, scene


def _node(module: str, parameters: Mapping[str, Any]) -> list[str]:
    """The command line of a node; JSON is the YAML that ROS reads parameters from."""
    command = [sys.executable, "-m", module, "--ros-args", "--disable-external-lib-logs"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={json.dumps(value)}"]
    return command


def _say(line: str) -> None:
    print(line, flush=True)
