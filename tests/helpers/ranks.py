"""Forked ranks: a process that has imported everything forks each run, which saves the imports."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "accelerate" / "fsdp2-8.yaml"


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


def start(world: int, work: Callable[[], None], logs: Path) -> list[int]:
    """Fork `world` ranks that do `work` with the variables torch's launcher would set; their ids.

    Rank r writes to logs/log_r.txt and ends without teardown: with the interpreter, gloo's thread
    can wait for the interpreter lock while the main thread, which holds it, waits for that thread.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                own = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in own.items()}
            log = os.open(logs / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ranks.append(child)
    return ranks


def ended(ranks: list[int]) -> bool:
    """Wait for all; whether each came to its end."""
    return all([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == 0 for rank in ranks])


def finish(world: int, work: Callable[[], None], logs: Path) -> None:
    """Start and wait; AssertionError with the end of the logs where a rank failed."""
    done = ended(start(world, work, logs))
    assert done, "".join(path.read_text()[-2000:] for path in sorted(logs.glob("log_*.txt")))
