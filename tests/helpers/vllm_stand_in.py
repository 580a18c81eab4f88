"""A stand-in for a vLLM server, in this process: it loads what it is sent and samples so.

It speaks the part of vLLM 0.32's protocol that rollouts use, with vLLM's words for errors, and
keeps what it computed by an adapter's name and path, as vLLM's prefix cache does.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from peft import PeftModel

from tests.helpers import tiny

BASE = "base"


class StandIn:
    """What tests set, and what they look at afterwards."""

    def __init__(self) -> None:
        self.model = tiny.model
        self.raw = False  # log-probs of logits that the temperature has not divided
        self.max_len, self.max_rank = 64, 16
        self.updating = True  # VLLM_ALLOW_RUNTIME_LORA_UPDATING
        self.key: str | None = None
        self.sees = True  # the trainer's folder
        self.hung = threading.Event()  # answers nothing, not even /health
        self.delay = 0.0  # seconds before a completion
        self.dropped = 0  # connections to drop before the next answers
        self.busy = 0  # answers of 503 before the next completions
        self.edit = lambda choices: choices
        self.asked: list[dict] = []  # requests for completions of adapters
        self.loaded: list[str] = []  # names, in order
        self.adapters: dict[str, tuple[str, str]] = {}  # name: name and path
        self.cache: dict[tuple[str, str], PeftModel] = {}
        self.lock = threading.Lock()

    def load_lora_adapter(self, sent):
        if not self.updating:
            return 404, {"detail": "Not Found"}
        name, path = sent["lora_name"], sent["lora_path"]
        config = os.path.join(path, "adapter_config.json")
        if not self.sees or not os.path.isfile(config):
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        with open(config) as file:
            rank = json.load(file)["r"]
        if rank > self.max_rank:
            reason = f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
            return error(500, f"Call to add_lora method failed: Worker failed with '{reason}'")
        if not os.path.isfile(os.path.join(path, "adapter_model.safetensors")):
            return error(500, "Call to add_lora method failed: Worker failed with error ''")
        key = (name, path)
        if key not in self.cache:
            self.cache[key] = PeftModel.from_pretrained(self.model(), path).eval()
        self.adapters[name] = key
        self.loaded.append(name)
        return 200, "Success"

    def unload_lora_adapter(self, sent):
        found = self.adapters.pop(sent["lora_name"], None)
        return (200, "Success") if found else error(404, "cannot be found")

    def models(self):
        base = {"id": BASE, "root": BASE, "parent": None, "max_model_len": self.max_len}
        loras = [{"id": n, "root": path, "parent": BASE} for n, path in self.adapters.values()]
        return 200, {"data": [base, *loras]}

    def completions(self, sent):
        name = sent["model"]
        if name != BASE:
            self.asked.append(sent)
        if self.busy:
            self.busy -= 1
            return error(503, "busy")
        time.sleep(self.delay)
        if name != BASE and name not in self.adapters:
            return error(404, f"The model `{name}` does not exist. Valid aliases: <path>")
        policy = self.model().eval() if name == BASE else self.cache[self.adapters[name]]
        with self.lock:
            ids, logps = self.draw(policy, sent["prompt"], sent)
        choice = {"index": 0, "logprobs": {"token_logprobs": logps}, "finish_reason": "length"}
        if sent.get("return_token_ids"):
            choice["token_ids"] = ids
        return 200, {"choices": self.edit([choice])}

    @torch.no_grad()
    def draw(self, policy, prompt, sent):
        generator = torch.Generator().manual_seed(sent.get("seed", 0))
        ids, logps, ends = [], [], sent.get("stop_token_ids", [tiny.EOS])
        while len(ids) < sent["max_tokens"] and not set(ids) & set(ends):
            raw = policy(torch.tensor([prompt + ids])).logits[0, -1]
            logits = raw / sent["temperature"]
            if sent.get("top_k") == 1:
                logits = logits.where(logits == logits.max(), -torch.inf)
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            scored = raw if self.raw else logits
            logps.append(float(scored.log_softmax(-1)[ids[-1]]))
        return ids, logps


def error(status, message):
    return status, {"error": {"message": message, "code": status}}


def handler(stand_in: StandIn):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer(stand_in.models if self.path == "/v1/models" else lambda: (200, {}))

        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            route = self.path.removeprefix("/v1/")
            if route == "completions" and stand_in.dropped:
                stand_in.dropped -= 1
                self.close_connection = True
                self.connection.close()
                return
            self.answer(lambda: getattr(stand_in, route)(sent))

        def answer(self, part):
            while stand_in.hung.is_set():
                time.sleep(0.05)
            key = self.headers.get("Authorization")
            wrong = stand_in.key and key != f"Bearer {stand_in.key}" and self.path != "/health"
            status, answer = error(401, "Unauthorized") if wrong else part()
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@contextmanager
def serving(stand_in: StandIn, port: int = 0) -> Iterator[str]:
    """The stand-in's URL, for the time inside."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # a client that went away

    server = Server(("127.0.0.1", port), handler(stand_in))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stand_in.hung.clear()
        server.shutdown()
        thread.join()
        server.server_close()
