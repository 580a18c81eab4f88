"""Adapter-only rollouts against a stand-in for vLLM; `make test-vllm` has the real one."""

import json
import os
import time

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainingArguments  # noqa: E402

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.cli import main  # noqa: E402
from powerflow_fast.training import vllm_server  # noqa: E402
from powerflow_fast.training.health import TrainingStopped  # noqa: E402
from powerflow_fast.training.sampler import SamplerError  # noqa: E402
from powerflow_fast.training.vllm_adapter import AdapterRollout  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.helpers.vllm_stand_in import error  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

GAP = "sampling/sampling_logp_difference/max"


@pytest.fixture
def rollout(tmp_path, url):
    return AdapterRollout(url, str(tmp_path / "adapters"), server_timeout=0.1)


def left_behind(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name != ".lock"]


def test_the_server_samples_with_the_adapter_of_this_step(tmp_path, server, rollout):
    """Its log-probs are the trainer's at every step; a stale adapter's would not be."""
    trainer, seen = make(
        tmp_path, rollout=rollout, max_steps=3, learning_rate=0.05, temperature=0.7
    )
    trainer.train()
    assert len(server.loaded) == len(set(server.loaded)) == 3
    assert not server.adapters and not left_behind(tmp_path / "adapters")
    assert seen.logs[2]["kl"] > 1e-3
    for log in seen.logs:
        assert log[GAP] < 1e-5
        assert log["importance/mean"] == pytest.approx(1.0, abs=1e-5)
        assert log["sampling/staleness"] == 0 and log["sampling/trainer_waits"] > 0


def test_no_name_is_used_twice(tmp_path, server, url, rollout):
    """A prefix cache that is keyed by it would answer for another adapter."""
    trainer, seen = make(tmp_path / "a", rollout=rollout, max_steps=1, learning_rate=0.05)
    trainer.train()
    trainer.train()
    other = AdapterRollout(url, rollout.folder)
    another, again = make(tmp_path / "b", rollout=other, max_steps=2, learning_rate=0.05, seed=7)
    another.train()
    assert len(server.loaded) == len(set(server.loaded)) == 4 and not server.adapters
    assert all(log[GAP] < 1e-5 for log in seen.logs + again.logs)


def test_a_request_and_a_seed_for_every_completion(tmp_path, server, rollout):
    options = dict(temperature=0.5, top_p=0.9, generation_kwargs={"max_tokens": 3})
    trainer, _ = make(tmp_path, rollout=rollout, max_sampler_gap=9.0, max_steps=2, **options)
    trainer.train()
    assert len({sent["seed"] for sent in server.asked}) == len(server.asked) == 16
    sent = server.asked[-1]
    assert sent["max_tokens"] == 3 and sent["top_p"] == 0.9 and sent["temperature"] == 0.5
    assert sent["stop_token_ids"] == [tiny.EOS]
    seeds = {sent["seed"] for sent in server.asked}
    other = AdapterRollout(rollout.server.url, rollout.folder)
    make(tmp_path / "again", rollout=other, max_steps=2)[0].train()
    assert {sent["seed"] for sent in server.asked[16:]} == seeds  # a resumed run's are the same


