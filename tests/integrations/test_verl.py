"""LA-TB and the head inside verl's own functions, without a cluster."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from powerflow_fast import linear_logprobs, tb_loss
from powerflow_fast.integrations import host
from powerflow_fast.integrations import verl as door
from tests.helpers import tiny


def importable() -> str:
    """Why verl cannot be imported here, or nothing."""
    try:
        import verl.trainer.ppo.ray_trainer  # noqa: F401
    except ImportError as error:
        return f"verl or a package it needs is missing: {error}"
    return ""


missing = importable()
with_verl = pytest.mark.skipif(bool(missing), reason=missing)
PLUGIN = "powerflow_fast.integrations.verl_plugin"


def batch(sequences=6, width=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.tensor([5, 3, 4, 1, 5, 2])[:sequences, None]
    logps = [-3 * torch.rand(sequences, width, generator=draw) for _ in range(3)]
    scores = torch.zeros(sequences, width)
    scores[:, 0] = torch.tensor([0.0, -0.5, 0.0, 0.0, -0.5, 0.0])[:sequences]
    uid = np.array(["b", "a", "b", "a", "b", "a"][:sequences], dtype=object)
    return mask, *logps, scores, uid


def expected(mask, logps, old, ref, scores, uid, alpha):
    """The loss at once; log Z' as the policy that sampled gives it."""
    groups = torch.tensor([{"a": 0, "b": 1}[u] for u in uid])
    psi = scores.sum(1)
    keywords = dict(mask=mask, alpha=alpha, psi=psi)
    start = tb_loss(old, ref, log_z="group", group_ids=groups, **keywords)
    fixed = tb_loss(old, ref, log_z=0.0, **keywords)
    log_z = start.residual - fixed.residual
    return tb_loss(logps, ref, log_z=log_z, old_logps=old, **keywords)


