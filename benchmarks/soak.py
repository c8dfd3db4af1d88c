# SPDX-License-Identifier: Apache-2.0
"""Random faults of every kind in a simulated rig: does the node report each and recover?

    python -m benchmarks.soak --minutes 30 --json FILE

Three processes: the rig, the node with a stub network, and this one. A fault lasts 3 to 5 s, with 3 to 5 s
between faults. `reported`: /diagnostics shows the fault within 2 s. `recovered`: a detection from all six
cameras has a stamp of at most two rounds after the end of the fault: the round in progress and one more.
`crashes`: the node has ended. `deadlocks`: no /diagnostics for 5 s. `rss_growth_mb`: over the last 2/3.
Between faults the node is sometimes deactivated and activated, cleaned up and configured, or its memory is
reset.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from std_srvs.srv import Trigger
from vision_msgs.msg import Detection3DArray

from benchmarks.camera_rig import CAMERAS
from benchmarks.report import write_figures
from benchmarks.rig_processes import TRANSPORTS, MemoryWatch, NodeProcess, Rig, child_environment
from benchmarks.soak_faults import KINDS, Diagnostics, Kind, read_diagnostics
from ftkd_core.errors import UserError
from ftkd_ros.convert.from_ros import stamp_to_ns

PERIOD_S: Final = 1 / 12
REPORT_S: Final = 2.0
RECOVERY_S: Final = 2 * PERIOD_S + 0.05  # 0.05: offsets of the cameras
LATE_S: Final = 1.5  # a detection may arrive later than its stamp
DEADLOCK_S: Final = 5.0
# Transitions of lifecycle_msgs/Transition
CONFIGURE, CLEANUP, ACTIVATE, DEACTIVATE = 1, 2, 3, 4


class Listener:
    """Subscribes to detections and diagnostics and calls the services of the node."""

    def __init__(self) -> None:
        self.node = rclpy.create_node("soak")
        self.detections: list[tuple[int, int]] = []  # stamp, cameras
        self.diagnostics: list[tuple[float, Diagnostics]] = []  # monotonic time of arrival
        self.node.create_subscription(Detection3DArray, "/detections", self._store, 100)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._judge, 100)
        self._reset = self.node.create_client(Trigger, "/detector/reset")
        self._change = self.node.create_client(ChangeState, "/detector/change_state")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)

    def _store(self, message: Detection3DArray) -> None:
        cameras = round(message.detections[0].bbox.center.position.x)
        self.detections.append((stamp_to_ns(message.header.stamp), cameras))

    def _judge(self, message: DiagnosticArray) -> None:
        self.diagnostics.append((time.monotonic(), read_diagnostics(message)))

    def spin_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Run callbacks until the condition is true; return whether it became true."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() >= end:
                return False
            self._executor.spin_once(timeout_sec=0.02)
        return True

    def is_full_after(self, stamp_ns: int) -> bool:
        """Return True if a detection from all cameras has a later stamp."""
        return any(stamp > stamp_ns and cameras == len(CAMERAS) for stamp, cameras in self.detections[-40:])

    def first_full_after(self, stamp_ns: int) -> int | None:
        """Return the stamp of the first detection from all cameras after a stamp."""
        full = [stamp for stamp, cameras in self.detections if stamp > stamp_ns and cameras == len(CAMERAS)]
        return min(full, default=None)

    def transitions(self, *numbers: int) -> None:
        """Run lifecycle transitions. Raises UserError if one fails or does not end."""
        for number in numbers:
            request = ChangeState.Request()
            request.transition.id = number
            future = self._change.call_async(request)
            if not self.spin_until(future.done, 20.0) or not future.result().success:
                raise UserError(f"lifecycle transition {number} failed")

    def reset_memory(self) -> None:
        """Call ~/reset."""
        self.spin_until(self._reset.call_async(Trigger.Request()).done, 5.0)

    def close(self) -> None:
        """Destroy the node."""
        self._executor.shutdown()
        self.node.destroy_node()


class Soak:
    """One run; `figures` has the counters of the contract and `failures` one sentence per failure."""

    def __init__(self, listener: Listener, rig: Rig, node: NodeProcess, seed: int) -> None:
        self.listener, self.rig, self.node = listener, rig, node
        self.counts: Counter[str] = Counter(faults=0, reported=0, recovered=0, crashes=0, deadlocks=0)
        self.failures: list[str] = []
        self.by_kind: dict[str, dict[str, Any]] = {}
        self._random = random.Random(seed)
        self._kinds: list[Kind] = []

    def run(self, seconds: float) -> None:
        """Inject faults until the time is over or the node has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.node.is_running:
            self.listener.spin_until(lambda: not self.node.is_running, self._random.uniform(3, 5))
            self._inject(self._next_kind())
            self._check_alive()
            if self._random.random() < 0.15:
                self._operate()
        self.counts["crashes"] += not self.node.is_running

    def _next_kind(self) -> Kind:
        """Return the next kind; all kinds come up once before any comes up again."""
        if not self._kinds:
            self._kinds = self._random.sample(KINDS, len(KINDS))
        return self._kinds.pop()

    def _inject(self, kind: Kind) -> None:
        camera = self._random.randrange(len(CAMERAS))
        listener = self.listener
        if not listener.diagnostics:
            raise UserError("no /diagnostics; check ROS_DOMAIN_ID")
        before = listener.diagnostics[-1][1]
        self.rig.set(**kind.changes(camera))
        started = time.monotonic()
        duration = self._random.uniform(3, 5)
        if kind.reported is None:
            seen = len(listener.detections)
            listener.spin_until(lambda: False, duration)
            reported = len(listener.detections) - seen > 0.8 * duration / PERIOD_S
        else:
            judge = kind.reported(camera)
            reported = listener.spin_until(
                lambda: any(at > started and judge(now, before) for at, now in listener.diagnostics[-8:]),
                REPORT_S,
            )
            listener.spin_until(lambda: False, duration - (time.monotonic() - started))
        report_s = time.monotonic() - started
        ended_ns = self.rig.set(**kind.undo)
        listener.spin_until(lambda: listener.is_full_after(ended_ns), RECOVERY_S + LATE_S)
        first_ns = listener.first_full_after(ended_ns)
        recovery_s = None if first_ns is None else (first_ns - ended_ns) * 1e-9
        recovered = recovery_s is not None and recovery_s <= RECOVERY_S
        self._count(kind, camera, reported, recovered, recovery_s, report_s)
        listener.spin_until(lambda: listener.is_full_after(ended_ns), 10.0)
        del listener.detections[:-60], listener.diagnostics[:-20]

    def _count(
        self,
        kind: Kind,
        camera: int,
        reported: bool,
        recovered: bool,
        recovery_s: float | None,
        report_s: float,
    ) -> None:
        self.counts["faults"] += 1
        self.counts["reported"] += reported
        self.counts["recovered"] += recovered
        row = self.by_kind.setdefault(kind.name, {"faults": 0, "reported": 0, "recovered": 0})
        row["faults"] += 1
        row["reported"] += reported
        row["recovered"] += recovered
        if not (reported and recovered):
            later = "never" if recovery_s is None else f"after {recovery_s:.2f} s"
            text = f"{kind.name} ({CAMERAS[camera]}): reported {reported}, full detections {later}"
            self.failures.append(text)
            print(text, flush=True)

    def _check_alive(self) -> None:
        arrival = self.listener.diagnostics[-1][0]
        if time.monotonic() - arrival > DEADLOCK_S and self.node.is_running:
            self.counts["deadlocks"] += 1
            self.failures.append("no /diagnostics for 5 s")

    def _operate(self) -> None:
        """Do what an operator does: reset, deactivate and activate, or configure again."""
        match self._random.choice(("reset", "activate", "configure")):
            case "reset":
                self.listener.reset_memory()
            case "activate":
                self.listener.transitions(DEACTIVATE, ACTIVATE)
            case _:
                self.listener.transitions(DEACTIVATE, CLEANUP, CONFIGURE, ACTIVATE)
        now_ns = time.time_ns()
        if not self.listener.spin_until(lambda: self.listener.is_full_after(now_ns), 10.0):
            self.counts["deadlocks"] += 1
            self.failures.append("no full detection for 10 s after a service call")


