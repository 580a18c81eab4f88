"""A bad input gets an error that names the argument and says what was expected."""

import inspect
import warnings

import pytest
import torch

from powerflow_fast import (
    FusedLinearTBLoss,
    fused_linear_tb_loss,
    linear_logprobs,
    paired_linear_logprobs,
    tb_loss,
)
from powerflow_fast.head import HeadKeywords
from powerflow_fast.loss import TBKeywords
from tests.test_head import draw
from tests.test_loss import CU_SEQLENS, head_inputs, tokens

OFFSETS = torch.tensor([0, 5, 13])


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
        ("validate", {"validate": None}),
        ("check_finite", {"check_finite": 0}),
        ("hidden", {"hidden": [[0.0] * 24] * 13}),
        ("weight", {"weight": torch.nn.Linear(24, 101)}),
        ("targets", {"targets": [1] * 13}),
        ("bias", {"bias": [0.0] * 101}),
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


def test_a_transposed_weight_is_told():
    hidden, weight, targets, _ = draw()
    said = r"weight: looks transposed: expected \[V, H\] with H = 24 .* got \(24, 101\)"
    with pytest.raises(ValueError, match=f"^{said}"):
        linear_logprobs(hidden, weight.T, targets)
    with pytest.raises(
        ValueError, match=f"^ref_{said.replace('as in hidden', 'as in ref_hidden')}"
    ):
        paired_linear_logprobs(hidden, weight, targets, hidden, weight.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "ref_hidden", "ref_weight"])
def test_the_input_that_is_not_finite_is_named(name, value):
    hidden, weight, targets, bias = draw(bias=True)
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    given |= {"ref_hidden": hidden.clone(), "ref_weight": weight.clone()}
    given[name].flatten()[24 * 3] = value  # of hidden, the token at 3
    place = r" on every counted token, got nan or inf at \[3\]" if "hidden" in name else ", got"
    with pytest.raises(ValueError, match=f"^{name}: expected finite numbers{place}"):
        paired_linear_logprobs(targets=targets, **given)
    logps, ref_logps = paired_linear_logprobs(targets=targets, check_finite=False, **given)
    assert (ref_logps if "ref" in name else logps).isnan().any()


def test_a_vocabulary_padded_with_minus_infinity_is_fine():
    hidden, weight, targets, bias = draw(bias=True)
    bias[90:], targets[targets >= 90] = -torch.inf, 0
    assert linear_logprobs(hidden, weight, targets, bias=bias).isfinite().all()
    targets[5] = 95
    assert linear_logprobs(hidden, weight, targets, bias=bias)[5] == -torch.inf


def the_same(hidden):
    """Ways in which one tensor comes twice, and ways in which two only look alike."""
    return [hidden, hidden.detach(), hidden.view(13, 24)], [hidden.clone(), hidden[::1] * 1]


def test_a_reference_that_is_the_policy_is_told():
    hidden, weight, targets, _ = draw()
    same, other = the_same(hidden)

    def fused(*call):
        return fused_linear_tb_loss(*call, cu_seqlens=OFFSETS, log_z=0.0, alpha=2.0)

    for function in (paired_linear_logprobs, fused):
        for ref_hidden in same:
            with pytest.warns(UserWarning, match=r"ref_hidden: it is hidden itself.*disable_adap"):
                function(hidden, weight, targets, ref_hidden)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for ref_hidden in other:
                function(hidden, weight, targets, ref_hidden)
            function(hidden, weight, targets, hidden, weight.clone())  # a reference of its own


def test_the_hint_comes_once_for_a_line_of_the_callers():
    hidden, weight, targets, _ = draw()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            paired_linear_logprobs(hidden, weight, targets, hidden)
    assert len(seen) == 1 and seen[0].filename == __file__


def test_the_hint_breaks_no_graph():
    torch._dynamo.reset()
    hidden, weight, targets, _ = draw()
    call = (hidden, weight, targets, hidden)
    compiled = torch.compile(paired_linear_logprobs, fullgraph=True, backend="aot_eager")
    logps, ref_logps = compiled(*call)
    torch.testing.assert_close(logps, linear_logprobs(*call[:3]))
    assert torch.equal(logps, ref_logps)


