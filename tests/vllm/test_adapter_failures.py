"""What happens to a vLLM server in mid-run: an error in seconds, and nothing trained is lost."""

import signal
import time

import pytest
import requests
import torch

pytest.importorskip("trl")

from powerflow_fast.training.sampler import SamplerError  # noqa: E402
from powerflow_fast.training.vllm_adapter import AdapterRollout  # noqa: E402
from tests.helpers import server_run  # noqa: E402
from tests.helpers.kill_run import same  # noqa: E402
from tests.helpers.server_run import check, make, steps  # noqa: E402
from tests.helpers.slow_proxy import delayed  # noqa: E402
from tests.helpers.vllm_process import RIGHT, UPDATING, Server, needs_vllm, serving  # noqa: E402

pytestmark = needs_vllm
SECONDS = 30.0
# Completions of 0.5 to 2 s, so that there is a middle of a rollout.
LONG = dict(
    max_steps=4,
    max_completion_length=160,
    generation_kwargs={"ignore_eos": True, "stop_token_ids": []},
    seed=5,
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, server) -> dict[str, torch.Tensor]:
    """The adapter of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder, server.url, **LONG, save_total_limit=1).train()
    return server_run.adapter(folder, 4)


@pytest.fixture(scope="module")
def victim(base, tmp_path_factory):
    started = Server(base, tmp_path_factory.mktemp("victim") / "log.txt", *RIGHT, **UPDATING)
    with serving(started):
        yield started


def alive(server: Server) -> Server:
    """The server, started again where an earlier test has ended it."""
    if not server.is_healthy():
        server.kill()  # after SIGTERM it may hang
        server.start().wait()
    return server


def fails(folder, url, trouble, match, name, timeout=60.0, before=False, ahead=0) -> None:
    """A run that ends soon after `trouble()`, which comes in the middle of the rollout that the
    policy of two updates draws or just before it, with a checkpoint of all updates so far."""
    rollout = AdapterRollout(url, str(folder / "adapters"), timeout, server_timeout=5.0)
    trainer = make(folder, rollout, **LONG, rollout_ahead=ahead)
    draw, began = rollout.draw, []

    def draw_in_trouble(*args):
        if trainer.state.global_step != 2:
            return draw(*args)
        if before:
            trouble()
        began.append(time.monotonic())
        answers = draw(*args)
        if not before:
            time.sleep(0.03)
            assert not all(answer.done() for answer in answers), answers[0]
            trouble()
        return answers

    rollout.draw = draw_in_trouble
    saved = f"checkpoint-{2 + ahead} holds all that was trained"
    with pytest.raises(SamplerError, match=f"{match}.*{saved}"):
        trainer.train()
    took = time.monotonic() - began[0]
    server_run.tell(name, f"{took:.1f} s to the error")
    assert took < SECONDS


def goes_on(folder, url, expected=None, ahead=0) -> None:
    """The run's end, on a server that works, is that of a run that nothing happened to."""
    trainer = make(folder, url, **LONG, rollout_ahead=ahead)
    trainer.train(resume_from_checkpoint="last")
    check(steps(trainer), "resumed", 4)
    if expected is not None:
        same(server_run.adapter(folder, 4), expected)


def test_a_server_that_is_stopped_and_goes_on(tmp_path, server, victim, expected):
    try:
        stop = (alive(victim).url, lambda: victim.send(signal.SIGSTOP))
        fails(tmp_path, *stop, "has not answered /health for 15 s", "SIGSTOP")
    finally:
        victim.send(signal.SIGCONT)
    goes_on(tmp_path, victim.url, expected)


def test_a_server_that_is_terminated(tmp_path, server, victim, expected):
    """Its front end alone, as a service manager or Ctrl-C would."""
    match = "(is gone|has not answered /health|its log says why|broke off a completion)"
    terminate = (alive(victim).url, lambda: victim.process.send_signal(signal.SIGTERM))
    fails(tmp_path, *terminate, match, "SIGTERM")
    goes_on(tmp_path, server.url, expected)


def test_a_server_that_is_started_anew(tmp_path, server, victim, expected):
    """Between an adapter and the rollout that asks for it."""

    def restart():
        victim.kill()
        victim.start().wait()

    match = "has lost the adapter powerflow-.*started anew"
    fails(tmp_path, alive(victim).url, restart, match, "restarted", before=True)
    goes_on(tmp_path, victim.url, expected)


def test_a_server_that_is_killed(tmp_path, server, victim, expected):
    match = "(the server is gone|has not answered /health)"
    fails(tmp_path, alive(victim).url, victim.kill, match, "SIGKILL")
    goes_on(tmp_path, server.url, expected)


def test_a_server_that_is_slow(tmp_path, server, expected):
    with delayed(server.url, 0.0) as proxy:

        def slow():
            proxy.seconds = 60.0

        match = "a rollout has taken more than 4 s"
        fails(tmp_path, proxy.url, slow, match, "slow", timeout=4.0, before=True)
    goes_on(tmp_path, server.url, expected)


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_adapter_that_someone_unloads(tmp_path, server, expected, ahead):
    """A rollout ahead that failed is drawn again, by the policy of the checkpoint: another run."""

    def unload():
        for name in server.adapters():
            requests.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name})

    match = "has lost the adapter powerflow-.*unloaded by someone else"
    fails(tmp_path, server.url, unload, match, "unloaded", before=True, ahead=ahead)
    goes_on(tmp_path, server.url, None if ahead else expected, ahead)
    assert server.adapters() == []
