"""Figures of a run do not depend on how its batches were cut."""

import pytest
import torch

from powerflow_fast import tb_loss
from powerflow_fast.training.metrics import METRICS, ROLLOUT_SIZES, MetricSums, over_rollouts


def batch(sequences=12, width=9):
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps, old = -torch.rand(3, sequences, width, generator=generator)
    lengths = torch.randint(0, width + 1, (sequences,), generator=generator)
    lengths[:3] = 0
    return logps, ref_logps, old, torch.arange(width) < lengths[:, None]


def sums_of(parts) -> MetricSums:
    sums = MetricSums()
    tensors = batch()
    for part in parts:
        logps, ref_logps, old, mask = (x[part] for x in tensors)
        sums.add(tb_loss(logps, ref_logps, old_logps=old, mask=mask, log_z=0.2, alpha=1.5))
    return sums


def test_any_cut_gives_the_figures_of_the_whole():
    whole = sums_of([slice(0, 12)]).figures(lambda x: x)
    logps, ref_logps, old, mask = batch()
    out = tb_loss(logps, ref_logps, old_logps=old, mask=mask, log_z=0.2, alpha=1.5)
    assert whole["completions/zero_length"] == (~mask.any(1)).sum() >= 3
    for name, (shown, _) in METRICS.items():
        if name in out.metrics:
            assert whole[shown] == pytest.approx(float(out.metrics[name]), rel=1e-5, abs=1e-7)
    for cuts in ([slice(0, 3), slice(3, 12)], [slice(i, i + 1) for i in range(12)]):
        assert sums_of(cuts).figures(lambda x: x) == pytest.approx(whole, rel=1e-5, abs=1e-7)


def test_ranks_are_summed_and_a_log_starts_anew():
    own, other = sums_of([slice(0, 4)]), sums_of([slice(4, 12)])
    names = sorted(other.sums)
    theirs = torch.stack([other.sums[name] for name in names])

    def gather(values):
        return torch.cat([values, theirs[None]])

    whole = sums_of([slice(0, 12)]).figures(lambda x: x)
    assert own.figures(gather) == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert own.figures(gather) == {}


def test_counts_are_of_an_optimizer_step_and_the_worst_is_the_worst():
    sums = MetricSums()
    logps, ref_logps, old, mask = batch()
    out = tb_loss(logps, ref_logps, mask=mask, log_z=0.2, alpha=1.5)
    for worst in (0.25, 0.5, 0.125):
        sums.add(out._replace(metrics=out.metrics | {"skipped_mass": torch.tensor(worst)}))
    figures = sums.figures(lambda x: x, steps=3)
    assert figures["completions/zero_length"] == (~mask.any(1)).sum()
    assert figures["certified/skipped_mass"] == 0.5


def test_they_travel_in_a_checkpoint():
    first, second = sums_of([slice(0, 4)]), sums_of([slice(4, 12)])
    resumed = MetricSums()
    resumed.load_state_dict(first.state_dict())
    for name, value in second.sums.items():
        resumed._add(name, value)
    whole = sums_of([slice(0, 12)]).figures(lambda x: x)
    assert resumed.figures(lambda x: x) == pytest.approx(whole, rel=1e-5, abs=1e-7)


def test_figures_of_rollouts_count_by_their_size_and_extremes_stay():
    figures = {
        ROLLOUT_SIZES: [8.0, 8.0, 4.0],
        "completions/mean_length": [2.0, 4.0, 9.0],
        "completions/min_length": [2.0, 1.0, 9.0],
        "sampling/gap/max": [0.5, 0.25, 0.125],
        "rewards/psi/mean": [1.0, float("nan"), 4.0],
        "step_time": [1.0, 2.0],
        "nothing": [float("nan")] * 3,
    }
    assert over_rollouts(figures) == {
        "completions/mean_length": (16 + 32 + 36) / 20,
        "completions/min_length": 1.0,
        "sampling/gap/max": 0.5,
        "rewards/psi/mean": (8 + 16) / 12,
        "step_time": 1.5,
    }


def test_an_evaluation_does_not_depend_on_its_batches(tmp_path):
    pytest.importorskip("trl")
    from tests.helpers import tiny
    from tests.training.test_trainer import make, start_from_nonzero_adapter

    found = []
    for size in (4, 8, 12, 16):
        trainer, _ = make(tmp_path, per_device_eval_batch_size=size, evaluation=tiny.dataset(1))
        start_from_nonzero_adapter(trainer)
        whole = trainer.evaluate()
        kept = ("completions/", "logps/", "residual/", "kl", "log_z", "entropy", "alpha", "sizes")
        found.append(
            {k: v for k, v in whole.items() if k.startswith(tuple(f"eval_{x}" for x in kept))}
        )
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[0]["eval_completions/min_length"] == 1 and len(found[0]) > 12
