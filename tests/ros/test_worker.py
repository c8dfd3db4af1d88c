# SPDX-License-Identifier: Apache-2.0
"""The inference thread with a fake detector: mailbox, resets, statistics and errors."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_core.errors import UserError
from ftkd_core.geometry import yaw_transform
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.convert.calibration import CameraGeometry
from ftkd_ros.node.failures import fatal_reason
from ftkd_ros.node.statistics import RoundRecord, WorkerStatistics
from ftkd_ros.node.stream_monitor import StreamMonitor
from ftkd_ros.node.waiting import CAPACITY, RoundQueue
from ftkd_ros.node.worker import DetectionWorker, Outcome
from ftkd_ros.sync.assembly import BuiltRound, RoundBuilder, reference_stamp_ns
from ftkd_ros.sync.matcher import MatchedRound

MS = 1_000_000


class BlockingDetector:
    """Counts calls; `step` blocks until `gate` is set, if there is one."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.faults: dict[str, str] = {}
        self.warnings: list[str] = []
        self.resets = 0
        self.gate = gate
        self.entered = threading.Event()

    def step(self, camera_round: CameraRound) -> ObjectList:
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        self.steps.append(camera_round.reference_stamp_ns)
        return ObjectList(
            boxes=np.zeros((0, 9)),
            scores=np.zeros(0),
            labels=np.zeros(0, dtype=np.int64),
            stamp_ns=camera_round.reference_stamp_ns,
        )

    def reset(self) -> None:
        self.resets += 1


def matched(stamp_ns: int, after_jump: bool = False) -> MatchedRound[str]:
    return MatchedRound(messages=("image",), stamps_ns=(stamp_ns,), after_jump=after_jump)


def build(round_: MatchedRound[str]) -> BuiltRound:
    stamp = round_.stamps_ns[0]
    assert stamp is not None
    pose = yaw_transform(0.0, (stamp * 10e-9, 0, 0))  # 10 m/s
    camera_round = CameraRound(views=(None,), reference_stamp_ns=stamp, global_from_ego=pose)
    return BuiltRound(camera_round=camera_round, faults={}, stage_ms={"decode": 1.0, "geometry": 0.5})


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "timeout of ten seconds"
        time.sleep(0.001)


def run_rounds(
    stamps_ns: list[int], before_each: Callable[[DetectionWorker, int], None] | None = None
) -> tuple:
    """Process rounds one by one; return (detector, worker, reports)."""
    detector, reports, done = BlockingDetector(), [], []
    worker = DetectionWorker(detector, build, done.append, reports.append)
    worker.start()
    for number, stamp in enumerate(stamps_ns):
        if before_each is not None:
            before_each(worker, number)
        worker.submit(matched(stamp))
        wait_for(lambda expected=number: len(done) > expected)
    worker.stop()
    return detector, worker, reports


def test_newest_round_is_processed_and_overwritten_rounds_are_counted() -> None:
    gate = threading.Event()
    detector = BlockingDetector(gate)
    outcomes: list[Outcome] = []
    worker = DetectionWorker(detector, build, outcomes.append, pytest.fail)
    worker.start()
    worker.submit(matched(1 * MS))
    assert detector.entered.wait(10)
    for stamp in (2, 3, 4):
        worker.submit(matched(stamp * MS))
    gate.set()
    wait_for(lambda: len(outcomes) == 2)
    worker.stop()
    assert detector.steps == [1 * MS, 4 * MS]
    summary = worker.snapshot()
    assert (summary["rounds_in"], summary["rounds_detected"], summary["rounds_dropped"]) == (4, 2, 2)
    assert detector.resets == 0, "dropped rounds do not reset the memory"


def test_counts_at_shutdown_include_every_round() -> None:
    gate = threading.Event()
    detector = BlockingDetector(gate)
    worker = DetectionWorker(detector, build, lambda outcome: None, pytest.fail)
    worker.start()
    worker.submit(matched(1 * MS))
    assert detector.entered.wait(10)
    worker.submit(matched(2 * MS))
    threading.Timer(0.05, gate.set).start()
    worker.stop()
    worker.submit(matched(3 * MS))
    summary = worker.snapshot()
    assert summary["rounds_in"] == 3 == summary["rounds_detected"] + summary["rounds_dropped"]


def test_stages_and_latency_are_timed() -> None:
    _, worker, _ = run_rounds([k * 500 * MS for k in range(1, 6)])
    summary = worker.snapshot()
    assert set(summary["stage_ms"]) == {"wait", "decode", "geometry", "detect", "publish"}
    assert summary["stage_ms"]["decode"] == {"p50": 1.0, "p95": 1.0}
    assert summary["latency_ms"]["p95"] >= summary["latency_ms"]["p50"] > 0


@pytest.mark.parametrize(
    ("stamps_ms", "causes"),
    [
        ([500, 1000, 1500], {}),
        ([500, 1000, 2500, 3000], {}),  # two key frames dropped
        ([500, 1000, 4500, 5000], {"gap": 1}),
        ([5000, 5500, 500, 1000], {"backward_time": 1}),
    ],
)
def test_detector_is_reset_only_for_a_new_stream(stamps_ms: list[int], causes: dict[str, int]) -> None:
    detector, worker, _ = run_rounds([stamp * MS for stamp in stamps_ms])
    assert worker.snapshot()["resets"] == causes
    assert detector.resets == sum(causes.values())


