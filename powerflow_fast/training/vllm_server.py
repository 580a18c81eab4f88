"""The HTTP side of a vLLM server with LoRA: what it can do, its adapters, and its completions.

Plain requests of vLLM's OpenAI-compatible API, tried against vLLM 0.32. Nothing here knows a
trainer.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter

from powerflow_fast.training.sampler import SamplerError

T = TypeVar("T")
logger = logging.getLogger(__name__)
LANES = 256  # requests at a time; vLLM's own limit is 256 sequences by default
RETRIES = 3  # of a dropped connection
FIRST_PAUSE = 1.0  # seconds before the first; each later one is twice as long
POLL = 1.0  # seconds between two looks at /health
HEALTH_TIMEOUT = 5.0  # seconds
SILENCE = 15.0  # seconds without an answer of /health, after which a server is gone
BUSY = (429, 502, 503, 504)  # of a proxy before the server, mostly; tried again
LOAD_TIMEOUT = 1800.0  # seconds
KEY = "the server wants another api_key (or VLLM_API_KEY)"
START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank {rank} "
    "--max-loras 2 --logprobs-mode processed_logprobs"
)


class VLLMServer:
    """One vLLM server.

    Args:
        url: like http://localhost:8000, with or without /v1 at its end.
        api_key: what `vllm serve --api-key` was given; default: the variable VLLM_API_KEY, if set.

    Raises:
        ValueError: for a url without http:// or https://.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected one like http://localhost:8000, got {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._session = requests.Session()
        pool = HTTPAdapter(pool_maxsize=LANES)
        self._session.mount("http://", pool)
        self._session.mount("https://", pool)
        if key := api_key or os.environ.get("VLLM_API_KEY"):
            self._session.headers["Authorization"] = f"Bearer {key}"

    def is_healthy(self) -> bool:
        try:
            answer = self._session.get(f"{self.url}/health", timeout=HEALTH_TIMEOUT)
            return answer.status_code == 200
        except requests.RequestException:
            return False

    def wait_until_ready(self, seconds: float) -> None:
        """ValueError unless /health answers within `seconds`."""
        end, pause = time.monotonic() + seconds, POLL
        while not self.is_healthy():
            left = end - time.monotonic()
            if left <= 0:
                raise ValueError(
                    f"{self.url}: no vLLM server answers /health there, for {seconds:g} s; start "
                    f"one: {START.format(rank='RANK')}"
                )
            if pause == POLL < left:
                logger.warning("%s: waiting up to %g s for a vLLM server", self.url, seconds)
            time.sleep(min(pause, left))
            pause = 2 * POLL

    def base(self) -> dict[str, Any]:
        """What the server says of its base model: `id`, `root`, `max_model_len` [tokens], ..."""
        bases = [model for model in self._models() if not model.get("parent")]
        if not bases:
            raise ValueError(f"{self.url}/v1/models: expected a base model, got none")
        return bases[0]

    def adapters_in(self, folder: str) -> list[str]:
        """Names of the loaded adapters whose files lie in `folder`."""
        models = [model for model in self._models() if model.get("parent")]
        return [m["id"] for m in models if os.path.dirname(str(m.get("root"))) == folder]

    def _models(self) -> list[dict[str, Any]]:
        url = f"{self.url}/v1/models"
        try:
            response = self._session.get(url, timeout=30)
            if response.status_code == 401:
                raise ValueError(f"{url}: {KEY}")
            return list(response.json()["data"])
        except (requests.RequestException, LookupError, TypeError) as error:
            raise ValueError(f"{url}: expected vLLM's list of models, got {error!r}") from error

    def check(self, rank: int, folder: str, temperature: float = 1.0) -> int:
        """Whether the server can sample for a run that hands over adapters in `folder`.

        Args:
            rank: of the adapters.
            folder: made where it is missing.
            temperature: of the run's completions.

        Returns:
            Tokens that a prompt and its completion may have together.

        Raises:
            ValueError: says what is wrong and what to start the server with.
        """
        base = self.base()
        self._check_logprobs(base["id"], temperature)
        self._check_adapters(rank, folder)
        return int(base["max_model_len"])

    def _check_logprobs(self, model: str, temperature: float) -> None:
        """Of the token that top_k=1 leaves alone: 0 if temperature and top_k are in it."""
        request = {"model": model, "prompt": [0, 1, 2], "max_tokens": 1, "top_k": 1}
        request |= {"temperature": temperature, "logprobs": 0}
        try:
            answer = self._ask(request, 60.0)
            (logp,) = answer["choices"][0]["logprobs"]["token_logprobs"]
        except (SamplerError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self.url}: a first completion failed: {error}") from error
        if abs(logp) > 1e-3:
            raise ValueError(
                f"{self.url}: the server's log-probs are those of the raw logits, which no "
                "temperature has divided; start it with --logprobs-mode processed_logprobs"
            )

    def _check_adapters(self, rank: int, folder: str) -> None:
        """Offers an adapter of this rank without weights: what vLLM says of it comes in order."""
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=folder) as trial:
            os.chmod(trial, 0o755)  # the server may be another user's
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
            config |= {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
            config |= {"base_model_name_or_path": "", "inference_mode": True}
            Path(trial, "adapter_config.json").write_text(json.dumps(config))
            name = f"powerflow-trial-{uuid.uuid4().hex[:8]}"
            response = self._post("load_lora_adapter", {"lora_name": name, "lora_path": trial})
            if response.status_code == 200:
                self.unload(name)
                return
            problem = self._refusal(response, trial, rank)
            # An adapter without weights is refused in the end, by words that differ.
            if problem is not None:
                raise ValueError(problem)

    def load(self, name: str, path: str, rank: int) -> None:
        """SamplerError where the server does not take the adapter in the folder `path`."""
        try:
            response = self._post("load_lora_adapter", {"lora_name": name, "lora_path": path})
        except requests.RequestException as error:
            raise SamplerError(f"{self.url}: the server is gone ({_short(error)})") from error
        if response.status_code != 200:
            problem = self._refusal(response, path, rank)
            raise SamplerError(problem or f"{self.url}: {path}: {_reason(response)}")

    def unload(self, name: str) -> str | None:
        """Take an adapter off; returns what went wrong, if anything did."""
        try:
            response = self._post("unload_lora_adapter", {"lora_name": name}, 30.0)
        except requests.RequestException as error:
            return _short(error)
        return None if response.status_code in (200, 404) else _reason(response)

    def _post(
        self, route: str, body: dict[str, Any], timeout: float = LOAD_TIMEOUT
    ) -> requests.Response:
        return self._session.post(f"{self.url}/v1/{route}", json=body, timeout=timeout)

    def _refusal(self, response: requests.Response, path: str, rank: int) -> str | None:
        """What a refused adapter means, where that is known."""
        text, start = _reason(response), START.format(rank=rank)
        if "max_lora_rank" in text:
            return f"{self.url}: {text}; start the server with --max-lora-rank {rank}"
        if response.status_code == 404 and "No adapter found" in text:
            return (
                f"{self.url}: the server does not see the folder {path}; trainer and server need a "
                "file system in common, under the same path"
            )
        if response.status_code == 401:
            return f"{self.url}: {KEY}"
        if response.status_code == 404:  # the route itself
            return f"{self.url}: the server takes no adapters while it runs; start it with {start}"
        if "lora" in text.lower() and "enable" in text.lower():
            return f"{self.url}: {text}; start the server with {start}"
        return None

    def complete(self, bodies: Sequence[dict[str, Any]], timeout: float) -> list[Future]:
        """Ask for one completion per request body, in the background; `collect` has the answers."""
        return in_background([partial(self._choice, body, timeout) for body in bodies])

    def _choice(self, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        choices = self._ask(body, timeout).get("choices", [])
        if len(choices) != 1:
            raise SamplerError(f"{self.url}: expected 1 completion, got {len(choices)}")
        choice = choices[0]
        if choice.get("finish_reason") not in ("stop", "length"):  # a server that ends aborts
            raise SamplerError(
                f"{self.url}: the server broke off a completion, {choice.get('finish_reason')!r}"
            )
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
        if not ids:
            raise SamplerError(
                f"{self.url}: expected the completion's token_ids, got {ids!r}; is it vLLM 0.10.2 "
                "or newer?"
            )
        if len(logprobs.get("token_logprobs") or []) != len(ids):
            raise SamplerError(f"{self.url}: expected a log-prob for each of {len(ids)} tokens")
        return {"token_ids": ids, "logprobs": logprobs["token_logprobs"]}

    def _ask(self, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        url = f"{self.url}/v1/completions"
        end = time.monotonic() + timeout
        for attempt in range(RETRIES + 1):
            last = attempt == RETRIES
            try:
                left = max(end - time.monotonic(), 0.1)
                response = self._session.post(url, json=body, timeout=(10.0, left))
            except requests.ReadTimeout as error:
                raise SamplerError(slow(self.url, timeout)) from error
            except requests.RequestException as error:
                if last:
                    raise SamplerError(f"{url}: the server is gone ({_short(error)})") from error
            else:
                if response.status_code == 200:
                    return response.json()
                if last or response.status_code not in BUSY:
                    raise SamplerError(self._failure(response, body))
            time.sleep(FIRST_PAUSE * 2.0**attempt)
        raise AssertionError("not reached")

    def _failure(self, response: requests.Response, body: dict[str, Any]) -> str:
        text = f"{self.url}: {response.status_code}, {_reason(response).rstrip('.')}"
        if response.status_code >= 500:
            text += "; the server failed, its log says why"
        if response.status_code == 404 and "does not exist" in text:
            text += (
                f"; it has lost the adapter {body['model']}: was it started anew, or was the "
                "adapter unloaded by someone else?"
            )
        return text

    def collect(self, futures: Sequence[Future[T]], end: float, timeout: float) -> list[T]:
        """The results of `complete`, which are waited for until the moment `end` (monotonic).

        Raises:
            SamplerError: for the first request that failed, where the server falls silent, and
                after the end.
        """
        pending, alive = set(futures), time.monotonic()
        while pending:
            left = max(end - time.monotonic(), 0.0)
            done, pending = wait(pending, min(POLL, left), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if not pending:
                break
            if time.monotonic() > end:
                raise SamplerError(slow(self.url, timeout))
            if self.is_healthy():
                alive = time.monotonic()
            elif time.monotonic() - alive > SILENCE:
                raise SamplerError(
                    f"{self.url}: the server has not answered /health for {SILENCE:g} s, with "
                    f"{len(pending)} completions to come: it was stopped, or hangs"
                )
        return [future.result() for future in futures]


def slow(url: str, timeout: float) -> str:
    limit = f"{timeout:g} s (timeout of AdapterRollout, --adapter_server_timeout)"
    return f"{url}: a rollout has taken more than {limit}"


def in_background(jobs: Iterable[Callable[[], T]]) -> list[Future[T]]:
    """Start the jobs, LANES at a time, in threads that do not keep the process alive."""
    jobs = list(jobs)
    futures: list[Future[T]] = [Future() for _ in jobs]
    queue = iter(list(zip(jobs, futures, strict=True)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job, future = next(queue, (None, None))
            if job is None or future is None:
                return
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

    for _ in range(min(LANES, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    return futures


def _reason(response: requests.Response) -> str:
    """The message in an error's answer, or its text."""
    try:
        answer = response.json()
        error = answer.get("error", answer.get("detail", answer))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return response.text[:500]


def _short(error: Exception) -> str:
    return type(error).__name__