def measure(minutes: float, transport: str, seed: int, log: Path) -> dict[str, Any]:
    """Run the soak test and return the figures."""
    environment = child_environment(transport)
    rclpy.init()
    listener = Listener()
    node = NodeProcess(environment, log, {"qos_reliability": "reliable"})
    rig = Rig(environment)
    memory = MemoryWatch(node)
    soak = Soak(listener, rig, node, seed)
    try:
        if not listener.spin_until(lambda: listener.is_full_after(0) and bool(listener.diagnostics), 60.0):
            raise UserError(f"no detection from {len(CAMERAS)} cameras within 60 s; see {log}")
        soak.run(60 * minutes)
        growth_mb = memory.growth_mb(2 / 3)
        if node.is_running:
            node.stop()
    finally:
        rig.kill()
        node.kill()
        listener.close()
        rclpy.shutdown()
    return {
        "minutes": minutes,
        **soak.counts,
        "rss_growth_mb": growth_mb,
        "transport": transport,
        "by_kind": soak.by_kind,
        "failures": soak.failures,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures and write the JSON file. Returns 1 if the node has failed, 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0, help="duration  [default: 30]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the faults  [default: 0]")
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default=TRANSPORTS[0], help="DDS settings  [default: 128 MiB]"
    )
    parser.add_argument("--log", type=Path, help="file for the output of the node")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            log = options.log or Path(folder) / "node.log"
            found = measure(options.minutes, options.transport, options.seed, log)
        except UserError as error:
            print(f"benchmarks.soak: {error}", file=sys.stderr)
            return 2
    for name, value in found.items():
        if name not in ("by_kind", "failures"):
            print(f"{name}: {value}")
    if options.json is not None:
        write_figures(options.json, found)
    good = found["reported"] == found["recovered"] == found["faults"]
    return int(not good or found["crashes"] > 0 or found["deadlocks"] > 0)


if __name__ == "__main__":
    sys.exit(main())
