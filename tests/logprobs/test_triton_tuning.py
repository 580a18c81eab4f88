"""Tuning tries every candidate, keeps the fastest, and remembers it."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch

from powerflow_fast.kernels import config as table
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import triton_tuning
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.triton_backend import tuned_calls
from tests.helpers.numerics import logps_error_bound

PLAIN = HeadOptions()


@pytest.fixture
def operands(device, tiles, monkeypatch):
    tile = table.config_for(device, torch.float16).statistics
    others = (
        replace(tile, depth=tile.depth // 2),
        replace(tile, depth=tile.depth // 2, columns=tile.columns // 2, parts=1, num_stages=2),
    )
    monkeypatch.setattr(triton_tuning, "CANDIDATES", others)
    policy = Head(
        torch.randn(20, 32, device=device).half(), torch.randn(70, 32, device=device).half(), None
    )
    return policy, torch.randint(70, (20,), device=device)


def test_the_fastest_tile_of_each_product_is_kept(operands):
    ticks = iter([3.0, 2.0, 1.0, 1.0, 5.0, 5.0, 4.0, float("nan"), 0.5])
    tried = []

    def seconds(call):
        tried.append(call())
        return next(ticks)

    before = [x.clone() for x in operands[0][:2]]
    policy, _ = operands
    base = table.config_for(policy.hidden.device, policy.hidden.dtype)
    calls = tuned_calls(*operands, PLAIN, base)
    best = triton_tuning.tune(calls, base, seconds)
    assert len(tried) == 9  # the table's and two others, three times
    other = triton_tuning.CANDIDATES[1]
    assert best == replace(base, statistics=other, dlogits=other)
    assert all(torch.equal(a, b) for a, b in zip(before, operands[0][:2], strict=True))
    for out in tried[:6]:  # other tiles, same log-probs
        error = (out.logps - tried[0].logps).abs().max()
        assert error <= 2 * logps_error_bound(policy.hidden, policy.weight)


def test_a_tile_that_does_not_fit_is_passed_by():
    from triton.runtime.errors import OutOfResources

    def too_large(config):
        raise OutOfResources(1 << 20, 1 << 16, "shared memory")

    assert triton_tuning._time(too_large, None, lambda call: call()) == float("inf")


def test_off_by_default_and_remembered_when_on(operands, monkeypatch, tmp_path):
    policy, targets = operands
    plain = table.config_for(policy.hidden.device, policy.hidden.dtype)
    monkeypatch.delenv("POWERFLOW_TUNE", raising=False)
    monkeypatch.setenv("POWERFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_tuning, "_known", {})
    assert triton_tuning.tile_config(policy, targets, PLAIN, tuned_calls) is plain
    monkeypatch.setenv("POWERFLOW_TUNE", "1")
    tuned = replace(plain, tma=not plain.tma)
    calls = []
    monkeypatch.setattr(triton_tuning, "tune", lambda *args: calls.append(args) or tuned)
    assert triton_tuning.tile_config(policy, targets, PLAIN, tuned_calls) == tuned
    monkeypatch.setattr(triton_tuning, "_known", {})  # as in another process
    shorter = policy._replace(hidden=policy.hidden[:17])  # of the same power of two
    assert (
        triton_tuning.tile_config(shorter, targets[:17], PLAIN, tuned_calls) == tuned
        and len(calls) == 1
    )
    assert os.listdir(tmp_path / "cache") == ["tiles.json"]
    longer = policy._replace(hidden=policy.hidden.repeat(2, 1))
    triton_tuning.tile_config(longer, targets.repeat(2), PLAIN, tuned_calls)
    assert len(calls) == 2 and len(json.loads(triton_tuning.cache_file().read_text())) == 2


def test_an_unreadable_cache_is_tuned_anew(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text("{")
    assert triton_tuning._read(path) == {}


def test_tiles_that_do_not_belong_together_are_refused():
    base = table.TABLE["sm_90"]
    with pytest.raises(AssertionError):
        replace(base, unit_gradient=replace(base.unit_gradient, depth=128))
    with pytest.raises(AssertionError):
        replace(base, statistics=replace(base.statistics, rows=64))


def test_tiles_of_another_version_are_tuned_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("POWERFLOW_CACHE", str(tmp_path))
    tile = asdict(table.TABLE["sm_90"].statistics)
    for stored in (
        {"statistics": tile | {"parts": 3}, "unit_gradient": tile, "dlogits": tile, "tma": True},
        {"statistics": tile | {"unknown": 1}, "unit_gradient": tile, "dlogits": tile, "tma": True},
        {"statistics": tile, "tma": True},
        {},
    ):
        (tmp_path / "tiles.json").write_text(json.dumps({"key": stored}))
        assert triton_tuning._load("key") is None
