"""`powerflow-fast train --adapter_server` against a real vLLM server."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

pytest.importorskip("trl")

from tests.helpers import server_run  # noqa: E402
from tests.helpers.server_run import EXACT, GAP  # noqa: E402
from tests.helpers.vllm_process import ROOT, needs_vllm  # noqa: E402

pytestmark = needs_vllm
OPTIONS = dict(
    use_cpu=True,
    temperature=0.7,
    learning_rate=2e-2,
    lr_scheduler_type="constant",
    num_generations=4,
    per_device_train_batch_size=8,
    max_completion_length=16,
    max_steps=4,
    logging_steps=1,
    save_strategy="steps",
    save_steps=4,
    gradient_checkpointing=False,
    lora_rank=4,
    report_to="none",
    disable_tqdm=True,
    stop_on_collapse=False,
    draw_curves=False,
)


@pytest.fixture
def flags(tmp_path, base) -> dict:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in server_run.prompts()))
    return OPTIONS | {"model": base, "data": data, "output_dir": tmp_path / "out"}


def command(flags: dict, *launcher: str) -> subprocess.CompletedProcess:
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "powerflow_fast.cli", "train", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a launcher's processes
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def trained(folder) -> list[dict[str, float]]:
    """What each step logged."""
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "kl" in row]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run(server, flags, ahead):
    """The policy begins as the reference and moves; the server's is the same throughout."""
    flags |= {"adapter_server": f"{server.url}/v1", "rollout_ahead": ahead}
    done = command(flags)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = trained(flags["output_dir"])
    server_run.check(rows, f"command, {ahead} ahead", 4)
    assert [row["sampling/staleness"] for row in rows] == [min(i, ahead) for i in range(4)]
    assert (flags["output_dir"] / "adapter_model.safetensors").is_file()
    assert server.adapters() == []


def test_a_run_of_two_processes(server, flags):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    flags |= {"adapter_server": server.url, "per_device_train_batch_size": 4}
    done = command(flags | {"ddp_backend": "gloo"}, *launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    server_run.check(trained(flags["output_dir"]), "command, two ranks", 4)
    assert server.adapters() == []


def test_a_dead_server_is_one_line_and_the_next_try_works(server, flags):
    dead = {"adapter_server": "http://127.0.0.1:9", "adapter_server_wait": 1}
    began = time.monotonic()
    done = command(flags | dead)
    server_run.tell("command, dead server", f"{time.monotonic() - began:.1f} s with the imports")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("powerflow-fast: ")]
    assert len(said) == 1 and "no vLLM server answers /health there, for 1 s" in said[0]
    assert not flags["output_dir"].exists()
    refused = command(flags | {"adapter_server": server.url, "max_completion_length": 250})
    assert refused.returncode == 2 and "beyond the context of 256" in refused.stderr
    assert not flags["output_dir"].exists()
    assert command(flags | {"adapter_server": server.url}).returncode == 0
    assert max(row[GAP] for row in trained(flags["output_dir"])) < EXACT