def test_an_evaluation_draws_by_the_policy_of_now(tmp_path, server, rollout):
    trainer, seen = make(
        tmp_path,
        rollout=rollout,
        max_steps=2,
        learning_rate=0.05,
        evaluation=tiny.dataset(1),
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    figures = trainer.evaluate()
    assert figures[f"eval_{GAP}"] < 1e-5
    rollout.close()
    assert not server.adapters and not left_behind(rollout.folder)


def test_a_connection_that_drops_and_a_busy_answer_are_tried_again(
    tmp_path, server, rollout, monkeypatch
):
    monkeypatch.setattr(vllm_server, "FIRST_PAUSE", 0.01)
    trainer, _ = make(tmp_path, rollout=rollout)
    server.dropped, server.busy = 3, 2
    trainer.train()
    assert len(server.asked) == 8 + 2 and not server.dropped


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        (dict(raw=True), "--logprobs-mode processed_logprobs"),
        (dict(updating=False), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (dict(max_rank=2), "--max-lora-rank 4"),
        (dict(max_len=8), "prompt 0 has 5 tokens, and up to 6 to come: beyond the context of 8"),
        (dict(sees=False), "does not see the folder .*adapters"),
        (dict(key="secret"), "VLLM_API_KEY"),
    ],
)
def test_a_server_that_cannot_serve_the_run_is_refused(tmp_path, server, rollout, setting, match):
    """Before a trainer is built; and nothing is left in the folder of the run."""
    for name, value in setting.items():
        setattr(server, name, value)
    with pytest.raises(ValueError, match=match):
        make(tmp_path / "run", rollout=rollout, temperature=0.7)
    assert not server.asked and not os.path.isdir(rollout.folder)


def test_addresses_and_keys(tmp_path, server, url, monkeypatch):
    with pytest.raises(ValueError, match="url: expected one like http"):
        AdapterRollout("localhost:8000", str(tmp_path))
    nobody = AdapterRollout("http://127.0.0.1:9", str(tmp_path / "a"), server_timeout=0.1)
    with pytest.raises(ValueError, match="no vLLM server answers /health"):
        make(tmp_path / "run", rollout=nobody)
    server.key = "secret"
    given = AdapterRollout(f"{url}/v1/", str(tmp_path / "b"), api_key="secret")
    make(tmp_path / "c", rollout=given)[0].train()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    make(tmp_path / "d", rollout=AdapterRollout(url, str(tmp_path / "e")))[0].train()


def test_another_base_ends_the_run(tmp_path, server, rollout):
    def other_base():
        model = tiny.model()
        with torch.no_grad():
            model.lm_head.weight.mul_(3)
        return model

    server.model = other_base
    with pytest.raises(TrainingStopped, match="nats/token off the policy's.*same model.*NF4"):
        make(tmp_path, rollout=rollout)[0].train()


def no_ids(choices):
    return [choice | {"token_ids": None} for choice in choices]


def no_logprobs(choices):
    return [choice | {"logprobs": None} for choice in choices]


def broken_off(choices):
    return [choice | {"finish_reason": "abort"} for choice in choices]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (broken_off, "the server broke off a completion, 'abort'"),
        (lambda choices: [], "expected 1 completion, got 0"),
        (no_ids, "expected the completion's token_ids.*vLLM 0.10.2"),
        (no_logprobs, "expected a log-prob for each of"),
    ],
)
def test_answers_of_another_form(tmp_path, server, rollout, edit, match):
    trainer, _ = make(tmp_path, rollout=rollout)
    server.edit = edit
    with pytest.raises(SamplerError, match=match):
        trainer.train()
    assert not server.adapters and not left_behind(rollout.folder)


def test_a_server_whose_engine_dies(tmp_path, server, rollout):
    trainer, _ = make(tmp_path, rollout=rollout)
    server.completions = lambda sent: error(500, "EngineCore encountered an issue.")
    with pytest.raises(SamplerError, match="500, EngineCore .* issue; the server failed, its log"):
        trainer.train()


def test_what_vllm_does_not_serve(tmp_path, url):
    def trainer(model, lora):
        return PowerFlowTrainer(
            model,
            tiny.config(tmp_path),
            tiny.dataset(),
            processing_class=tiny.tokenizer(),
            peft_config=lora,
            rollout_func=AdapterRollout(url, str(tmp_path / "adapters")),
        )

    with pytest.raises(ValueError, match="DoRA"):
        trainer(tiny.model(), tiny.lora(use_dora=True)).train()
    tiny.model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="rollout_func: AdapterRollout sends an adapter"):
        trainer(str(tmp_path / "model"), None)


