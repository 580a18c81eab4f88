"""Rollouts ahead of the trainer, drawn by a stand-in for vLLM."""

import time

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from powerflow_fast.training.health import TrainingStopped  # noqa: E402
from powerflow_fast.training.vllm_adapter import AdapterRollout  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

GAP = "sampling/sampling_logp_difference/max"


@pytest.fixture
def run(tmp_path, url):
    """A trainer with its logs, in a folder of its own."""

    def run(name, **options):
        rollout = AdapterRollout(url, str(tmp_path / name / "adapters"))
        defaults = dict(max_steps=4, learning_rate=0.05, temperature=0.7)
        return make(tmp_path / name, rollout=rollout, **defaults | options)

    return run


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_rollout_is_scored_by_the_policy_that_drew_it(run, server, ahead):
    trainer, seen = run("run", rollout_ahead=ahead, max_steps=5)
    trainer.train()
    expected = [float(min(step, ahead)) for step in range(5)]
    assert [log["sampling/staleness"] for log in seen.logs] == expected
    assert all(log[GAP] < 1e-5 for log in seen.logs)
    # At the start the policy has not moved; from then on it is another than the one that drew.
    assert "sampling/drift/mean" not in seen.logs[0] and seen.logs[-1]["sampling/drift/mean"] > 1e-3
    assert abs(seen.logs[-1]["importance/mean"] - 1) > 1e-4
    assert len(server.asked) == 5 * 8 and not server.adapters
    assert len(set(server.loaded)) == 5 - ahead  # the last updates send nothing


def test_the_prompts_are_those_of_a_run_on_policy(run, server):
    """In the same order, over the ends of epochs, with the same seeds."""
    data = tiny.dataset(2)  # 8 prompts: 4 rollouts an epoch
    sent = []
    for name, ahead in (("on", 0), ("off", 2)):
        server.asked.clear()
        run(name, rollout_ahead=ahead, data=data, max_steps=11, shuffle_dataset=True)[0].train()
        rows = [(tuple(body["prompt"]), body["seed"]) for body in server.asked]
        sent.append(sorted(rows))
        assert len(rows) == 11 * 8
    assert sent[0] == sent[1]


def test_a_run_can_be_repeated_and_resumed(run):
    """Token for token: what was in flight at a checkpoint is in it."""
    options = dict(rollout_ahead=2, max_steps=6, save_strategy="steps", save_steps=2)
    first, seen = run("first", **options)
    first.train()
    second, again = run("second", **options)
    second.train()
    same(parameters(first), parameters(second))
    assert [log["loss"] for log in seen.logs] == [log["loss"] for log in again.logs]
    for step in (2, 4):
        resumed, rest = run("first", **options)
        resumed.train(f"{resumed.args.output_dir}/checkpoint-{step}")
        same(parameters(first), parameters(resumed))
        assert [log["loss"] for log in rest.logs] == [log["loss"] for log in seen.logs[step:]]


def test_several_updates_a_rollout_and_several_rollouts_an_update(run, server):
    """Staleness counts updates: a rollout that serves two is asked for one update before."""
    trainer, seen = run("slow", rollout_ahead=1, num_iterations=2, max_steps=6)
    trainer.train()
    drawn = [log.get("sampling/staleness") for log in seen.logs]
    assert drawn == [0, None, 1, None, 1, None] and all(log.get(GAP, 0) < 1e-5 for log in seen.logs)
    server.asked.clear()
    trainer, seen = run(
        "fast",
        rollout_ahead=1,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        max_steps=3,
    )
    trainer.train()
    assert [log["sampling/staleness"] for log in seen.logs] == [0, 1, 1]
    assert len(server.asked) == 3 * 2 * 8


def test_prompts_from_a_stream(run, server):
    stream = tiny.dataset(8).to_iterable_dataset()
    trainer, seen = run("run", rollout_ahead=1, data=stream)
    trainer.train()
    assert [log["sampling/staleness"] for log in seen.logs] == [0, 1, 1, 1]
    assert len(server.asked) == 4 * 8


class Watch(TrainerCallback):
    """Within each update: how many requests have come by then, after a wait for more."""

    def __init__(self, server, seconds):
        self.server, self.seconds, self.came = server, seconds, []

    def on_pre_optimizer_step(self, *_, **__):
        end, more = time.monotonic() + self.seconds, min(8 * (len(self.came) + 2), 24)
        while len(self.server.asked) < more and time.monotonic() < end:
            time.sleep(0.01)
        self.came.append(len(self.server.asked))


@pytest.mark.parametrize(("ahead", "seconds"), [(0, 0.3), (1, 20.0)])
def test_the_sampler_draws_while_the_trainer_updates(run, server, ahead, seconds):
    watch = Watch(server, seconds)
    trainer, seen = run("run", rollout_ahead=ahead, max_steps=3)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.came[:2] == [8 * (1 + ahead), 8 * (2 + ahead)]
    log = seen.logs[-2]
    assert log["sampling/trainer_waits"] >= 0 and log["sampling/sampler_waits"] >= 0


def test_an_adapter_that_the_server_does_not_apply_is_noticed(run, server):
    """Off policy too: a rollout is compared with what should have drawn it."""
    trainer, _ = run("run", rollout_ahead=1, max_steps=6, learning_rate=0.2)
    loaded = server.load_lora_adapter

    def base_alone(sent):
        answer = loaded(sent)
        server.cache[server.adapters[sent["lora_name"]]].disable_adapter_layers()
        return answer

    server.load_lora_adapter = base_alone
    with pytest.raises(TrainingStopped, match="nats/token off the policy's"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(rollout=None), "transformers samples on the trainer's own device"),
        (dict(), "this rollout_func answers at once"),
        (dict(rollout=None, use_vllm=True, vllm_mode="colocate"), "a colocated vLLM samples"),
        (dict(rollout=None, use_vllm=True, vllm_mode="server"), "TRL changes the weights"),
    ],
)
def test_without_a_sampler_of_its_own_it_is_refused(tmp_path, options, why):
    with pytest.raises(ValueError, match=f"rollout_ahead: expected 0, got 1: {why}"):
        make(tmp_path, rollout_ahead=1, **options)


def test_weights_cannot_be_left_out(tmp_path):
    options = dict(rollout_ahead=1, vllm_importance_sampling_correction=False)
    with pytest.raises(ValueError, match="expected True beside rollout_ahead"):
        tiny.config(tmp_path, **options)


def test_the_last_rollouts_are_not_drawn_in_vain(run, server):
    data = Dataset.from_dict({"prompt": tiny.PROMPTS})
    trainer, _ = run("run", rollout_ahead=4, max_steps=2, data=data)
    trainer.train()
    assert len(server.asked) == 2 * 8
