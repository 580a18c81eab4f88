"""vLLM in the trainer's process, the real one: it samples from the policy, and the base stays.

Needs a folder with vLLM's packages, named by POWERFLOW_VLLM; only the processes started here see
it. The model is a toy on the CPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = Path(os.environ.get("POWERFLOW_VLLM", "none")).resolve()
SECONDS = 240  # that a run may take; the first takes 37 on two quiet cores, the second 16
EXACT = 1e-4  # nats; float32 gives 2e-5 here, a sampler in bfloat16 0.15 to 0.5
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{PACKAGES}",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

pytestmark = pytest.mark.skipif(
    not (PACKAGES / "vllm").is_dir(), reason="POWERFLOW_VLLM names no folder with vLLM in it"
)


def run(folder: Path, kind: str) -> dict:
    """The figures of one process of tests/helpers/colocated_run.py, which leaves none behind."""
    caches = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.colocated_run", str(folder), kind],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {name: str(folder / at) for name, at in caches.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output[-6000:]
        assert alone(process.pid), "processes of the run are still there"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return json.loads((folder / f"{kind}.json").read_text())


def alone(group: int, seconds: float = 10.0) -> bool:
    """Whether a group of processes is gone, or goes soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("colocated")


@pytest.fixture(scope="module")
def adapted(folder) -> dict:
    return run(folder, "adapter")


def check(figures: dict) -> None:
    """The sampler is the policy at every step, which moves; the reference is as it was."""
    assert max(step["max"] for step in figures["steps"]) < EXACT, figures
    assert figures["steps"][0]["kl"] < 1e-6
    assert max(step["kl"] for step in figures["steps"]) > 0.1, figures
    assert figures["fixed"] and figures["moved"] == [] and figures["reference_moved"] == 0, figures
    assert figures["policy_moved"] > 0.1, figures


def test_an_adapter_is_merged_and_taken_out(adapted):
    """Also where a second run begins at the step that the first one sent last."""
    check(adapted)


def test_a_stale_prefix_is_noticed(adapted):
    """A cache that outlives the weights it was computed with: the gap ends the run."""
    assert "nats/token off the policy's" in adapted["stopped"], adapted


def test_all_parameters(folder):
    check(run(folder, "full"))
