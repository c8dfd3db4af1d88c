# SPDX-License-Identifier: Apache-2.0
"""`training.validate`: known metrics, equality with `ftkd_core.evaluation`, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import BackboneConfig
from ftkd_core.data.nuscenes import camera_round, ground_truth, open_dataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic.varied_rigs import draw_rig
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.resnet import ResNet
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, ObjectList
from ftkd_core.weights import save_weights
from tests.core.helpers import small_config
from training.validate import SCORE_THRESHOLD, ValidateOptions, evaluate_detector, main, validate

VERSION, SPLIT = "v1.0-synth", "held_out"
SCENES = 2


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of two short scenes."""
    folder = tmp_path_factory.mktemp("synth") / "data"
    return write_dataset(
        folder, (900_002, 900_005), version=VERSION, split=SPLIT, width=352, height=198, duration_s=1.5,
        sweeps=False, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small student."""
    torch.manual_seed(0)
    config = small_config()
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_weights(path, build_stream_petr(config).state_dict(), config)
    return path


class TruthDetector(Detector):
    """A detector that returns the ground truth, and objects of the wrong class if `labels_off` is set."""

    def __init__(self, dataroot: Path, labels_off: int = 0) -> None:
        dataset = open_dataset(dataroot, VERSION)
        tokens = sample_tokens_of(dataset, split=SPLIT)
        self.truths = [ground_truth(dataset, token, min_points=1) for token in tokens]
        self.labels_off, self.resets = labels_off, 0
        self.channels = CAMERA_CHANNELS
        self.cameras = VirtualCameras((), small_config().image, CAMERA_CHANNELS)
        self.device = torch.device("cpu")
        self.weights_name = "truth"

    def reset(self) -> None:
        self.resets += 1

    def step(self, camera: CameraRound) -> ObjectList:
        truth = self.truths.pop(0)
        boxes = np.nan_to_num(truth.boxes)
        labels = (truth.labels + self.labels_off) % 10
        return ObjectList(boxes=boxes, scores=truth.scores, labels=labels, stamp_ns=truth.stamp_ns)


def test_ground_truth_scores_perfectly_and_wrong_classes_score_zero(dataroot: Path) -> None:
    detector = TruthDetector(dataroot)
    frames = len(detector.truths)
    metrics = evaluate_detector(detector, dataroot, VERSION, SPLIT)
    assert metrics["mAP_present"] == pytest.approx(1.0, abs=1e-6)
    present = [own for own in metrics["classes"].values() if own["truths"]]
    assert present and all(own["AP"] == pytest.approx(1.0) and own["ATE"] < 1e-3 for own in present)
    assert metrics["frames"] == frames > SCENES
    assert detector.resets == SCENES, "the memory is cleared before each scene"
    wrong = evaluate_detector(TruthDetector(dataroot, labels_off=5), dataroot, VERSION, SPLIT)
    assert wrong["mAP_present"] < 0.05


def test_metrics_equal_those_of_the_same_detections(
    dataroot: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "metrics.json"
    arguments = ["--dataroot", str(dataroot), "--weights", str(weights), "--device", "cpu"]
    assert main([*arguments, "--output", str(output)]) == 0
    printed, _, last = capsys.readouterr().out.strip().rpartition("\n")
    metrics = json.loads(printed)
    assert metrics == json.loads(output.read_text()) and last == f"wrote {output}"

    dataset = open_dataset(dataroot, VERSION)
    tokens = sample_tokens_of(dataset, split=SPLIT)
    detections, seen = {}, set()
    detector = Detector.from_weights(weights, device="cpu", score_threshold=SCORE_THRESHOLD)
    for token in tokens:
        scene = dataset.get("sample", token)["scene_token"]
        if scene not in seen:
            detector.reset()
        seen.add(scene)
        camera = camera_round(dataset, token, detector.channels)
        detections[token] = PosedObjects(detector.step(camera), camera.global_from_ego)
    assert sum(len(found.objects.boxes) for found in detections.values()) > 0
    expected = evaluate(dataset, to_devkit_results(detections, tokens), sample_tokens=tokens)
    assert {name: metrics[name] for name in expected} == json.loads(json.dumps(expected))
    assert metrics["frames"] == len(tokens) and metrics["step_ms_median"] > 0
    assert metrics["machine"]["device"] == "cpu" and metrics["split"] == SPLIT
    assert str(weights.name) in metrics["weights"]


def test_function_and_command_give_the_same_metrics(
    dataroot: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = validate(ValidateOptions(dataroot=dataroot, weights=weights, device="cpu"))
    assert main(["--dataroot", str(dataroot), "--weights", str(weights), "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {**printed, "step_ms_median": 0} == json.loads(json.dumps({**found, "step_ms_median": 0}))


def test_bad_input_is_reported_in_one_sentence_with_exit_code_2(
    dataroot: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = tmp_path / "backbone.safetensors"
    save_weights(backbone, ResNet(18, 8).state_dict(), BackboneConfig(depth=18, base_channels=8))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:1000])
    output = tmp_path / "metrics.json"
    base = ["--weights", str(weights), "--dataroot", str(dataroot), "--device", "cpu"]
    for more, message in (
        (["--dataroot", str(tmp_path / "none")], "none"),
        (["--version", "v1.0-mini"], "v1.0-mini"),
        (["--split", "other"], "other"),
        (["--weights", str(tmp_path / "none.safetensors")], "none.safetensors' not found"),
        (["--weights", str(backbone)], "are of kind BackboneConfig; expected DetectorConfig"),
        (["--weights", str(damaged)], "damaged.safetensors"),
        (["--device", "abacus"], "abacus"),
    ):
        assert main([*base, "--output", str(output), *more]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("detect")]
        assert len(error) == 1 and error[0].startswith("validation: ") and message in error[0], error
    assert not output.exists()


def test_each_scene_of_another_rig_is_seen_through_virtual_cameras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three scenes with three rigs, of which two are drawn, one with fewer cameras than the weights."""
    seeds = [next(s for s in range(200) if len(draw_rig(s).true.channels) == n) for n in (4, 5)]
    folder = write_dataset(
        tmp_path / "data", seeds, version=VERSION, split=SPLIT, width=160, height=None, duration_s=0.5,
        sweeps=False, progress=False, rig="varied",
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    see = VirtualCameras.see

    def noted(self: VirtualCameras, camera_round: CameraRound, **options: bool) -> CameraRound:
        result = see(self, camera_round, **options)
        seen.append((len(camera_round.views), len({camera.camera for camera in self.seen})))
        return result

    monkeypatch.setattr(VirtualCameras, "see", noted)
    detector = Detector.from_weights(device="cpu", runtime="plain", score_threshold=0.99)
    metrics = evaluate_detector(detector, folder, VERSION, SPLIT)
    assert metrics["frames"] == 2
    assert seen == [(4, 4), (5, 5)]  # cameras of the scene before are forgotten


def test_camera_model_is_passed_to_the_detector(dataroot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataroot", str(dataroot), "--camera-model", "crystal"]) == 2
    assert "camera_model 'crystal': expected one of auto, virtual, as_is" in capsys.readouterr().err