def test_a_second_run_in_the_same_folder(tmp_path, url, rollout):
    first, _ = make(tmp_path / "a", rollout=rollout)
    other = AdapterRollout(url, rollout.folder)
    second, _ = make(tmp_path / "b", rollout=other)
    rollout.put(first)
    refused = "folder: .*adapters is in use by another run"
    with pytest.raises(SamplerError, match=refused):
        second.train()
    rollout.close()
    second.train()
    rollout.put(first)
    with pytest.raises(ValueError, match=refused):
        make(tmp_path / "c", rollout=AdapterRollout(url, rollout.folder))


def test_the_folder_of_the_first_rank_is_no_other_run(tmp_path, url, capsys, monkeypatch):
    """It may begin to write there before another rank looks."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.txt").write_text("rain\nsea\n")
    out = tmp_path / "out"
    flags = {"model": tmp_path / "model", "data": tmp_path / "data.txt", "output_dir": out}
    flags |= {"adapter_server": url, "lora_rank": 4, "use_cpu": True, "report_to": "none"}
    argv = ["train", *(str(word) for k, v in flags.items() for word in (f"--{k}", v))]
    assert main(argv) == 2
    assert "beyond the context of 64" in capsys.readouterr().err
    assert not out.exists()
    (out / "adapters").mkdir(parents=True)
    assert main(argv) == 2
    assert "holds another run" in capsys.readouterr().err
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda self: 1))
    assert main(argv) == 2
    assert "beyond the context of 64" in capsys.readouterr().err


def test_what_a_killed_run_left_is_cleared_away(tmp_path, server, rollout):
    trainer, _ = make(tmp_path, rollout=rollout)
    old = os.path.join(rollout.folder, "powerflow-dead-3")
    os.makedirs(old)
    with open(os.path.join(old, "adapter_config.json"), "w") as file:
        json.dump({"r": 4}, file)
    server.adapters["powerflow-dead-3"] = ("powerflow-dead-3", old)
    server.adapters["others"] = ("others", "/somewhere/others")
    trainer.train()
    assert list(server.adapters) == ["others"] and not left_behind(rollout.folder)


def test_a_full_disk(tmp_path, rollout, monkeypatch):
    from powerflow_fast.training import vllm_adapter

    def full(*_):
        raise OSError(28, "No space left on device")

    trainer, _ = make(tmp_path, rollout=rollout)
    monkeypatch.setattr(vllm_adapter, "save_lora_adapter", full)
    with pytest.raises(SamplerError, match="folder: .*could not take an adapter: .*No space left"):
        trainer.train()


def hang(server):
    server.hung.set()


def slow(server):
    server.delay = 30.0


def restart(server):
    server.adapters.clear()
    server.cache.clear()


@pytest.mark.parametrize(
    ("trouble", "match"),
    [
        (hang, "has not answered /health for 0.5 s, with 8 completions to come"),
        (slow, "a rollout has taken more than 3 s"),
        (restart, "has lost the adapter powerflow-.*started anew"),
    ],
)
def test_what_is_trained_is_saved_when_the_server_fails(
    tmp_path, server, rollout, monkeypatch, trouble, match
):
    monkeypatch.setattr(vllm_server, "SILENCE", 0.5)
    monkeypatch.setattr(vllm_server, "POLL", 0.1)
    monkeypatch.setattr(vllm_server, "HEALTH_TIMEOUT", 0.2)
    rollout.timeout = 3.0 if trouble is slow else 60.0
    options = dict(max_steps=4, save_strategy="steps", save_steps=100)
    trainer, _ = make(tmp_path, rollout=rollout, **options)
    original = rollout.draw

    def draw(*args):
        if trainer.state.global_step == 2:
            trouble(server)
        return original(*args)

    rollout.draw = draw
    began = time.monotonic()
    with pytest.raises(SamplerError, match=f"{match}.*checkpoint-2 holds all that was trained"):
        trainer.train()
    assert time.monotonic() - began < 30
    server.hung.clear()
    server.delay = 0.0
    again, seen = make(
        tmp_path, rollout=AdapterRollout(rollout.server.url, rollout.folder), **options
    )
    again.train("last")
    assert again.state.global_step == 4 and seen.logs[-1][GAP] < 1e-5
