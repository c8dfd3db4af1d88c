# SPDX-License-Identifier: Apache-2.0
"""The detector node with a stub network: lost rounds and overhead for six JPEG cameras of 1600x900 at 12 Hz.

    python -m benchmarks.node --seconds 60 --json FILE

Three processes: the simulated rig, the node with a stub network of 5 ms, and this one, which subscribes to
the detections. The first three seconds, in which the node measures the time offsets, are not counted.
`rounds_lost`: rounds of six images without a detection from all six. `overhead_ms`: from the stamp of the
last image of a round to the arrival of its detections here, minus the 5 ms. `rss_growth_mb`: over the last
two thirds.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import rclpy
from rclpy.executors import SingleThreadedExecutor
from vision_msgs.msg import Detection3DArray

from benchmarks.camera_rig import CAMERAS
from benchmarks.report import write_figures
from benchmarks.rig_processes import TRANSPORTS, MemoryWatch, NodeProcess, Rig, child_environment
from benchmarks.stub_node import STEP_S
from ftkd_core.errors import UserError
from ftkd_core.percentiles import summarize
from ftkd_ros.convert.from_ros import stamp_to_ns

WARM_UP_S: Final = 3.0


def measure(seconds: float, transport: str) -> dict[str, Any]:
    """Run the three processes and return the figures."""
    environment = child_environment(transport)
    rclpy.init()
    listener = rclpy.create_node("node_benchmark")
    arrivals: dict[int, tuple[int, int]] = {}  # stamp -> (arrival, cameras)

    def store(message: Detection3DArray) -> None:
        cameras = round(message.detections[0].bbox.center.position.x)
        arrivals[stamp_to_ns(message.header.stamp)] = (time.time_ns(), cameras)

    listener.create_subscription(Detection3DArray, "/detections", store, 100)
    executor = SingleThreadedExecutor()
    executor.add_node(listener)
    with tempfile.TemporaryDirectory() as folder:
        node = NodeProcess(environment, Path(folder) / "node.log", {})
        rig = Rig(environment)
        memory = MemoryWatch(node)
        try:
            while not arrivals and node.is_running:
                executor.spin_once(timeout_sec=0.1)
            end = time.monotonic() + WARM_UP_S + seconds
            while time.monotonic() < end and node.is_running:
                executor.spin_once(timeout_sec=0.1)
            rounds = rig.finish()
            late = time.monotonic() + 1.0
            while time.monotonic() < late:
                executor.spin_once(timeout_sec=0.1)
            growth_mb = memory.growth_mb(2 / 3)
            node.stop()
        finally:
            rig.kill()
            node.kill()
            executor.shutdown()
            listener.destroy_node()
            rclpy.shutdown()
    return figures(rounds, arrivals, transport, growth_mb)


def figures(
    rounds: Sequence[Sequence[int]], arrivals: dict[int, tuple[int, int]], transport: str, growth_mb: float
) -> dict[str, Any]:
    """Return the figures from the stamps of the rounds and the arrivals (time, cameras) by stamp."""
    if not arrivals:
        raise UserError("no detections; check ROS_DOMAIN_ID and that no other rig publishes in it")
    first_ns = min(arrivals) + round(WARM_UP_S * 1e9)
    counted = [max(stamps) for stamps in rounds if max(stamps) >= first_ns]
    complete = [arrivals[stamp] for stamp in counted if arrivals.get(stamp, (0, 0))[1] == len(CAMERAS)]
    overhead = [(arrivals[stamp][0] - stamp) * 1e-6 - STEP_S * 1e3 for stamp in counted if stamp in arrivals]
    summary = summarize(overhead).as_dict()
    return {
        "cameras": len(CAMERAS),
        "transport": transport,
        "rounds_sent": len(counted),
        "rounds_lost": len(counted) - len(complete),
        "overhead_ms": {"p50": summary["p50"], "p95": summary["p95"]},
        "rss_growth_mb": growth_mb,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures and write the JSON file. Returns 1 if a round was lost, 2 for an error."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="duration  [default: 60]")
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default=TRANSPORTS[0], help="DDS settings  [default: 128 MiB]"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    try:
        found = measure(options.seconds, options.transport)
    except UserError as error:
        print(f"benchmarks.node: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.json is not None:
        write_figures(options.json, found)
    return int(found["rounds_lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
