"""Starts ranks: processes that train together, or one process that a test needs to itself.

They are forks of a server (multiprocessing's) that has imported torch, transformers and trl once
and has computed nothing: a thread pool does not survive a fork, and whatever waits for it hangs.
"""

import faulthandler
import functools
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "accelerate" / "fsdp2-8.yaml"
# What is not installed is passed over.
PRELOAD = ["pytest", "deepspeed", "powerflow_fast.training.trainer", "tests.helpers.tiny"]
# Ranks talk through gloo, so their tensors are on the CPU and their kernels interpreted.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "DS_ACCELERATOR": "cpu",
}
HANGS = 180.0  # seconds after which a rank says where it is, and ends


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """The one server of this process, with its imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # Before Python 3.14 a server does not take over sys.path.
    with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}):
        first = context.Process(target=int)
        first.start()
    first.join()
    return context


def start(world: int, work: Callable[[], None], logs: Path) -> list[BaseProcess]:
    """`world` ranks that do `work`, with the variables that torch's launcher would set.

    `work` is a function of a module, or a `functools.partial` of one. Rank r writes to
    logs/log_r.txt.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    context, ranks = server(), []
    for rank in range(world):
        own = of_all | {"RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}
        variables = {name: str(value) for name, value in own.items()}
        ranks.append(
            context.Process(target=_rank, args=(work, variables, logs / f"log_{rank}.txt"))
        )
        ranks[-1].start()
    return ranks


def _rank(work: Callable[[], None], variables: dict[str, str], log: Path) -> None:
    os.environ |= variables
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # nothing is flushed at the end
    faulthandler.dump_traceback_later(HANGS, exit=True)
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        work()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Without teardown: with the interpreter, gloo's thread can wait for the interpreter lock
        # while the main thread, which holds it, waits for that thread.
        os._exit(code)


def ended(ranks: list[BaseProcess]) -> bool:
    """Wait for all; whether each came to its end."""
    for rank in ranks:
        rank.join()
    return all(rank.exitcode == 0 for rank in ranks)


def finish(world: int, work: Callable[[], None], logs: Path) -> None:
    """Start and wait; AssertionError with exit codes and the end of the logs if a rank failed."""
    ranks = start(world, work, logs)
    done, codes = ended(ranks), [rank.exitcode for rank in ranks]
    ends = [path.read_text()[-2000:] for path in sorted(logs.glob("log_*.txt"))]
    assert done, f"exit codes {codes}\n{''.join(ends)}"


def shard_on_cpu() -> None:
    """In a rank: have accelerate set FSDP2 up as `RECIPE` says, which it does on GPUs alone."""
    import yaml
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    settings = yaml.safe_load(RECIPE.read_text())["fsdp_config"]
    of_launcher = {name.upper(): str(value) for name, value in settings.items()}
    os.environ |= of_launcher | {"ACCELERATE_USE_FSDP": "true"}
    begin = PartialState.__init__

    def begin_as_on_gpus(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_on_gpus  # type: ignore[method-assign]


def whole(parameter):
    """A copy of a parameter, gathered from all ranks where it is sharded."""
    gathered = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return gathered.detach().clone()