@pytest.mark.parametrize(
    ("function", "name", "near"),
    [
        (paired_linear_logprobs, "temprature", "temperature"),
        (paired_linear_logprobs, "reference_bias", "ref_bias"),
        (fused_linear_tb_loss, "soft_cap", "softcap"),
        (fused_linear_tb_loss, "cu_seqlen", "cu_seqlens"),
        (FusedLinearTBLoss, "groupsize", "group_size"),
    ],
)
def test_an_unknown_keyword_is_told_with_the_nearest(function, name, near):
    hidden, weight, targets, _ = draw()
    options = {"log_z": 0.0, "alpha": 2.0} if function is not paired_linear_logprobs else {}
    call = () if function is FusedLinearTBLoss else (hidden, weight, targets, hidden.clone())
    said = rf"^{function.__name__}\(\) got an unexpected keyword argument '{name}'; did you mean"
    with pytest.raises(TypeError, match=f"{said} '{near}'"):
        function(*call, **options, **{name: 1})


@pytest.mark.parametrize("mask", [torch.arange(6) < 3, torch.arange(6) % 2, torch.ones(6)], ids=str)
def test_masks_of_two_values_are_fine(mask):
    hidden, weight, targets, ref_hidden, _ = head_inputs()
    call = (hidden[:6], weight, targets[:6], ref_hidden[:6])
    options = {"log_z": 0.0, "alpha": 2.0, "cu_seqlens": torch.tensor([0, 4, 6])}
    out = fused_linear_tb_loss(*call, mask=mask, **options)
    assert out.lengths.sum() == mask.sum()
    with pytest.raises(ValueError, match="^mask: expected true and false, or 1 and 0, got 3"):
        fused_linear_tb_loss(*call, mask=3 * mask.int(), **options)


def test_a_learned_log_z_is_the_trainers():
    logps, ref_logps, _ = tokens()
    with pytest.raises(ValueError, match="^log_z: 'learned' .* the output .* of a LogZHead"):
        tb_loss(logps, ref_logps, log_z="learned", alpha=2.0, cu_seqlens=CU_SEQLENS)


@pytest.mark.parametrize("name", ["alpha", "log_z"])
def test_the_module_chooses_no_objective_of_its_own(name):
    hidden, weight, targets, ref_hidden, keywords = head_inputs()
    options = {"alpha": 2.0, "log_z": 0.1}
    value = options.pop(name)
    loss_fn = FusedLinearTBLoss(**options)
    with pytest.raises(ValueError, match=rf"^{name}: expected in FusedLinearTBLoss\(...\) or"):
        loss_fn(hidden, weight, targets, ref_hidden, **keywords)
    assert loss_fn(hidden, weight, targets, ref_hidden, **{name: value}, **keywords).loss > 0
    with pytest.raises(ValueError, match="^importance: expected"):
        FusedLinearTBLoss(importance="max")
    with pytest.raises(ValueError, match="^hidden: expected a tensor, got list"):
        loss_fn([0.0], weight, targets, ref_hidden)


def test_a_trainer_may_watch_for_nan_by_itself():
    hidden, weight, targets, ref_hidden, keywords = head_inputs()
    hidden[3] = torch.nan
    options = {"log_z": 0.0, "alpha": 2.0, **keywords}
    with pytest.raises(ValueError, match=r"^hidden: expected finite numbers .* at \[3\]"):
        fused_linear_tb_loss(hidden, weight, targets, ref_hidden, **options)
    options["check_finite"] = False
    assert fused_linear_tb_loss(hidden, weight, targets, ref_hidden, **options).loss.isnan()
    ref_hidden[4] = torch.nan
    with pytest.raises(ValueError, match=r"^ref_logps: expected finite numbers .* at \[4\]"):
        fused_linear_tb_loss(hidden, weight, targets, ref_hidden, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ignore_index": None}, "ignore_index: expected an integer, got None"),
        ({"grad_tolerance": "a"}, "grad_tolerance: expected a finite number, got 'a'"),
        ({"temperature": None}, "temperature: expected a finite number, got None"),
    ],
)
def test_options_of_another_type_are_named(options, said):
    hidden, weight, targets, _ = draw()
    with pytest.raises(ValueError, match=said):
        linear_logprobs(hidden, weight, targets, **options)


@pytest.mark.parametrize(
    ("function", "keywords"), [(linear_logprobs, HeadKeywords), (tb_loss, TBKeywords)]
)
def test_keywords_that_are_passed_on_are_those_of_the_function(function, keywords):
    """Beside what the fused loss has as parameters of its own, and hands to both."""
    parameters = inspect.signature(function).parameters.values()
    taken = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    own = {"log_z", "alpha", "backend", "validate", "check_finite"} - set(keywords.__annotations__)
    assert taken - own == set(keywords.__annotations__)
