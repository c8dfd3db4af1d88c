# SPDX-License-Identifier: Apache-2.0
"""Import of public checkpoints: complete key maps, refusals, and the command."""

import math
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import BackboneConfig
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.resnet import ResNet
from ftkd_core.presets import preset
from ftkd_core.weights import (
    check_fit,
    load_backbone,
    load_into,
    read_backbone,
    read_weights,
    read_window_weights,
    save_weights,
    start_from,
)
from ftkd_core.weights.importing import FORMATS, format_lines, import_weights, plan_import
from ftkd_core.weights.importing.conventions import NEW_BOXES, OLD_BOXES, model_from_ego
from ftkd_core.weights.importing.formats import blank_model, find_format
from ftkd_core.weights.importing.key_map import Rule, convert
from ftkd_ros.cli import main
from tests.core.public_shapes import HEAD, PUBLIC, public_state


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 checkpoint in the form of torchvision."""
    path = tmp_path_factory.mktemp("public") / "resnet18.pth"
    torch.save(public_state(PUBLIC["torchvision_resnet18"]()), path)
    return path


def changed(path: Path, into: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Save a copy of a checkpoint with a changed state."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, into)
    return into


# -- the key maps ----------------------------------------------------------------------------------------


def test_public_shapes_describe_every_format() -> None:
    assert [public.name for public in FORMATS] == list(PUBLIC)
    assert [line.split()[0] for line in format_lines()] == list(PUBLIC)


@pytest.mark.parametrize("name", list(PUBLIC))
def test_a_key_map_covers_both_sides_exactly_once(name: str) -> None:
    public = find_format(name)
    config = public.configure(CLASS_NAMES)
    key_map = public.map_keys(config, NEW_BOXES)
    described = PUBLIC[name]()

    sources = Counter(n for rule in key_map.rules for n in (rule.source, *rule.copies))
    sources += Counter(constant.source for constant in key_map.constants)
    assert set(sources.values()) == {1}
    assert key_map.shapes() == {n: s for n, s in described.items() if not key_map.ignores(n)}
    assert not any(key_map.ignores(n) for n in sources)

    ours = {n: tuple(t.shape) for n, t in blank_model(config).state_dict().items()}
    targets = Counter(target for rule in key_map.rules for target in rule.targets)
    assert set(targets.values()) == {1}
    assert targets.keys() == ours.keys()
    for rule in key_map.rules:
        converted = rule.convert(torch.zeros(rule.shape))
        assert [tuple(t.shape) for t in converted] == [ours[target] for target in rule.targets], rule.source


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("stream_petr_r50_428q", 36_071_896),
        ("stream_petr_r50_900q", 36_072_928),
        ("sparse_bev_r50", 44_570_089),
        ("sparse_bev_r50_400q", 44_565_089),
        ("sparse_bev_r101", 63_566_329),
    ],
)
def test_models_have_as_many_parameters_as_the_public_ones(name: str, count: int) -> None:
    """The counts are those of the public models."""
    parameters = dict(blank_model(find_format(name).configure(CLASS_NAMES)).named_parameters())
    head = {n: p for n, p in parameters.items() if n.startswith("auxiliary.")}
    assert sum(p.numel() for n, p in parameters.items() if n not in head) == count
    assert sum(p.numel() for p in head.values()) == (1_185_553 if name.startswith("stream") else 0)


def back_codes(codes: Tensor, boxes: str) -> Tensor:
    """Convert codes (..., 10) of ours to a public convention: length before width, or heading -angle -
    pi/2."""
    x, y, z, width, length, height, sin, cos, vx, vy = codes.unbind(-1)
    sizes, angle = ((length, width), (sin, cos)) if boxes == NEW_BOXES else ((width, length), (-cos, -sin))
    return torch.stack([x, y, z, *sizes, height, *angle, vx, vy], dim=-1)


def back_offsets(parameter: Tensor, boxes: str) -> Tensor:
    """Convert our offsets along length, width, height to the public model's: in the old convention width,
    -length, height."""
    if boxes == NEW_BOXES:
        return parameter
    length, width, height = parameter.unflatten(0, (-1, 3)).unbind(1)
    return torch.stack([width, -length, height], dim=1).flatten(0, 1)


def back(rule: Rule, parts: list[Tensor], boxes: str) -> Tensor:
    """Invert the conversion of a rule."""
    if rule.targets[0].endswith(("regressor.4.weight", "regressor.4.bias")):
        return back_codes(parts[0].movedim(0, -1), boxes).movedim(-1, 0)
    if rule.targets[0] == "query_boxes":
        return back_codes(parts[0], boxes)
    if ".sampling_offset." in rule.targets[0]:
        return back_offsets(parts[0], boxes)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("boxes", [NEW_BOXES, OLD_BOXES])
@pytest.mark.parametrize("name", list(PUBLIC))
def test_inverse_conversion_gives_back_every_public_tensor(name: str, boxes: str) -> None:
    public = find_format(name)
    if boxes == OLD_BOXES and not name.startswith("sparse_bev"):
        boxes = NEW_BOXES  # the others have no other convention
    key_map = public.map_keys(public.configure(CLASS_NAMES), boxes)
    pool = torch.randn(9_000_000, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for place, rule in enumerate(key_map.rules):
        size = math.prod(rule.shape)
        values = pool[1013 * place % 500_000 :][:size].view(rule.shape)
        tensors[rule.source] = torch.tensor(place) if rule.optional else values
    ours = convert(key_map, tensors)
    for rule in key_map.rules:
        found = back(rule, [ours[target] for target in rule.targets], boxes)
        assert found.equal(tensors[rule.source]), rule.source


def test_an_imported_stream_petr_loads_into_our_model(tmp_path: Path) -> None:
    state = public_state(PUBLIC["stream_petr_r50_428q"]())
    order = (*CLASS_NAMES[1:], CLASS_NAMES[0])
    torch.save({"state_dict": state, "meta": {"CLASSES": order, "epoch": 60}}, tmp_path / "public.pth")
    plan = plan_import(tmp_path / "public.pth")
    assert plan.public.name == "stream_petr_r50_428q"
    written = import_weights(plan, tmp_path / "ours.safetensors")

    ours, config, notes = read_weights(written)
    load_into(build_stream_petr(config), ours, "written")
    assert notes["format"] == "stream_petr_r50_428q"
    assert config.class_names == order
    assert config.model_from_ego == model_from_ego()
    assert config.auxiliary_kind == "focal"
    assert ours["auxiliary.ltrb.bias"].equal(state["img_roi_head.ltrb.bias"])
    assert config.decoder.as_published
    packed = torch.cat(
        [ours[f"layers.4.cross_attention.{part}.weight"] for part in ("query", "key", "value")]
    )
    assert packed.equal(state[f"{HEAD}transformer.decoder.layers.4.attentions.1.attn.in_proj_weight"])
    public = state[f"{HEAD}reg_branches.0.4.weight"]
    assert ours["regressor.4.weight"][[0, 1, 2, 4, 3, 5, 6, 7, 8, 9]].equal(public)


def test_an_imported_sparse_bev_loads_into_our_model(tmp_path: Path) -> None:
    state = public_state(PUBLIC["sparse_bev_r50_400q"]())
    torch.save({"state_dict": state, "version": OLD_BOXES}, tmp_path / "public.pth")
    plan = plan_import(tmp_path / "public.pth")
    assert (plan.public.name, plan.boxes) == ("sparse_bev_r50_400q", OLD_BOXES)
    ours, config, notes = read_window_weights(import_weights(plan, tmp_path / "ours.safetensors"))
    check_fit(blank_model(config), ours, "written")
    assert config.decoder.num_queries == 400
    assert notes["boxes"] == OLD_BOXES
    boxes = state[f"{HEAD}init_query_bbox.weight"]
    assert ours["query_boxes"][:, 6].equal(-boxes[:, 7])


def test_an_imported_backbone_loads_into_a_detector(tmp_path: Path, resnet18: Path) -> None:
    plan = plan_import(resnet18)
    assert plan.public.name == "torchvision_resnet18"
    written = import_weights(plan, tmp_path / "backbone.safetensors")
    state, config, _ = read_backbone(written)
    assert config.depth == 18
    public_state_dict = torch.load(resnet18, weights_only=True)
    assert all(state[name].equal(public_state_dict[name]) for name in state)

    model = nn.Module()
    model.backbone = ResNet(18)
    load_backbone(written, model, BackboneConfig(depth=18))
    assert model.backbone.layer4[1].conv2.weight.equal(public_state_dict["layer4.1.conv2.weight"])
    with pytest.raises(UserError, match="expected a ResNet-50"):
        load_backbone(written, model, BackboneConfig(depth=50))
    with pytest.raises(UserError, match="are of kind BackboneConfig; expected"):
        read_weights(written)


def test_a_model_is_initialised_from_a_backbone_or_a_whole_model(tmp_path: Path, resnet18: Path) -> None:
    config = preset("r18_352x128")
    model = build_stream_petr(config)
    start_from(import_weights(plan_import(resnet18), tmp_path / "backbone.safetensors"), model, config)
    public_state_dict = torch.load(resnet18, weights_only=True)
    assert model.backbone.conv1.weight.equal(public_state_dict["conv1.weight"])
    save_weights(tmp_path / "model.safetensors", model.state_dict(), config, half=False)
    other = build_stream_petr(config)
    start_from(tmp_path / "model.safetensors", other, config)
    assert other.reference_points.equal(model.reference_points)
    with pytest.raises(UserError, match="not found"):
        start_from(tmp_path / "nothing.safetensors", other, config)


def test_counters_missing_in_old_files_are_zero(tmp_path: Path, resnet18: Path) -> None:
    def drop(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.endswith("num_batches_tracked")]:
            del state[name]

    plan = plan_import(changed(resnet18, tmp_path / "old.pth", drop))
    assert plan.state()["bn1.num_batches_tracked"] == 0


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(extra=torch.zeros(1)), r"1 tensor is unknown \(extra\)"),
        (lambda s: s.pop("layer2.0.conv1.weight"), r"1 tensor is missing \(layer2.0.conv1.weight\)"),
        (
            lambda s: s.update({"bn1.bias": torch.zeros(3)}),
            r"of another shape \(bn1.bias \(3,\) for \(64,\)\)",
        ),
        (lambda s: s.update({"bn1.bias": "text"}), r"'bn1.bias' is a str"),
    ],
)
def test_tensors_that_do_not_fit_are_listed_and_refused(
    tmp_path: Path, resnet18: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    bad = changed(resnet18, tmp_path / "bad.pth", change)
    with pytest.raises(UserError, match=message):
        import_weights(plan_import(bad), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_other_constants_and_differing_copies_of_shared_heads_are_refused(tmp_path: Path) -> None:
    state = public_state(PUBLIC["stream_petr_r50_428q"]())
    state[f"{HEAD}pc_range"] = torch.tensor([-54.0, -54.0, -5.0, 54.0, 54.0, 3.0])
    state[f"{HEAD}cls_branches.3.6.bias"] = torch.ones(10)
    torch.save({"state_dict": state}, tmp_path / "bad.pth")
    with pytest.raises(
        UserError, match=r"2 tensors are of unexpected values .*cls_branches.3.6.bias \(differs"
    ):
        plan_import(tmp_path / "bad.pth").check()


class CodeOnUnpickling:
    """An object that executes code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, ("raise SystemExit('code in the file ran')",)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"conv1.weight": torch.zeros(1)}, "hook": CodeOnUnpickling()}, tmp_path / "bad.pth"
    )
    with pytest.raises(UserError, match=r"reading its [\w.]*exec would run code .*save its tensors alone"):
        plan_import(tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(CodeOnUnpickling()))
    with pytest.raises(UserError, match="would run code|damaged"):
        plan_import(tmp_path / "plain.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 5000, -1000])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"cut{suffix}"
    state = {"conv1.weight": torch.randn(64, 3, 7, 7)}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot be read"):
        plan_import(path)


def test_other_files_are_refused(tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        plan_import(tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="contains a list"):
        plan_import(tmp_path / "list.pth")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no known format"):
        plan_import(tmp_path / "other.pth")
    with pytest.raises(UserError, match="unknown format 'x'"):
        plan_import(resnet18, "x")
    with pytest.raises(UserError, match="looks like torchvision_resnet34"):
        plan_import(resnet18, "torchvision_resnet34").check()


def test_unknown_box_versions_and_classes_are_refused(tmp_path: Path) -> None:
    state = public_state(PUBLIC["sparse_bev_r50_400q"]())
    torch.save({"state_dict": state, "version": "v0.5"}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"version 'v0.5'"):
        plan_import(tmp_path / "a.pth")
    torch.save({"state_dict": state, "meta": {"CLASSES": ["car", "tree"]}}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="classes car, tree"):
        plan_import(tmp_path / "b.pth")


def test_an_output_is_never_overwritten(tmp_path: Path, resnet18: Path) -> None:
    output = tmp_path / "mine.safetensors"
    output.write_text("precious")
    with pytest.raises(UserError, match="nothing is overwritten"):
        import_weights(plan_import(resnet18), output)
    assert output.read_text() == "precious"
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        import_weights(plan_import(resnet18), tmp_path / "mine.pth")


# -- the command -----------------------------------------------------------------------------------------


def test_the_command_lists_checks_and_imports(
    tmp_path: Path, resnet18: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-weights", "--list-formats"]) == 0
    assert "stream_petr_r50_900q" in capsys.readouterr().out
    assert main(["import-weights", "--dry-run", str(resnet18)]) == 0
    printed = capsys.readouterr().out
    assert "torchvision_resnet18" in printed
    assert "120 tensors map to ours (backbone), 2 of training-only parts do not" in printed
    output = tmp_path / "out.safetensors"
    assert main(["import-weights", str(resnet18), "--output", str(output)]) == 0
    assert output.is_file()
    assert main(["import-weights", str(resnet18), "--output", str(output)]) == 2
    assert main(["import-weights", str(resnet18)]) == 2
    assert main(["import-weights", "--dry-run"]) == 2


def test_a_dry_run_lists_every_fault(
    tmp_path: Path, resnet18: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = changed(
        resnet18, tmp_path / "bad.pth", lambda s: (s.pop("bn1.bias"), s.update(extra=torch.zeros(1)))
    )
    assert main(["import-weights", "--dry-run", str(bad)]) == 2
    captured = capsys.readouterr()
    assert "missing: bn1.bias" in captured.out
    assert "unknown: extra" in captured.out
    assert captured.err.count("\n") == 1