def test_requested_reset_happens_once() -> None:
    def request_reset(worker: DetectionWorker, number: int) -> None:
        if number == 2:
            worker.request_reset("service")

    detector, worker, _ = run_rounds([k * 100 * MS for k in range(1, 6)], request_reset)
    assert worker.snapshot()["resets"] == {"service": 1}
    assert detector.resets == 1


def test_jump_in_an_overwritten_round_still_resets_the_detector() -> None:
    gate = threading.Event()
    detector = BlockingDetector(gate)
    done: list[Outcome] = []
    worker = DetectionWorker(detector, build, done.append, pytest.fail)
    worker.start()
    worker.submit(matched(100 * MS))
    assert detector.entered.wait(10)
    worker.submit(matched(200 * MS, after_jump=True))
    worker.submit(matched(300 * MS))
    gate.set()
    wait_for(lambda: len(done) == 2)
    worker.stop()
    assert worker.snapshot()["resets"] == {"backward_time": 1}


def test_pose_change_that_is_too_fast_resets_the_detector() -> None:
    monitor = StreamMonitor()

    def cause(stamp_s: float, x: float) -> str | None:
        pose = yaw_transform(0.0, (x, 0, 0))
        return monitor.cause_of_reset(
            CameraRound(views=(), reference_stamp_ns=int(stamp_s * 1e9), global_from_ego=pose)
        )

    assert [cause(1.0, 0), cause(1.5, 20), cause(2.0, 400), cause(2.5, 420)] == [
        None,
        None,
        "pose_jump",
        None,
    ]


def test_failures_are_reported_and_counted_and_the_worker_continues() -> None:
    calls: list[int] = []

    def fail_twice(round_: MatchedRound[str]) -> BuiltRound:
        calls.append(1)
        if len(calls) == 1:
            raise UserError("no transform")
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        built = build(round_)
        return BuiltRound(
            camera_round=built.camera_round, faults={"cam_front": "truncated"}, stage_ms=built.stage_ms
        )

    reports: list[str] = []
    done: list[Outcome] = []
    worker = DetectionWorker(BlockingDetector(), fail_twice, done.append, reports.append)
    worker.start()
    for number in range(3):
        worker.submit(matched((number + 1) * 100 * MS))
        wait_for(lambda expected=number: len(reports) > expected)
    wait_for(lambda: len(done) == 1)
    worker.stop()
    summary = worker.snapshot()
    assert reports == [
        "round dropped: no transform",
        "round dropped: RuntimeError: out of memory",
        "camera masked: truncated",
    ]
    assert summary["dropped"] == {"unusable": 1, "failed": 1, "shutdown": 0}
    assert summary["camera_faults"] == {"cam_front": 1}
    assert worker.recent_faults(60) == {"cam_front": "truncated"}
    assert worker.recent_faults(-1) == {}


class FullDetector(BlockingDetector):
    """Runs out of GPU memory in its second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def step(self, camera_round: CameraRound) -> ObjectList:
        self.calls += 1
        if self.calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nGPU 0 has ...")
        return super().step(camera_round)


def test_full_memory_stops_the_detector_with_one_report() -> None:
    detector, failures, reports = FullDetector(), [], []
    done: list[Outcome] = []
    worker = DetectionWorker(detector, build, done.append, reports.append, on_failure=failures.append)
    worker.start()
    for number in range(4):
        worker.submit(matched((number + 1) * 100 * MS))
        wait_for(lambda expected=number: len(done) + len(reports) > expected)
    worker.stop()
    assert detector.calls == 2 and len(done) == 1
    assert failures == [worker.failure] and worker.is_behind
    assert worker.failure is not None
    assert worker.failure.startswith("the detector is stopped, out of memory: CUDA out of memory. Tried to")
    assert worker.failure.endswith("deactivate, clean up, configure and activate the node")
    assert worker.snapshot()["dropped"]["failed"] == 3


class AcceleratorError(RuntimeError):
    """As torch.AcceleratorError of torch 2.8 and later."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (MemoryError(), "out of memory: MemoryError"),
        (RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested"), "memory"),
        (AcceleratorError("unspecified launch failure"), "the GPU reports an error"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "start the node again"),
    ],
)
def test_errors_that_no_later_round_survives_are_recognised(error: Exception, expected: str) -> None:
    reason = fatal_reason(error)
    assert reason is not None and expected in reason


@pytest.mark.parametrize("error", [ValueError("shape"), RuntimeError("singular matrix"), KeyError("x")])
def test_other_errors_drop_one_round_only(error: Exception) -> None:
    assert fatal_reason(error) is None


def test_queue_returns_the_newest_and_counts_the_others() -> None:
    box: RoundQueue[int] = RoundQueue()
    assert box.put(1) == 0
    assert box.put(2) == 1
    assert box.get() == (2, 0)
    box.put(3)
    assert box.close() == 1
    assert box.get() is None
    assert box.put(4) == 1
    assert box.close() == 0