def test_targets_and_policy_loss_are_la_tb():
    mask, logps, old, ref, scores, uid = batch()
    logps.requires_grad_()
    advantages = door.targets(old, ref, scores, mask, uid, 4.0)
    config = SimpleNamespace(clip_ratio=0.2, global_batch_info={})
    loss, metrics = door.la_tb_policy_loss(old, logps, advantages, mask, config=config)
    whole = expected(mask, logps, old, ref, scores, uid, 4.0)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, logps)[0] for x in (loss, whole.loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert metrics["la_tb/residual_std"] > 0 and not ours[~mask].any()


def test_micro_batches_and_ranks_add_up_to_the_global_mean():
    mask, logps, old, ref, scores, uid = batch()
    advantages = door.targets(old, ref, scores, mask, uid, 4.0)
    whole = expected(mask, logps, old, ref, scores, uid, 4.0).loss
    info = {"global_batch_size": 6, "dp_size": 2}
    config = SimpleNamespace(clip_ratio=0.2, global_batch_info=info)
    parts = [
        door.la_tb_policy_loss(old[r], logps[r], advantages[r], mask[r], config=config)[0]
        for r in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)  # ranks are averaged
    config.global_batch_info = {"global_batch_size": None, "dp_size": 2}
    with pytest.raises(ValueError, match="global_batch_size"):
        door.la_tb_policy_loss(old, logps, advantages, mask, config=config)
    with pytest.raises(ValueError, match="rollout_correction"):
        door.la_tb_policy_loss(
            old, logps, advantages, mask, config=config, rollout_is_weights=torch.ones(6, 5)
        )


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(host, "version", lambda name: "0.10.2")
    with pytest.raises(ValueError, match="tested with 0.9, found 0.10.2"):
        door.register()


@pytest.fixture
def registered(monkeypatch):
    """verl with the plugin in it, as it was afterwards."""
    from verl.models.transformers import monkey_patch
    from verl.trainer.ppo import core_algos, ray_trainer
    from verl.utils.kernel import linear_cross_entropy as kernel

    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", {**core_algos.POLICY_LOSS_REGISTRY})
    core_algos.POLICY_LOSS_REGISTRY.pop(door.NAME, None)
    for home, name in (
        (monkey_patch, "patch_forward_with_backends"),
        (ray_trainer, "compute_advantage"),
        (kernel, "linear_cross_entropy"),
    ):
        monkeypatch.setattr(home, name, getattr(home, name))
    door.register()


@with_verl
def test_verls_own_functions_lead_to_the_loss(registered):
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer

    mask, logps, old, ref, scores, uid = batch()
    fields = dict(old_log_probs=old, ref_log_prob=ref, token_level_scores=scores)
    fields |= dict(response_mask=mask.long(), token_level_rewards=scores)
    data = DataProto(TensorDict(fields, batch_size=6), {"uid": uid})
    out = ray_trainer.compute_advantage(data, adv_estimator=door.NAME, config={"alpha": 2.0})
    config = SimpleNamespace(clip_ratio=0.2, global_batch_info={})
    loss, _ = core_algos.get_policy_loss_fn(door.NAME)(
        old_log_prob=old,
        log_prob=logps,
        advantages=out.batch["advantages"],
        response_mask=mask,
        config=config,
    )
    whole = expected(mask, logps, old, ref, scores, uid, 2.0).loss
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    # Other estimators are verl's own.
    grpo = core_algos.AdvantageEstimator.GRPO
    assert ray_trainer.compute_advantage(data, adv_estimator=grpo).batch["advantages"].std() > 0
    del data.batch["ref_log_prob"]
    with pytest.raises(ValueError, match="use_kl_loss=True"):
        ray_trainer.compute_advantage(data, adv_estimator=door.NAME)


@with_verl
def test_verls_ppo_loss_gives_la_tb(registered):
    """Through verl's actor loss, from nested tensors of sequences as its engines give them."""
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig, OptimizerConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    mask, logps, old, ref, scores, uid = batch()
    advantages = door.targets(old, ref, scores, mask, uid, 4.0)
    fields = dict(old_log_probs=old, ref_log_prob=ref, advantages=advantages)
    fields |= dict(responses=mask.long(), response_mask=mask.long())
    fields = {
        name: nested([row[m] for row, m in zip(x, mask, strict=True)]) for name, x in fields.items()
    }
    fields["prompts"] = nested([torch.zeros(2, dtype=torch.long)] * 6)
    batch_info = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": 6}
    data = tensordict_utils.get_tensordict(fields, non_tensor_dict=batch_info)
    # A token's log-prob stands where the token before it is; what stands elsewhere does not count.
    edge = torch.full((1,), -7.0)
    whole = nested([torch.cat([edge, row[m], edge]) for row, m in zip(logps, mask, strict=True)])
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=3,
        ppo_micro_batch_size_per_gpu=1,
        optim=OptimizerConfig(lr=1e-6),
        policy_loss=PolicyLossConfig(loss_mode=door.NAME),
        use_kl_loss=True,
        kl_loss_coef=0.0,
    )
    loss, _ = ppo_loss(config, {"log_probs": whole}, data)
    la_tb = expected(mask, logps, old, ref, scores, uid, 4.0).loss
    torch.testing.assert_close(loss, la_tb, rtol=1e-5, atol=1e-6)


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@with_verl
def test_the_recipes_settings_are_verls():
    """verl composes its configuration from the script's settings, of which it knows every name."""
    pytest.importorskip("hydra")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {"PYTHON": sys.executable, "TRAIN": "prompts.parquet", "ALPHA": "2.0"}
    script = Path(__file__).parents[2] / "recipes" / "verl" / "run.sh"
    run = subprocess.run(
        ["bash", script, "--cfg", "job"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for line in ("  alpha: 2.0", "  adv_estimator: la_tb", "      loss_mode: la_tb"):
        assert line in run.stdout.splitlines()


@with_verl
def test_verls_fused_forward_uses_this_head(registered):
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    model, forward = tiny.model(), type(tiny.model()).forward
    ids = torch.randint(2, 20, (2, 6))
    expected = model(ids).logits[:, :-1] / 0.7
    try:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="triton")
        out = model(input_ids=ids, temperature=0.7, return_dict=True)
        hidden = model.model(ids).last_hidden_state
    finally:
        type(model).forward = forward
    logps = expected.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.log_probs[:, :-1], logps, rtol=0, atol=1e-5)
    p = expected.log_softmax(-1)
    torch.testing.assert_close(out.entropy[:, :-1], -(p.exp() * p).sum(-1), rtol=0, atol=1e-5)
    weight = model.lm_head.weight
    rolled = ids.roll(-1, -1)
    with pytest.raises(ValueError, match="reduction"):
        door.linear_cross_entropy(hidden, weight, rolled, 1.0, "sum")
    logps, _ = door.linear_cross_entropy(hidden[0], weight, rolled[0])
    assert torch.equal(logps, linear_logprobs(hidden[0], weight, rolled[0]))


@with_verl
def test_a_head_that_the_fused_forward_would_bend_is_refused(registered):
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    model = tiny.model()
    model.config.final_logit_softcapping = 3.0
    with pytest.raises(ValueError, match="would drop"):
        patch_forward_with_backends(model, True, "triton")
    patch_forward_with_backends(model, False, "triton")


@with_verl
def test_verl_loads_it_as_an_external_module():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment["VERL_USE_EXTERNAL_MODULES"] = PLUGIN
    code = "from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; get('la_tb')"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
