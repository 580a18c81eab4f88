"""Rollouts ahead of the trainer, from a real vLLM server: whose they are, the time they save."""

import time

import pytest

pytest.importorskip("trl")

from tests.helpers import server_run, tiny  # noqa: E402
from tests.helpers.server_run import GAP, check, make, steps  # noqa: E402
from tests.helpers.slow_proxy import delayed  # noqa: E402
from tests.helpers.vllm_process import needs_vllm  # noqa: E402

pytestmark = needs_vllm
STEPS = 20
SLOW = 1.0  # seconds that the proxy adds to a rollout, and that a step takes


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_rollout_is_compared_with_the_policy_that_drew_it(tmp_path, server, ahead):
    trainer = make(tmp_path, server.url, max_steps=6, rollout_ahead=ahead, learning_rate=5e-3)
    trainer.train()
    rows = steps(trainer)
    check(rows, f"{ahead} ahead", 6)
    stale = [row["sampling/staleness"] for row in rows]
    assert stale == [min(step, ahead) for step in range(6)]
    assert all(row["sampling/drift/mean"] > 1e-3 for row in rows[1:])
    assert "sampling/drift/mean" not in rows[0]
    assert rows[0]["importance/mean"] == pytest.approx(1.0, abs=1e-4)
    assert all(abs(row["importance/mean"] - 1.0) > 1e-3 for row in rows[1:])
    assert server.adapters() == []


class SlowStep(tiny.TrainerCallback):
    """Fills a step up to a time, beside the time in which it waits for its rollout."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_optimizer_step(self, args, state, control, **kwargs):
        waited = self.trainer._metrics["train"]["sampling/trainer_waits"][-1]
        left = self.seconds - (time.monotonic() - self.began - waited)
        time.sleep(max(left, 0.0))


def timed(folder, url, ahead: int) -> tuple[float, float, float]:
    """Seconds a step: in all, for the rollout where it is waited for, and the rest."""
    slow = SlowStep(SLOW)
    options = dict(max_steps=STEPS, learning_rate=1e-3, rollout_ahead=ahead)
    trainer = make(folder, url, callbacks=[slow], **options)
    slow.trainer = trainer
    began = time.monotonic()
    trainer.train()
    took = (time.monotonic() - began) / STEPS
    rows = steps(trainer)
    assert max(row[GAP] for row in rows) < server_run.EXACT
    waits = sum(row["sampling/trainer_waits"] for row in rows) / STEPS
    return took, waits, took - waits


def test_trainer_and_sampler_work_side_by_side(tmp_path, server):
    """A step takes as long as the slower of the two. On a CPU both share the cores, so that the
    trainer is slower beside the sampler than alone: it is compared with itself in the same run."""
    with delayed(server.url, SLOW) as proxy:
        both, sampler, alone = timed(tmp_path / "on_policy", proxy.url, 0)
        server_run.tell("on policy", f"{both:.2f} s a step = {sampler:.2f} + {alone:.2f}")
        ahead, waits, beside = timed(tmp_path / "ahead", proxy.url, 1)
    slower = ahead / max(sampler, alone), ahead / max(sampler, beside)
    text = f"{ahead:.2f} s a step = {waits:.2f} of waiting + {beside:.2f}; of the slower one"
    server_run.tell("1 ahead", f"{text} {slower[0]:.2f} alone, {slower[1]:.2f} in this run")
    assert slower[1] < 1.15 and both > 1.2 * ahead