@settings(max_examples=40, deadline=None)
@given(late=st.integers(0, 7), count=st.integers(1, 40))
def test_late_transforms_delay_all_rounds_and_drop_none(late: int, count: int) -> None:
    """Round i gets ready when round i + late is put; a fast detector takes each of them, in order."""
    newest = [0]
    box: RoundQueue[int] = RoundQueue(lambda item: item + late <= newest[0], timeout_s=60.0)
    taken = []
    for number in range(1, count + 1):
        newest[0] = number
        assert box.put(number) == 0
        if number > late:
            taken.append(box.get())
    assert taken == [(number, 0) for number in range(1, max(count - late, 0) + 1)]
    assert box.close() == min(late, count)


def test_rounds_without_transforms_are_returned_after_the_timeout_and_bounded() -> None:
    box: RoundQueue[int] = RoundQueue(lambda _: False, timeout_s=0.05)
    overwritten = sum(box.put(number) for number in range(20))
    assert overwritten == 20 - CAPACITY
    started = time.monotonic()
    assert box.get() == (12, 0)
    assert time.monotonic() - started >= 0.04
    assert box.get() == (13, 0)


def test_recent_rounds_are_judged_within_the_window() -> None:
    statistics = WorkerStatistics()
    statistics.add_record(RoundRecord(time_s=0.0, dropped="long ago"))
    for time_s, missing in ((8.0, ()), (9.0, ("back",)), (9.5, ("back",))):
        statistics.add_record(
            RoundRecord(time_s=time_s, missing=missing, latency_ms=20.0, stage_ms={"detect": 5.0})
        )
    statistics.add_record(RoundRecord(time_s=9.9, dropped="no transform"))
    recent = statistics.recent(["front", "back"], 10.0, 5.0)
    assert (recent.detected, recent.dropped, recent.partial) == (3, 1, 2)
    assert (recent.dropped_share, recent.partial_share) == (0.25, 2 / 3)
    assert (recent.last_drop, recent.last_partial) == ("no transform", "without back")
    assert recent.used == {"front": 1.0, "back": pytest.approx(1 / 3)}
    assert recent.silent_s == pytest.approx(0.5)
    assert recent.times_ms["detect"]["p95"] == 5.0 and recent.times_ms["stamp"]["p50"] is None
    later = statistics.recent(["front"], 60.0, 5.0)
    assert (later.detected, later.dropped, later.silent_s) == (0, 0, 50.5)


class SlowRig:
    """A rig without geometry for camera b and, before `pose_at`, without a pose; stores the waits."""

    cameras = ("a", "b")

    def __init__(self, pose_at: float = 0.0) -> None:
        self.pose_at = pose_at

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> np.ndarray:
        while time.monotonic() < self.pose_at:
            if time.monotonic() >= wait_until:
                raise UserError("no pose")
            time.sleep(0.001)
        return np.eye(4)

    def geometry(
        self, camera: str, frame_id: str, stamp_ns: int, image_size: tuple[int, int], wait_until: float
    ) -> CameraGeometry:
        if camera == "b":
            time.sleep(max(0.0, wait_until - time.monotonic()))
            raise UserError("b: no camera_info")
        return CameraGeometry(intrinsics=np.eye(3), ego_from_camera=np.eye(4), global_from_ego=np.eye(4))


def make_image_round(stamp_ns: int) -> MatchedRound[object]:
    message = SimpleNamespace(
        header=SimpleNamespace(frame_id=""), encoding="rgb8", width=2, height=2, step=6, is_bigendian=0,
        data=np.zeros(12, dtype=np.uint8),
    )  # fmt: skip
    return MatchedRound(messages=(message, message), stamps_ns=(stamp_ns, stamp_ns))


def test_late_transforms_are_waited_for() -> None:
    builder = RoundBuilder(SlowRig(time.monotonic() + 0.2), topics=("a", "b"), num_views=2, tf_timeout_s=0.5)
    assert builder.build(make_image_round(1)).faults == {
        "b": "b: no camera_info (waited for tf_timeout_s, 0.5 s)"
    }
    builder.close()


def test_camera_without_calibration_delays_only_three_rounds() -> None:
    builder = RoundBuilder(SlowRig(), topics=("a", "b"), num_views=2, tf_timeout_s=0.05)
    waits = [builder.build(make_image_round(1 + number)).stage_ms["geometry"] for number in range(6)]
    assert min(waits[:3]) >= 45 and max(waits[3:]) < 45
    builder.close()


def test_reference_stamp_follows_its_rule() -> None:
    full: MatchedRound[str] = MatchedRound(messages=("a", "b", "c"), stamps_ns=(100, 130, 115))
    assert [reference_stamp_ns(full, rule, anchor=2) for rule in ("latest", "anchor", "mean")] == [
        130,
        115,
        115,
    ]
    partial: MatchedRound[str] = MatchedRound(messages=("a", "b", None), stamps_ns=(100, 130, None))
    assert [reference_stamp_ns(partial, rule, anchor=2) for rule in ("latest", "anchor", "mean")] == [
        130,
        130,
        115,
    ]
