"""Rollouts of a real vLLM server that is sent the adapter alone: it samples from the policy."""

import os
import uuid
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from powerflow_fast.training.vllm_adapter import AdapterRollout  # noqa: E402
from tests.helpers import ranks, server_run  # noqa: E402
from tests.helpers.kill_run import same  # noqa: E402
from tests.helpers.server_run import GAP, check, make, steps  # noqa: E402
from tests.helpers.slow_proxy import delayed  # noqa: E402
from tests.helpers.vllm_process import needs_vllm  # noqa: E402

pytestmark = needs_vllm


def assert_nothing_is_left(server, folder) -> None:
    assert server.adapters() == []
    assert [name for name in os.listdir(folder) if name != ".lock"] == []


def test_the_server_samples_from_the_policy_of_every_step(tmp_path, server):
    trainer = make(tmp_path, server.url, max_steps=6)
    trainer.train()
    check(steps(trainer), "steps", 6)
    assert {row["sampling/staleness"] for row in steps(trainer)} == {0.0}
    assert_nothing_is_left(server, tmp_path / "adapters")


def test_two_updates_of_a_rollout_and_options_of_a_request(tmp_path, server):
    options = dict(num_iterations=2, generation_kwargs={"max_tokens": 8})
    trainer = make(tmp_path, server.url, max_steps=4, **options)
    trainer.train()
    rows = steps(trainer)
    check(rows, "two updates a rollout", 4)
    assert [row.get("completions/max_length") for row in rows] == [8, None, 8, None]


def test_train_again(tmp_path, server):
    """The second run begins at the step that the first one ended with."""
    trainer = make(tmp_path, server.url, max_steps=1)
    rows = []
    for count in (1, 1, 3):
        trainer.args.max_steps = count
        trainer.train()
        rows += steps(trainer)
    check(rows, "train() three times", 5)


def test_other_weights_in_the_same_folder(tmp_path, server):
    """After a run that ended, and after one that was killed."""
    folder = tmp_path / "adapters"
    for seed in (1, 2):
        rollout = AdapterRollout(server.url, str(folder))
        trainer = make(tmp_path / f"run{seed}", rollout, max_steps=3, seed=seed)
        trainer.train()
        check(steps(trainer), f"run {seed} in one folder", 3)
    assert not ranks.ended(server_run.start(tmp_path, server.url, kill_at=2, max_steps=3, seed=3))
    assert server.adapters()
    trainer = make(tmp_path / "after", AdapterRollout(server.url, str(folder)), max_steps=3, seed=4)
    trainer.train()
    check(steps(trainer), "after a killed run in one folder", 3)
    assert_nothing_is_left(server, folder)


def test_a_name_that_repeats_would_show(tmp_path, server, monkeypatch):
    """vLLM's prefix cache answers for the adapter that had the name and the path before."""
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex="repeated"))
    gaps = []
    for seed in (1, 2):
        rollout = AdapterRollout(server.url, str(tmp_path / "adapters"))
        options = dict(max_steps=3, seed=seed, max_sampler_gap=100.0)
        trainer = make(tmp_path / f"run{seed}", rollout, **options)
        trainer.train()
        gaps.append(max(row[GAP] for row in steps(trainer)))
    server_run.tell("repeated names", f"gap max {gaps[1]:.2g} nats")
    assert gaps[0] < server_run.EXACT and gaps[1] > 0.1
    assert_nothing_is_left(server, tmp_path / "adapters")


def test_two_runs_at_once(tmp_path, server):
    """Each to its end as if it were alone, one of them a rollout ahead."""
    options = {"a": dict(seed=1), "b": dict(seed=2, rollout_ahead=1)}
    alone = {
        name: server_run.finish(tmp_path / f"{name}_alone", server.url, max_steps=5, **own)
        for name, own in options.items()
    }
    running = [
        process
        for name, own in options.items()
        for process in server_run.start(tmp_path / name, server.url, max_steps=5, **own)
    ]
    assert ranks.ended(running), [server_run.said(tmp_path / name) for name in options]
    for name in options:
        check(server_run.read_steps(tmp_path / name), f"two at once, {name}", 5)
        same(server_run.end(tmp_path / name), alone[name])
    assert server.adapters() == []


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, server, ahead):
    """Killed between two checkpoints, and within a rollout that serves two updates."""
    options = dict(max_steps=8, save_steps=3, num_iterations=2, rollout_ahead=ahead)
    expected = server_run.finish(tmp_path / "whole", server.url, **options)
    run = tmp_path / "killed"
    for step in (5, 7):
        assert not ranks.ended(server_run.start(run, server.url, kill_at=step, **options))
    same(server_run.finish(run, server.url, **options), expected)
    check(server_run.read_steps(run), f"killed twice, {ahead} ahead", 8)
    assert_nothing_is_left(server, run / "adapters")


def test_two_ranks(tmp_path, server):
    """Groups lie on both; each asks for its own rows, and one of them sends the adapter."""
    options = dict(max_steps=4, per_device_train_batch_size=4, seed=1)
    whole = server_run.finish(tmp_path / "two", server.url, 2, **options)
    check(server_run.read_steps(tmp_path / "two"), "two ranks", 4)
    assert not ranks.ended(
        server_run.start(tmp_path / "killed", server.url, 2, kill_at=3, save_steps=2, **options)
    )
    same(server_run.finish(tmp_path / "killed", server.url, 2, save_steps=2, **options), whole)
    assert_nothing_is_left(server, tmp_path / "killed" / "adapters")


def test_two_ranks_end_where_one_gets_no_answer(tmp_path, server):
    with delayed(server.url, 30.0) as proxy:
        options = dict(max_steps=2, per_device_train_batch_size=4, timeout=1.0)
        assert not ranks.ended(server_run.start(tmp_path, proxy.url, 2, **options))
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"log_{rank}.txt").read_text()
        assert "SamplerError" in text and "a rollout has taken more than 1 s" in text


def test_an_evaluation_draws_by_the_policy_of_now(tmp_path, server):
    trainer = make(
        tmp_path,
        server.url,
        max_steps=3,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    figures = trainer.evaluate(Dataset.from_dict({"prompt": server_run.prompts()}))
    assert figures[f"eval_{GAP}"] < server_run.EXACT and figures["eval_kl"] > 0.1
    trainer.rollout_func.close()
    assert_nothing_is_left(server, tmp_path / "adapters")
