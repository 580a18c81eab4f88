"""Updates on earlier rollouts: which, weighed by what, and the same after a resume."""

import collections

import pytest
import torch

pytest.importorskip("trl")

from powerflow_fast.training.replay import Kept, Replay  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402


def test_the_newest_is_chosen_most_often():
    replay = Replay(3, seed=0)
    replay.kept.extend(Kept(step, {}) for step in range(5))
    assert [kept.step for kept in replay.kept] == [2, 3, 4]
    counts = collections.Counter(replay.choose(n).step for n in range(6000))
    for step, share in ((2, 1 / 6), (3, 2 / 6), (4, 3 / 6)):
        assert counts[step] / 6000 == pytest.approx(share, abs=0.03)
    again = Replay(3, seed=0)
    again.load_state_dict(replay.state_dict())
    assert [again.choose(n).step for n in range(20)] == [replay.choose(n).step for n in range(20)]


@pytest.mark.parametrize("log_z", ["group", "learned"])
def test_weights_are_those_of_the_policy_that_drew_it(tmp_path, log_z):
    """The importance that a step logs, recomputed from the rollout it trained on."""
    options = dict(num_iterations=3, replay=2, max_steps=9, learning_rate=0.03, log_z=log_z)
    trainer, seen = make(tmp_path, clip_eps=9.0, **options)
    run, expected = trainer._compute_loss, []

    def compute(model, inputs):
        now = trainer._score(inputs)[0]
        mask = inputs["completion_mask"].bool()
        gap = ((now - inputs["old_per_token_logps"]) * mask).sum(1) / mask.sum(1)
        expected.append(gap.exp().mean().item())
        return run(model, inputs)

    trainer._compute_loss = compute
    trainer.train()
    ages = [log["replay/age"] for log in seen.logs if "replay/age" in log]
    assert len(ages) == 6 and max(ages) > 2  # of an earlier rollout, whose weights differ from 1
    for log, value in zip(seen.logs, expected, strict=True):
        assert log["importance/mean"] == pytest.approx(value, rel=1e-4)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_one_kept_rollout_is_what_num_iterations_does(tmp_path):
    """With log Z' learned, for its estimate by a group is renewed."""
    options = dict(num_iterations=2, max_steps=4, log_z="learned")
    plain, seen = make(tmp_path / "plain", **options)
    plain.train()
    replayed, again = make(tmp_path / "replayed", replay=1, **options)
    replayed.train()
    for one, other in zip(seen.logs, again.logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_resumed_run_replays_the_same(tmp_path):
    options = dict(num_iterations=2, replay=3, max_steps=8, save_strategy="steps", save_steps=3)
    whole, seen = make(tmp_path, **options)
    whole.train()
    for step in (3, 6):
        resumed, rest = make(tmp_path, **options)
        resumed.train(str(tmp_path / f"checkpoint-{step}"))
        assert [log["loss"] for log in rest.logs] == [log["loss"] for log in seen.logs[step:]]


def test_replay_without_updates_to_spare_is_refused(tmp_path):
    with pytest.raises(ValueError, match="replay: expected 0 where a rollout serves one update"):
        make(tmp_path, replay=2)
