"""What tb_loss and fused_linear_tb_loss refuse names the argument."""

import pytest
import torch

from powerflow_fast import fused_linear_tb_loss, tb_loss
from tests.test_loss import CU_SEQLENS, head_inputs, tokens


@pytest.mark.parametrize(
    "name, change",
    [
        ("ref_logps", {"ref_logps": torch.zeros(10)}),
        ("old_logps", {"old_logps": torch.zeros(12)}),
        ("mask", {"mask": torch.ones(12)}),
        ("mask", {"mask": [1] * 11}),
        ("mask", {"mask": torch.full((11,), 0.5)}),
        ("mask", {"mask": torch.full((11,), 2)}),
        ("mask", {"mask": torch.full((11,), float("nan"))}),
        ("logps", {"logps": torch.zeros(11).tolist()}),
        ("logps", {"logps": torch.full((11,), float("nan"))}),
        ("ref_logps", {"ref_logps": [0.0] * 11}),
        ("old_logps", {"old_logps": [0.0] * 11}),
        ("alpha", {"alpha": "4"}),
        ("alpha", {"alpha": [2.0] * 4}),
        ("psi", {"psi": [0.0] * 4}),
        ("log_z", {"log_z": [0.0] * 4}),
        ("normalizer", {"normalizer": [4]}),
        ("group_size", {"log_z": "group", "group_size": "2"}),
        ("alpha", {"alpha": 0.0}),
        ("alpha", {"alpha": None}),
        ("alpha", {"alpha": torch.ones(3)}),
        ("alpha", {"alpha": torch.tensor([1.0, 1.0, -1.0, 1.0])}),
        ("psi", {"psi": float("nan")}),
        ("psi", {"psi": torch.zeros(5)}),
        ("log_z", {"log_z": None}),
        ("log_z", {"log_z": "groups"}),
        ("log_z", {"log_z": torch.zeros(5)}),
        ("log_z", {"log_z": torch.full((4,), torch.inf)}),
        ("log_z='group'", {"log_z": "group"}),
        ("group_size", {"log_z": "group", "group_size": 1}),
        ("group_size", {"log_z": "group", "group_size": 3}),
        ("group_size", {"log_z": "group", "group_size": 2.0}),
        ("group_ids", {"log_z": "group", "group_ids": torch.tensor([0, 0, 0, 1])}),
        ("group_ids", {"log_z": "group", "group_ids": torch.tensor([0, 0])}),
        ("group_ids", {"log_z": "group", "group_ids": [0, 0, 1, 1]}),
        ("balance", {"balance": "tokens"}),
        ("importance", {"importance": "max"}),
        ("backend", {"backend": "cuda"}),
        ("clip_eps", {"clip_eps": -0.1}),
        ("clip_eps", {"clip_eps": None}),
        ("normalizer", {"normalizer": 0}),
        ("normalizer", {"normalizer": "4"}),
        ("normalizer", {"normalizer": torch.tensor(0)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 3, 2, 9, 11])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 3, 4, 9, 10])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 3, 4, 9, 11])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 11.0])}),
        ("cu_seqlens", {"cu_seqlens": [0, 3, 4, 9, 11]}),
        ("logps", {"cu_seqlens": None}),
    ],
)
def test_bad_input_names_the_argument(name, change):
    logps, ref_logps, _ = tokens()
    keywords = {"ref_logps": ref_logps, "log_z": 0.0, "alpha": 2.0, "cu_seqlens": CU_SEQLENS}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        tb_loss(**{"logps": logps} | keywords | change)


def test_fused_needs_exactly_one_reference():
    hidden, weight, targets, ref_hidden, keywords = head_inputs()
    for ref in ({}, {"ref_hidden": ref_hidden, "ref_logps": torch.zeros(11)}):
        with pytest.raises(ValueError, match="^ref_hidden, ref_logps: expected exactly one"):
            fused_linear_tb_loss(hidden, weight, targets, log_z=0.0, alpha=2.0, **ref, **keywords)
    with pytest.raises(TypeError, match="colour"):
        fused_linear_tb_loss(
            hidden, weight, targets, ref_hidden, log_z=0.0, alpha=2.0, colour=1, **keywords
        )


def test_groups_beside_a_given_log_z_are_refused():
    logps = -torch.rand(4, 3)
    for options in ({"group_size": 2}, {"group_ids": torch.tensor([0, 0, 1, 1])}):
        with pytest.raises(ValueError, match="group_size, group_ids: have no effect"):
            tb_loss(logps, logps, log_z=0.1, alpha=2.0, **options)


@pytest.mark.parametrize("name", ["ref_logps", "old_logps"])
def test_log_probs_that_are_not_finite_are_named_where_they_count(name):
    values = {"ref_logps": -torch.rand(2, 3), "old_logps": -torch.rand(2, 3)}
    values[name][1, 2] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    options = dict(log_z=0.0, alpha=2.0, old_logps=values["old_logps"], mask=mask)
    with pytest.raises(ValueError, match=rf"{name}: expected finite .* got nan at \[1, 2\]"):
        tb_loss(-torch.rand(2, 3), values["ref_logps"], **options)
    mask[1, 2] = False
    assert tb_loss(-torch.rand(2, 3), values["ref_logps"], **options).loss.isfinite()
