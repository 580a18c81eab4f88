"""Servers that cannot serve a run are refused with the cure, before a model is trained."""

import time

import pytest

pytest.importorskip("trl")

from powerflow_fast.training.health import TrainingStopped  # noqa: E402
from powerflow_fast.training.vllm_adapter import AdapterRollout  # noqa: E402
from tests.helpers import server_run, tiny  # noqa: E402
from tests.helpers.server_run import check, make, steps  # noqa: E402
from tests.helpers.vllm_process import (  # noqa: E402
    LENGTH,
    LORA,
    PROCESSED,
    RIGHT,
    UPDATING,
    Server,
    needs_vllm,
    save_toy,
    serving,
    toy_model,
)

pytestmark = needs_vllm
SECONDS = 30.0


class Within:
    """Measures and bounds the time to an error."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_) -> None:
        took = time.monotonic() - self.began
        server_run.tell(self.name, f"{took:.1f} s to the error")
        assert took < SECONDS


def refuses(folder, server, match, **options) -> None:
    """ValueError, and what was made for adapters is gone again."""
    adapters = folder / "adapters"
    rollout = AdapterRollout(server.url, str(adapters), server_timeout=1.0)
    with Within(match), pytest.raises(ValueError, match=match):
        make(folder / "run", rollout, **options)
    assert not adapters.exists()


@pytest.fixture(scope="module")
def servers(base, tmp_path_factory):
    """By what is wrong with them; "other" has another base, a key and a short context."""
    logs = tmp_path_factory.mktemp("servers")
    other = save_toy(logs / "other", scale=3.0)
    made = {
        "raw": Server(base, logs / "raw.txt", *LENGTH, *LORA, **UPDATING),
        "plain": Server(base, logs / "plain.txt", *LENGTH, *PROCESSED, **UPDATING),
        "fixed": Server(base, logs / "fixed.txt", *RIGHT),
        "other": Server(
            other,
            logs / "other.txt",
            *("--max-model-len", "128", "--api-key", "secret"),
            *(*LORA, *PROCESSED),
            **UPDATING,
        ),
    }
    with serving(*made.values()):
        yield made


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("raw", "log-probs are those of the raw logits.*--logprobs-mode processed_logprobs"),
        ("plain", "start .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 .*--enable-lora"),
        ("fixed", "start .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 .*--enable-lora"),
        ("other", "wants another api_key"),
    ],
)
def test_a_server_started_otherwise(tmp_path, servers, kind, match):
    refuses(tmp_path, servers[kind], match)


def test_a_rank_beyond_the_servers(tmp_path, server):
    match = "LoRA rank 32 is greater than max_lora_rank 16.*--max-lora-rank 32"
    refuses(tmp_path, server, match, lora=tiny.lora(r=32))


def test_a_folder_that_the_server_does_not_see(tmp_path, server, monkeypatch):
    """The same path is another folder for each process."""
    monkeypatch.chdir(tmp_path)
    rollout = AdapterRollout(server.url, "/proc/self/cwd/adapters")
    with Within("folder"), pytest.raises(ValueError, match="does not see the folder /proc/self"):
        make(tmp_path / "run", rollout)
    assert not (tmp_path / "adapters").exists()


def test_no_server(tmp_path, server):
    class Nowhere:
        url = "http://127.0.0.1:9"

    refuses(tmp_path, Nowhere, "no vLLM server answers /health there, for 1 s")


def test_another_base(tmp_path, servers):
    """Its log-probs are another model's: the first rollout ends the run."""
    rollout = AdapterRollout(servers["other"].url, str(tmp_path / "adapters"), api_key="secret")
    trainer = make(tmp_path, rollout, max_steps=2)
    match = r"nats/token off the policy's.*same model"
    with Within("another base"), pytest.raises(TrainingStopped, match=match):
        trainer.train()
    assert servers["other"].adapters() == []


def test_a_key_and_a_short_context(tmp_path, servers, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    model = toy_model()
    model.lm_head.weight.data.mul_(3.0)
    with Within("context"), pytest.raises(ValueError, match="beyond the context of 128"):
        make(tmp_path / "long", servers["other"].url, max_completion_length=80)
    trainer = make(tmp_path / "run", servers["other"].url, model=model, max_steps=3)
    trainer.train()
    check(steps(trainer), "a key", 3)
    assert servers["other"].adapters() == []
