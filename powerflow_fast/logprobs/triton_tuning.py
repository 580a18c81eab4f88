"""Optional choice of tile shapes by timing them on the device at hand.

Off unless POWERFLOW_TUNE=1: then the first call with a new device, type and shape times the
candidates of `kernels/config.py` on the call's own operands, which the kernels only read, and keeps
the fastest in a file (in the folder POWERFLOW_CACHE, default ~/.cache/powerflow-fast). Token counts
share an entry by powers of two, so batches of varying length tune once. As tiles then depend on the
batch, POWERFLOW_BATCH_INVARIANT=1 turns tuning off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from powerflow_fast.kernels.config import CANDIDATES, Config, Tile, config_for
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs.options import HeadOptions, batch_invariant

Calls = dict[str, Callable[..., object]]  # field of Config -> a call that takes `config=`
Seconds = Callable[[Callable[[], object]], float]  # times a call

_known: dict[str, Config] = {}


def tile_config(
    head: Head,
    targets: Tensor,  # [N]
    options: HeadOptions,
    calls_of: Callable[[Head, Tensor, HeadOptions, Config], Calls],
) -> Config:
    """The tiles for this call: the table's, or tuned ones where POWERFLOW_TUNE=1.

    `calls_of` gives what tuning times, `tuned_calls` of the back end.
    """
    hidden, weight, _ = head
    table = config_for(hidden.device, hidden.dtype)
    tunable = len(hidden) > 0 and hidden.dtype != torch.float32  # which uses no matrix unit
    if os.environ.get("POWERFLOW_TUNE") != "1" or not tunable or batch_invariant():
        return table
    key = cache_key(hidden, weight)
    if key not in _known:
        _known[key] = _load(key) or _tune_and_store(
            key, calls_of(head, targets, options, table), table
        )
    return _known[key]


def cache_key(hidden: Tensor, weight: Tensor) -> str:
    """Device, versions, type and sizes; tokens rounded up to a power of two."""
    import triton

    device = hidden.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tokens = 1 << max(len(hidden) - 1, 0).bit_length()
    sizes = f"N<={tokens} H={hidden.shape[1]} V={len(weight)}"
    return f"{name}, triton {triton.__version__}, {hidden.dtype}, {sizes}"


def cache_file() -> Path:
    folder = os.environ.get("POWERFLOW_CACHE", Path.home() / ".cache" / "powerflow-fast")
    return Path(folder) / "tiles.json"


def tune(
    calls: Calls,
    table: Config,
    seconds: Seconds,
    watch: Callable[[str, Tile, float], None] = lambda *_: None,
) -> Config:
    """`table` with the fastest candidate tile of each product; one that does not fit is passed by.

    `watch` is told of each field of `Config`, tile and time in s, inf where the tile does not fit,
    as they come.
    """
    best = table
    for field, call in calls.items():
        tiles = [tile for tile in CANDIDATES if tile != getattr(best, field)]
        times: dict[Config, float] = {}
        for config in (best, *(replace(best, **{field: tile}) for tile in tiles)):
            times[config] = _time(call, config, seconds)
            watch(field, getattr(config, field), times[config])
        best = min(times, key=lambda config: times[config])
    return best


def _time(call: Callable[..., object], config: Config, seconds: Seconds) -> float:
    from triton.errors import TritonError  # too much shared memory, or no compilation

    try:
        return seconds(lambda: call(config=config))
    except TritonError:
        return float("inf")


def _tune_and_store(key: str, calls: Calls, table: Config) -> Config:
    from triton.testing import do_bench

    best = tune(calls, table, lambda call: do_bench(call, warmup=10, rep=50))
    store(key, best)
    return best


def store(key: str, best: Config) -> None:
    """Writes the tiles where `tile_config` looks for them."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _read(path) | {key: asdict(best)}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1))
    partial.rename(path)  # whole or absent, whoever else writes


def _load(key: str) -> Config | None:
    stored = _read(cache_file()).get(key)
    if stored is None:
        return None
    try:
        tiles: dict[str, Tile] = {
            name: Tile(**value) for name, value in stored.items() if isinstance(value, dict)
        }
        return Config(**tiles, tma=stored["tma"])
    except (TypeError, KeyError, AssertionError):  # of another version of the kernels
        return None


def _read(path: Path) -> dict:
    """{} where there is no file, or none that can be read: then it is tuned anew."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
