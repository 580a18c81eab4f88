"""`shift=True`: hidden states and labels as a model gives them, against slices taken by hand."""

import pytest
import torch

from powerflow_fast import (
    FusedLinearTBLoss,
    fused_linear_tb_loss,
    linear_logprobs,
    paired_linear_logprobs,
)
from tests.helpers.numerics import relative_error

B, T, H, V = 4, 6, 16, 59
LENGTHS = [3, 1, 0, 5, 2]  # one of a single token and one of none
OBJECTIVE = {"alpha": 3.0, "log_z": 0.2}


def batch(*shape, dtype=torch.float32, trained=("hidden",)):
    """hidden, weight, targets (some ignored) and ref_hidden; the first token is not a valid id."""
    hidden, ref_hidden = torch.randn(2, *shape, H, dtype=dtype)
    weight = 0.3 * torch.randn(V, H, dtype=dtype)
    targets = torch.randint(0, V, shape)
    targets[torch.rand(shape) < 0.2] = -100
    targets[..., 0] = V + 7
    hidden.requires_grad_("hidden" in trained), weight.requires_grad_("weight" in trained)
    return hidden, weight, targets, ref_hidden


def behind_zero(values):
    """What the slice by hand gave, where the tokens lie."""
    return torch.nn.functional.pad(values, (1, 0))


