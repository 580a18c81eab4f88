"""A bad input gets an error that names the argument and says what was expected."""

import pytest
import torch

from powerflow_fast import linear_logprobs, paired_linear_logprobs
from tests.test_head import draw


@pytest.mark.parametrize(
    "name, change",
    [
        ("targets", {"targets": torch.full((13,), 101)}),
        ("targets", {"targets": torch.full((13,), -1)}),
        ("targets", {"targets": torch.zeros(12, dtype=torch.int64)}),
        ("targets", {"targets": torch.zeros(13, dtype=torch.int32)}),
        ("hidden", {"hidden": torch.randn(13, 23)}),
        ("hidden", {"hidden": torch.zeros(13, 24, dtype=torch.int64)}),
        ("weight", {"weight": torch.randn(24)}),
        ("weight", {"weight": torch.randn(0)}),
        ("bias", {"bias": torch.randn(100)}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("softcap", {"softcap": -1.0}),
        ("logit_scale", {"logit_scale": float("inf")}),
        ("backend", {"backend": "cuda"}),
        ("grad_tolerance", {"grad_tolerance": -0.1}),
        ("return_entropy", {"return_entropy": "yes"}),
        ("round_logits", {"round_logits": "no"}),
        ("process_group", {"process_group": "default"}),
    ],
)
def test_bad_input_names_the_argument(name, change):
    hidden, weight, targets, _ = draw()
    args = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        linear_logprobs(**args)


def test_bad_reference_names_the_argument():
    hidden, weight, targets, _ = draw()
    with pytest.raises(ValueError, match="^ref_hidden: expected"):
        paired_linear_logprobs(hidden, weight, targets, torch.randn(13, 8))
    with pytest.raises(ValueError, match="^ref_weight: expected"):
        paired_linear_logprobs(hidden, weight, targets, hidden, torch.randn(99, 24))
