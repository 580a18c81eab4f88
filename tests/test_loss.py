"""tb_loss, fused_linear_tb_loss and FusedLinearTBLoss against the specification."""

import pytest
import torch

from powerflow_fast import (
    FusedLinearTBLoss,
    fused_linear_tb_loss,
    linear_logprobs,
    reference,
    tb_loss,
)

LENGTHS = [3, 1, 5, 2]
CU_SEQLENS = torch.tensor([0, 3, 4, 9, 11], dtype=torch.int32)
BALANCES = ["length", "trajectory", "token"]


def tokens(dtype=torch.float64):
    """Packed policy, reference and sampling log-probs of four sequences."""
    n = sum(LENGTHS)
    logps = -torch.rand(n, dtype=dtype) * 3
    return logps, logps - 0.3 * torch.randn(n, dtype=dtype), logps + 0.1 * torch.randn(n).to(dtype)


def pad(packed):
    """[4, 6] with NaN where nothing counts, and its mask."""
    padded = torch.full((4, 6), torch.nan, dtype=packed.dtype)
    for row, part in zip(padded, packed.split(LENGTHS), strict=True):
        row[: len(part)] = part
    return padded


MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("balance", BALANCES)
def test_equals_the_specification_and_its_gradient(balance):
    logps, ref_logps, old_logps = tokens()
    logps.requires_grad_()
    log_z = torch.randn(4, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([4.0, 0.5, 1.0, 2.0])
    psi = torch.tensor([0.0, -0.5, -0.5, 0.0])
    out = tb_loss(
        logps,
        ref_logps,
        log_z=log_z,
        alpha=alpha,
        psi=psi,
        old_logps=old_logps,
        clip_eps=0.05,
        cu_seqlens=CU_SEQLENS,
        balance=balance,
    )
    parts = [x.split(LENGTHS) for x in (logps, ref_logps, old_logps)]
    ratio = torch.stack([(p - o).mean().exp() for p, o in zip(parts[0], parts[2], strict=True)])
    weights = ratio.detach().clamp(0.95, 1.05)
    assert (weights != ratio).any() and (weights == ratio).any()  # some clipped, some not
    expected, residual = reference.tb_loss(
        parts[0], parts[1], log_z=log_z, alpha=alpha, psi=psi, weights=weights, balance=balance
    )
    torch.testing.assert_close(out.residual, residual, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.importance, weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(out.loss, [logps, log_z])
    # DESIGN: dL/d log pi_t = 2 w Delta / (S |y|) for every token, dL/d log Z' = 2 w Delta / S.
    per_sequence = 2 * weights * residual.detach() / 4
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    per_token = per_sequence / (lengths if balance == "length" else 1.0)
    torch.testing.assert_close(grads[0], per_token.repeat_interleave(torch.tensor(LENGTHS)))
    torch.testing.assert_close(grads[1], per_sequence)


@pytest.mark.parametrize("balance", BALANCES)
def test_padded_equals_packed(balance):
    logps, ref_logps, old_logps = tokens()
    options = {"log_z": 0.3, "alpha": 2.0, "psi": -0.1, "balance": balance}
    packed_leaf, padded_leaf = logps.requires_grad_(), pad(logps.detach()).requires_grad_()
    packed = tb_loss(packed_leaf, ref_logps, old_logps=old_logps, cu_seqlens=CU_SEQLENS, **options)
    padded = tb_loss(padded_leaf, pad(ref_logps), old_logps=pad(old_logps), mask=MASK, **options)
    torch.testing.assert_close(padded.residual, packed.residual)
    torch.testing.assert_close(padded.loss, packed.loss)
    packed.loss.backward(), padded.loss.backward()
    torch.testing.assert_close(padded_leaf.grad[MASK], packed_leaf.grad)
    assert (padded_leaf.grad[~MASK] == 0).all()  # NaN there neither comes in nor goes out


def test_group_log_z_is_the_group_mean_and_has_no_gradient():
    logps, ref_logps, _ = tokens()
    logps.requires_grad_()
    alpha = 3.0
    by_size = tb_loss(
        logps, ref_logps, log_z="group", alpha=alpha, cu_seqlens=CU_SEQLENS, group_size=2
    )
    zero = tb_loss(logps, ref_logps, log_z=0.0, alpha=alpha, cu_seqlens=CU_SEQLENS)
    centred = zero.residual.view(2, 2) - zero.residual.view(2, 2).mean(1, keepdim=True)
    torch.testing.assert_close(by_size.residual, centred.flatten())
    [grad] = torch.autograd.grad(by_size.loss, logps)
    per_token = 2 * by_size.residual.detach() / 4 / torch.tensor(LENGTHS)
    torch.testing.assert_close(grad, per_token.repeat_interleave(torch.tensor(LENGTHS)))
    # Any ids, in any order.
    ids = torch.tensor([7, 7, -3, -3])
    by_id = tb_loss(
        logps, ref_logps, log_z="group", alpha=alpha, cu_seqlens=CU_SEQLENS, group_ids=ids
    )
    torch.testing.assert_close(by_id.residual, by_size.residual)


def test_importance_weight_uses_the_mean_and_clips_both_sides():
    """FlowRL#13, TRL#5814: a token-sum ratio shrinks long sequences' updates to nothing."""
    n = 200
    ref = torch.zeros(2 * n, dtype=torch.float64)
    cu = torch.tensor([0, n, 2 * n], dtype=torch.int32)
    old = torch.cat([torch.full((n,), 0.01), torch.full((n,), -0.01)]).double()
    options = {"log_z": 0.0, "alpha": 1.0, "cu_seqlens": cu, "old_logps": old}
    by_mean = tb_loss(ref, ref, **options).importance
    torch.testing.assert_close(by_mean, torch.tensor([-0.01, 0.01]).double().exp())
    by_sum = tb_loss(ref, ref, importance="sum", **options)
    torch.testing.assert_close(by_sum.importance, torch.tensor([0.8, 1.2]).double())
    assert by_sum.metrics["clipped_share"] == 1.0


def test_start_of_training():
    """alpha = 1 with log Z' = 0 and pi = p: loss 0 and no gradient; else the residual is known."""
    logps, _, _ = tokens()
    logps.requires_grad_()
    out = tb_loss(logps, logps.detach(), log_z=0.0, alpha=1.0, cu_seqlens=CU_SEQLENS)
    [grad] = torch.autograd.grad(out.loss, logps)
    assert out.loss == 0 and (grad == 0).all()
    out = tb_loss(logps, logps.detach(), log_z=0.1, alpha=4.0, cu_seqlens=CU_SEQLENS)
    means = torch.stack([part.mean() for part in logps.split(LENGTHS)])
    torch.testing.assert_close(out.residual, 0.1 - 3.0 * means)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_triton_epilogue_equals_the_torch_one(device, balance, padded):
    logps, ref_logps, _ = (x.float().to(device) for x in tokens(torch.float32))
    keywords = {"cu_seqlens": CU_SEQLENS.to(device)}
    if padded:
        logps, ref_logps = pad(logps.cpu()).to(device), pad(ref_logps.cpu()).to(device)
        keywords = {"mask": MASK.to(device)}
    options = {"log_z": "group", "group_size": 2, "alpha": 3.0, "psi": torch.rand(4, device=device)}
    leaves, results = [], []
    for backend in ("torch", "triton"):
        leaf = logps.detach().clone().requires_grad_()
        out = tb_loss(leaf, ref_logps, balance=balance, backend=backend, **options, **keywords)
        out.loss.backward()
        leaves.append(leaf), results.append(out)
    torch.testing.assert_close(results[1].residual, results[0].residual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_z", [0.0, "group"])
def test_empty_sequences_count_for_nothing(log_z):
    logps, ref_logps, old_logps = tokens()
    group = {"group_ids": torch.tensor([0, 0, 1, 1])} if log_z == "group" else {}
    options = {"log_z": log_z, "alpha": 2.0}
    plain = tb_loss(logps, ref_logps, cu_seqlens=CU_SEQLENS, **options, **group)
    cu = torch.tensor([0, 0, 3, 4, 9, 11, 11])
    if group:
        group = {"group_ids": torch.tensor([0, 0, 0, 1, 1, 1])}
    out = tb_loss(
        logps, ref_logps, cu_seqlens=cu, old_logps=old_logps * 0 + logps, **options, **group
    )
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(out.residual[1:5], plain.residual)
    assert out.residual[0] == out.residual[5] == 0
    assert out.lengths.tolist() == [0, *LENGTHS, 0]
    assert out.metrics["zero_length_count"] == 2
    for name in ("residual_mean", "residual_std", "log_z", "kl", "length_mean"):
        torch.testing.assert_close(out.metrics[name], plain.metrics[name])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_nothing_counted_is_a_connected_zero(layout):
    logps = torch.randn(2, 3, requires_grad=True) if layout == "padded" else torch.randn(0)
    keywords = {"mask": torch.zeros(2, 3)}
    if layout == "packed":
        logps.requires_grad_()
        keywords = {"cu_seqlens": torch.zeros(3, dtype=torch.int32)}
    out = tb_loss(logps, logps.detach(), log_z=0.0, alpha=4.0, **keywords)
    assert out.loss == 0
    out.loss.backward()
    assert torch.equal(logps.grad, torch.zeros_like(logps))
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("log_z", ["group", "tensor"])
def test_loss_does_not_depend_on_the_micro_batch_split(log_z):
    """TRL#5619, #6024, Liger#1082: one global denominator, whatever the split."""
    logps, ref_logps, _ = tokens()
    z = torch.randn(4, dtype=torch.float64)
    keywords = {"log_z": z} if log_z == "tensor" else {"log_z": "group", "group_size": 2}
    whole_leaf = logps.clone().requires_grad_()
    whole = tb_loss(whole_leaf, ref_logps, alpha=4.0, cu_seqlens=CU_SEQLENS, **keywords)
    whole.loss.backward()
    split_leaf, total = logps.clone().requires_grad_(), 0.0
    for tokens_of, rows, cu in [
        (slice(0, 4), slice(0, 2), [0, 3, 4]),
        (slice(4, 11), slice(2, 4), [0, 5, 7]),
    ]:
        part = keywords | ({"log_z": z[rows]} if log_z == "tensor" else {})
        out = tb_loss(
            split_leaf[tokens_of],
            ref_logps[tokens_of],
            alpha=4.0,
            cu_seqlens=torch.tensor(cu),
            normalizer=4,
            **part,
        )
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(split_leaf.grad, whole_leaf.grad)


def test_metrics_say_what_they_claim():
    logps, ref_logps, old_logps = tokens()
    out = tb_loss(
        logps, ref_logps, log_z=0.2, alpha=2.0, old_logps=old_logps, cu_seqlens=CU_SEQLENS
    )
    gap = ref_logps - logps
    expected = {
        "loss": out.loss,
        "residual_mean": out.residual.mean(),
        "residual_std": out.residual.std(correction=0),
        "policy_logp": logps.mean(),
        "ref_logp": ref_logps.mean(),
        "log_z": torch.tensor(0.2).double(),
        "kl": ((logps - old_logps).exp() * (gap.exp() - 1 - gap)).mean(),
        "importance_mean": out.importance.mean(),
        "length_mean": torch.tensor(2.75).double(),
        "length_min": torch.tensor(1),
        "length_max": torch.tensor(5),
        "zero_length_count": torch.tensor(0),
    }
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert not out.metrics[name].requires_grad and out.metrics[name].dim() == 0
    assert set(out.metrics) == set(expected) | {"clipped_share"}


def test_kl_does_not_depend_on_who_drew_the_tokens():
    """Of one token's distribution, from many draws by another: the KL that sums give."""
    draw = torch.Generator().manual_seed(0)
    policy, reference, other = torch.randn(3, 12, generator=draw).double().log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for drew, rel in ((policy, 0.02), (other, 0.05)):
        ids = torch.multinomial(drew.exp(), 100_000, replacement=True, generator=draw)
        offsets = torch.tensor([0, len(ids)], dtype=torch.int32)
        options = dict(log_z=0.0, alpha=2.0, old_logps=drew[ids], cu_seqlens=offsets)
        out = tb_loss(policy[ids], reference[ids], **options)
        assert out.metrics["kl"].item() == pytest.approx(exact.item(), rel=rel)


def head_inputs(layout="packed", dtype=torch.float32):
    n, h, v = sum(LENGTHS), 16, 59
    hidden, ref_hidden = torch.randn(2, n, h).to(dtype)
    weight = (torch.randn(v, h) * 0.3).to(dtype)
    targets = torch.randint(0, v, (n,))
    if layout == "packed":
        return hidden, weight, targets, ref_hidden, {"cu_seqlens": CU_SEQLENS}
    padded = torch.full((2, 4, 6, h), torch.nan, dtype=dtype)
    padded_targets = torch.full((4, 6), -1)  # pad ids need not be valid tokens
    padded[0][MASK], padded[1][MASK], padded_targets[MASK] = hidden, ref_hidden, targets
    return padded[0], weight, padded_targets, padded[1], {"mask": MASK}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("trained_head", [False, True])
def test_fused_equals_its_composition(layout, trained_head):
    hidden, weight, targets, ref_hidden, keywords = head_inputs(layout)
    hidden.requires_grad_(), weight.requires_grad_(trained_head)
    options = {"log_z": "group", "alpha": 4.0, "group_size": 2}
    out = fused_linear_tb_loss(
        hidden, weight, targets, ref_hidden, temperature=0.8, softcap=5.0, **options, **keywords
    )
    grads = torch.autograd.grad(out.loss, [hidden, weight] if trained_head else [hidden])
    ids = targets if layout == "packed" else targets.where(MASK, -100)
    head = {"temperature": 0.8, "softcap": 5.0}
    logps = linear_logprobs(hidden, weight, ids, **head)
    ref_logps = linear_logprobs(ref_hidden, weight, ids, **head).detach()
    expected = tb_loss(logps, ref_logps, **options, **keywords)
    for name in ("loss", "logps", "ref_logps", "residual", "lengths"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    expected_grads = torch.autograd.grad(expected.loss, [hidden, weight][: len(grads)])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert all(grad.isfinite().all() for grad in grads)
    given = fused_linear_tb_loss(
        hidden, weight, targets, ref_logps=ref_logps, **head, **options, **keywords
    )
    assert torch.equal(given.loss, out.loss)


def test_entropy_comes_along():
    hidden, weight, targets, ref_hidden, keywords = head_inputs()
    out = fused_linear_tb_loss(
        hidden, weight, targets, ref_hidden, log_z=0.0, alpha=2.0, return_entropy=True, **keywords
    )
    _, entropy = reference.linear_logprobs(hidden, weight, targets)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert out.metrics["entropy"].item() == pytest.approx(entropy.mean().item(), rel=1e-5)


def test_module_takes_either_order_and_per_call_options():
    hidden, weight, targets, ref_hidden, keywords = head_inputs()
    loss_fn = FusedLinearTBLoss(alpha=4.0, log_z=0.0)
    ours = loss_fn(hidden, weight, targets, ref_hidden, **keywords)
    ligers = loss_fn(weight, hidden, targets, ref_hidden, **keywords)
    expected = fused_linear_tb_loss(
        hidden, weight, targets, ref_hidden, log_z=0.0, alpha=4.0, **keywords
    )
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ligers.loss, expected.loss)
    other = loss_fn(hidden, weight, targets, ref_hidden, alpha=2.0, **keywords)
    assert other.loss != expected.loss
    assert "alpha=4.0" in repr(loss_fn)
