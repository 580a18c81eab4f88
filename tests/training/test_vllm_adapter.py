"""Adapter-only rollouts against a stand-in for vLLM that loads what it is sent and samples so."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("trl")

from peft import PeftModel  # noqa: E402

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.training.vllm_adapter import AdapterRollout  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402


class Server(BaseHTTPRequestHandler):
    """The three requests of vLLM's protocol; completions are drawn from base and adapter."""

    raw = False  # log-probs of logits that the temperature has not divided
    asked: list[dict] = []
    adapters: dict[str, PeftModel] = {}
    loaded: list[str] = []

    def log_message(self, *_):
        pass

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = getattr(self, self.path.removeprefix("/v1/"))(sent)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def load_lora_adapter(self, sent):
        if sent["lora_name"] in self.adapters:
            return 400, "has already been loaded"
        policy = PeftModel.from_pretrained(tiny.model(), sent["lora_path"]).eval()
        self.adapters[sent["lora_name"]] = policy
        self.loaded.append(sent["lora_name"])
        return 200, "ok"

    def unload_lora_adapter(self, sent):
        found = self.adapters.pop(sent["lora_name"], None)
        return (200, "ok") if found else (404, "no such adapter")

    def completions(self, sent):
        if sent["model"] not in self.adapters:
            return 404, f"no model {sent['model']}"
        self.asked.append(sent)
        choices = []
        for index, prompt in enumerate(sent["prompt"]):
            ids, logps = self.draw(self.adapters[sent["model"]], prompt, sent)
            choice = {"index": index, "token_ids": ids, "logprobs": {"token_logprobs": logps}}
            choices.insert(0, choice)  # in no promised order
        return 200, {"choices": choices}

    @torch.no_grad()
    def draw(self, policy, prompt, sent):
        ids, logps = [], []
        while len(ids) < sent["max_tokens"] and tiny.EOS not in ids:
            logits = policy(torch.tensor([prompt + ids])).logits[0, -1] / sent["temperature"]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
            scored = logits * sent["temperature"] if self.raw else logits
            logps.append(float(scored.log_softmax(-1)[ids[-1]]))
        return ids, logps


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Server.adapters, Server.loaded = {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_server_samples_with_the_adapter_of_this_step(tmp_path, url):
    """Its log-probs are the trainer's at every step; a stale adapter's would not be."""
    folder = tmp_path / "adapters"
    rollout = AdapterRollout(url, str(folder))
    trainer, seen = make(
        tmp_path, rollout=rollout, max_steps=3, learning_rate=0.05, temperature=0.7
    )
    trainer.train()
    assert Server.loaded == [f"powerflow-{rollout.run}-{step}" for step in range(3)]
    assert not Server.adapters and not list(folder.iterdir())  # nothing is left behind
    assert seen.logs[2]["kl"] > 1e-3
    for log in seen.logs:
        assert log["sampling/sampling_logp_difference/max"] < 1e-5
        assert log["importance/mean"] == pytest.approx(1.0, abs=1e-5)


def test_no_name_is_used_twice(tmp_path, url):
    """A prefix cache that is keyed by it would answer for another adapter."""
    rollout = AdapterRollout(url, str(tmp_path / "adapters"))
    trainer, _ = make(tmp_path / "a", rollout=rollout, max_steps=1)
    trainer.train()
    trainer.train()
    other = AdapterRollout(url, str(tmp_path / "adapters"))
    make(tmp_path / "b", rollout=other, max_steps=1)[0].train()
    assert len(Server.loaded) == len(set(Server.loaded)) == 3 and not Server.adapters


def test_sampling_options_reach_the_server_and_raw_log_probs_are_noticed(tmp_path, url):
    rollout = AdapterRollout(url, str(tmp_path / "adapters"))
    options = dict(rollout=rollout, temperature=0.5)
    trainer, _ = make(tmp_path, **options, generation_kwargs={"max_tokens": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "raw", True)
        with pytest.warns(UserWarning, match="nats/token off the policy's.*processed_logprobs"):
            trainer.train()
    assert Server.asked[-1]["max_tokens"] == 3


def test_what_vllm_cannot_serve_or_refuses_is_an_error(tmp_path, url):
    def fails(error, match, rollout, **lora):
        trainer = PowerFlowTrainer(
            tiny.model(),
            tiny.config(tmp_path),
            tiny.dataset(),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora(**lora),
            rollout_func=rollout,
        )
        with pytest.raises(error, match=match):
            trainer.train()

    fails(ValueError, "DoRA", AdapterRollout(url, str(tmp_path / "dora")), use_dora=True)
    lost = AdapterRollout(url, str(tmp_path / "lost"))
    lost._send = lambda trainer: setattr(lost, "name", "unknown")
    fails(RuntimeError, "404.*no model unknown", lost)
