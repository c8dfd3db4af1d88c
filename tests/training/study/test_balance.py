# SPDX-License-Identifier: Apache-2.0
"""Balancing: every part of a method gets its share of the detection loss."""

import pytest
import torch

from ftkd_core.distillation.methods import method_config
from tests.training.helpers import distiller_of, paired_data, small_teacher, streaming_task
from training.distiller import is_distillation_term
from training.study.balance import balance, balanced, measure_terms


@pytest.mark.parametrize("method", ["ftkd", "ftkd_no_bev", "logits", "mgd", "stxd"])
def test_every_part_gets_about_its_share(method: str) -> None:
    student = streaming_task("").detector
    config, measured = balance(
        small_teacher(), student, method_config(method), paired_data(), streams=2, share=0.1, batches=2
    )
    task = streaming_task(method)
    distiller_of(task).method.config = config
    detection = sum(value for name, value in measured.items() if not is_distillation_term(name))
    terms = measure_terms(task, paired_data(), 2, torch.device("cpu"))
    for part in ("ftkd/pv", "ftkd/bev", "ftkd/logits", "mgd", "stxd"):
        total = sum(value for name, value in terms.items() if name.startswith(part))
        if total:  # this task has other random generators, so the share is only approximate
            assert 0.02 < total / detection < 0.5, part


def test_weights_scale_with_the_measured_terms() -> None:
    ftkd, mgd = method_config("ftkd"), method_config("mgd")
    terms = {"layer0/box": 10.0, "ftkd/bev": 4.0}
    assert balanced(ftkd, terms, 0.1).bev_weight == pytest.approx(0.25 * ftkd.bev_weight)  # type: ignore[union-attr]
    terms = {"layer0/box": 10.0, "mgd/16": 2.0}
    assert balanced(mgd, terms, 0.1).weight == pytest.approx(0.5 * mgd.weight)  # type: ignore[union-attr]


def test_frozen_backbone_keeps_its_statistics() -> None:
    def statistics_after(frozen_backbone: bool) -> dict[str, torch.Tensor]:
        student = streaming_task("").detector
        balance(
            small_teacher(), student, method_config("mgd"), paired_data(), streams=2, share=0.1, batches=1,
            frozen_backbone=frozen_backbone,
        )  # fmt: skip
        return {name: value for name, value in student.state_dict().items() if "running_mean" in name}

    start = streaming_task("").detector.state_dict()
    trained, frozen = statistics_after(False), statistics_after(True)
    backbone = [name for name in frozen if name.startswith("backbone.")]
    assert backbone and all(torch.equal(frozen[name], start[name]) for name in backbone)
    assert not any(torch.equal(trained[name], start[name]) for name in backbone)