def assert_same(ours, expected, leaves):
    """Losses and gradients; each of `leaves` is one of the graph of both."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(ours, leaves)
    wanted = torch.autograd.grad(expected, leaves)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", [(B, T), (T,), (2, 2, T)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_log_probs_and_entropy_lie_where_the_tokens_lie(shape, trained, backend, device):
    hidden, weight, targets, ref_hidden = (x.to(device) for x in batch(*shape))
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)][: len(trained)]
    hidden, weight = (*leaves, weight.detach())[:2]
    options = {"temperature": 0.8, "return_entropy": True, "backend": backend}
    ours = paired_linear_logprobs(hidden, weight, targets, ref_hidden, shift=True, **options)
    by_hand = paired_linear_logprobs(
        hidden[..., :-1, :], weight, targets[..., 1:], ref_hidden[..., :-1, :], **options
    )
    for values, expected in zip(ours, by_hand, strict=True):
        assert values.shape == shape and not values[..., 0].any()
        torch.testing.assert_close(values, behind_zero(expected), rtol=1e-5, atol=1e-6)
    upstream = torch.randn(shape, device=device)
    both = [
        (pair[0] * u).sum() + (pair[2] * u).sum()
        for pair, u in ((ours, upstream), (by_hand, upstream[..., 1:]))
    ]
    assert_same(*both, leaves)


@pytest.mark.parametrize("masked", [False, True])
def test_padded_loss_is_that_of_slices(masked):
    hidden, weight, targets, ref_hidden = batch(B, T, trained=("hidden", "weight"))
    mask = torch.rand(B, T) < 0.7 if masked else torch.ones(B, T)
    old = -torch.rand(B, T)
    old[:, 0] = torch.nan  # no token that counts
    options = {**OBJECTIVE, "psi": torch.randn(B), "return_entropy": True}
    call = (hidden, weight, targets, ref_hidden)
    ours = fused_linear_tb_loss(*call, shift=True, mask=mask, old_logps=old, **options)
    expected = fused_linear_tb_loss(
        hidden[:, :-1],
        weight,
        targets[:, 1:],
        ref_hidden[:, :-1],
        mask=mask[:, 1:],
        old_logps=old[:, 1:],
        **options,
    )
    assert_same(ours.loss, expected.loss, [hidden, weight])
    for name in ("residual", "importance", "lengths"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name))
    for name in ("logps", "ref_logps", "entropy"):
        torch.testing.assert_close(getattr(ours, name), behind_zero(getattr(expected, name)))
    for name, value in expected.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value)
    given = {"ref_logps": ours.ref_logps, "mask": mask, "old_logps": old}
    again = fused_linear_tb_loss(*call[:3], shift=True, **given, **options)
    torch.testing.assert_close(again.loss, ours.loss)
    loss_fn = FusedLinearTBLoss(shift=True, **options)
    assert torch.equal(loss_fn(*call, mask=mask, old_logps=old).loss, ours.loss)


def test_packed_loss_never_crosses_a_border():
    n = sum(LENGTHS)
    hidden, weight, targets, ref_hidden = batch(n)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    targets[cu_seqlens[:-1].long()] = V + 7  # never a target: looked at nowhere
    mask, old = torch.rand(n) < 0.8, -torch.rand(n)
    options = {"return_entropy": True, **OBJECTIVE}
    ours = fused_linear_tb_loss(
        hidden,
        weight,
        targets,
        ref_hidden,
        cu_seqlens=cu_seqlens,
        mask=mask,
        old_logps=old,
        shift=True,
        **options,
    )
    rows = [torch.arange(s, e) for s, e in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    before, tokens = torch.cat([r[:-1] for r in rows]), torch.cat([r[1:] for r in rows])
    expected = fused_linear_tb_loss(
        hidden[before],
        weight,
        targets[tokens],
        ref_hidden[before],
        cu_seqlens=torch.tensor([0, *(max(n - 1, 0) for n in LENGTHS)]).cumsum(0).int(),
        mask=mask[tokens],
        old_logps=old[tokens],
        **options,
    )
    assert_same(ours.loss, expected.loss, [hidden])
    assert torch.equal(ours.lengths, expected.lengths) and ours.lengths.max() > 1
    for name in ("logps", "ref_logps", "entropy"):
        placed = torch.zeros(n).index_copy(0, tokens, getattr(expected, name).detach())
        torch.testing.assert_close(getattr(ours, name).detach(), placed)


def test_an_empty_last_sequence_has_no_first_token():
    hidden, weight, targets, ref_hidden = batch(5)
    found = [
        fused_linear_tb_loss(
            *(hidden, weight, targets, ref_hidden),
            cu_seqlens=torch.tensor(offsets),
            shift=True,
            **OBJECTIVE,
        ).loss
        for offsets in ([0, 5], [0, 5, 5])
    ]
    assert torch.equal(*found)


def test_an_ignored_id_may_be_any():
    hidden, weight, _, _ = batch(B, T)
    targets = torch.randint(1, V, (B, T))
    targets[:, 3] = 0
    found = linear_logprobs(hidden, weight, targets, shift=True, ignore_index=0)
    assert not found[:, [0, 3]].any() and found[:, [1, 2, 4, 5]].all()


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_to_predict_is_a_connected_zero(length):
    hidden, weight, targets, ref_hidden = batch(B, length) if length else batch(B, T)
    hidden, ref_hidden = (x[:, :length].detach().requires_grad_() for x in (hidden, ref_hidden))
    call = (hidden, weight, targets[:, :length], ref_hidden)
    out = fused_linear_tb_loss(*call, shift=True, **OBJECTIVE)
    out.loss.backward()
    assert out.loss == 0 and out.logps.shape == (B, length) and not hidden.grad.any()


@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(entropy):
    trained = ("hidden", "weight") if entropy else ("hidden",)
    hidden, weight, targets, _ = batch(2, 4, dtype=torch.float64)
    hidden, weight = hidden[..., :3].detach().requires_grad_(), weight[:11, :3].clone()
    weight.requires_grad_("weight" in trained)
    targets = targets.clamp(max=10)

    def scored(hidden, weight):
        return linear_logprobs(hidden, weight, targets, shift=True, return_entropy=entropy)

    assert torch.autograd.gradcheck(scored, (hidden, weight))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(packed):
    torch._dynamo.reset()
    hidden, weight, targets, ref_hidden = batch(B * T) if packed else batch(B, T)
    options = {"cu_seqlens": torch.tensor([0, 7, 7, 24]).int()} if packed else {}

    def step(hidden, weight, targets, ref_hidden, **options):
        call = (hidden, weight, targets, ref_hidden)
        return fused_linear_tb_loss(*call, shift=True, **OBJECTIVE, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    targets[..., 0] = 0  # a compiled graph looks at no values
    call = (hidden, weight, targets, ref_hidden)
    assert_same(compiled(*call, **options), step(*call, **options), [hidden])


def test_hidden_states_are_not_copied():
    """A slice [B, T - 1, H] would be copied to be flattened, as would the roll of [N, H]."""
    hidden, weight, targets, _ = batch(8, 64, trained=())
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor) and x._base is None:
                    same = x.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
                    largest = max(largest, 0 if same else x.untyped_storage().nbytes())
            return out

    targets = targets.clamp(0, V - 1)
    with Watch():
        linear_logprobs(hidden, weight, targets, shift=True)
    assert 0 < largest < hidden.nbytes / 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shift": 1}, "shift: expected True or False, got 1"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "targets: expected packed .* got \\(4, 6\\)"),
        ({"mask": torch.ones(B, T - 1)}, "mask: expected the shape of targets, \\(4, 6\\)"),
        ({"old_logps": torch.zeros(B, T - 1)}, "old_logps: expected the shape"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        fused_linear_tb_loss(*batch(B, T), **{"shift": True, **OBJECTIVE} | change)


def test_targets_without_time_are_named():
    with pytest.raises(ValueError, match=r"^targets: expected \[..., T\] with shift=True"):
        linear_logprobs(torch.randn(H), torch.randn(V, H), torch.tensor(3), shift=True)


def test_it_is_what_a_model_means():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=H, intermediate_size=32, num_hidden_layers=1, vocab_size=V)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    ids = torch.randint(0, V, (B, T))
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        own = model(input_ids=ids, labels=labels)
        hidden = model.model(input_ids=ids).last_hidden_state
        logps = linear_logprobs(hidden, model.lm_head.weight, labels, shift=True)
    assert -logps.sum() / (labels != -100).sum() == pytest.approx(own.loss.item(), rel=1e-5)
