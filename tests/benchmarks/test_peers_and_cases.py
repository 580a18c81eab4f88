"""The recipes give the specification's result, and a wrong or absent one is told apart."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import heads, method, peers, test_heads
from benchmarks.cases import AXES, GROUPS, Case, table
from benchmarks.inputs import Shape, draw

CPU = torch.device("cpu")
SHAPE = Shape(48, 24, 130, length=8)
# Those that compile take their own tests' time; `pytest benchmarks/` checks them all.
ON_GPU = ("CCE", "CCE exact", "Liger fused CE", "verl", "quack", "quack chunked")
QUICK = [peer for peer in peers.PEERS if "compile" not in peer and peer not in ON_GPU]


def case(peer: str, group: str = "tb-frozen", shape: Shape = SHAPE) -> Case:
    return Case(group, peer, "small", shape, "random", torch.float32)


@pytest.mark.parametrize("group", ["pair", "tb-frozen", "tb-trained"])
@pytest.mark.parametrize("peer", QUICK)
def test_peer_against_float64(peer, group):
    try:
        methods = peers.methods(peer, CPU)
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
    inputs = draw("random", SHAPE, torch.float32, CPU, train_head=GROUPS[group].train_head)
    expected = GROUPS[group].truth(inputs, 2, peers.ALPHA)
    for candidate in methods.values():
        assert heads.check(case(peer, group), candidate, inputs, 2, expected) < 1e-5


@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_peer_is_not_timed(group):
    inputs = draw("random", SHAPE, torch.float32, CPU, train_head=GROUPS[group].train_head)
    expected = GROUPS[group].truth(inputs, 2, peers.ALPHA)
    wrong = peers.Composed(lambda *tensors: 1.001 * peers.naive(*tensors))
    with pytest.raises(AssertionError, match=r"naive PyTorch is wrong: relative error \d"):
        heads.check(case("naive PyTorch", group), wrong, inputs, 2, expected)


@pytest.mark.parametrize("peer", ["powerflow-fast", "naive PyTorch"])
def test_the_log_z_of_groups_against_float64(peer):
    of_groups = case(peer, "scaling", replace(SHAPE, group=3))
    sets, sequences, expected = heads.input_sets(of_groups, CPU)
    assert sequences == 6
    (candidate, *_) = peers.methods(peer, CPU).values()
    assert heads.check(of_groups, candidate, sets[0], sequences, expected) < 1e-5
    alone = replace(sets[0], group=None)
    with pytest.raises(AssertionError, match="is wrong"):
        heads.check(of_groups, candidate, alone, sequences, expected)


def test_a_module_is_read_without_its_package(tmp_path, monkeypatch):
    """unsloth-zoo's module asks the package, whose import patches others, for the free memory."""
    package = tmp_path / "unsloth_zoo"
    (package / "fused_losses").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    (package / "fused_losses" / "fused_linear.py").write_text(
        "try:\n    import unsloth_zoo.tiled_mlp\nexcept ImportError:\n    pass\n"
        "def fused_linear_logprobs(hidden, weight, targets, rows_per_chunk=None):\n"
        "    return rows_per_chunk\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as modules:
        for name in ("unsloth_zoo_fused_linear", "unsloth_zoo.tiled_mlp"):
            modules.setitem(sys.modules, name, None)  # so that what comes is taken away again
            del sys.modules[name]
        found = peers.unsloth_zoo(CPU)
        assert {name: head(None, None, None) for name, head in found.items()} == {
            "": None,
            "128 rows": 128,
        }
        assert list(peers.unsloth_zoo(torch.device("cuda"))) == [""]
    assert "unsloth_zoo" not in sys.modules


def test_peers_that_cannot_run_say_why(monkeypatch):
    for name in ON_GPU:
        with pytest.raises(peers.Unavailable, match="need.? a GPU|is not installed"):
            peers.methods(name, CPU)
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    reasons = {
        "TRL fused head": "trl is not installed",
        "Liger GRPO head": "liger_kernel is not installed",
        "Liger scaled CE": "liger_kernel is not installed",
        "CCE torch_compile": "cut_cross_entropy is not installed",
        "F.linear_cross_entropy": "needs torch >= 2.13, this is",
    }
    for name, reason in reasons.items():
        with pytest.raises(peers.Unavailable, match=reason):
            peers.methods(name, CPU)


def test_a_failing_peer_is_in_the_results(monkeypatch):
    session = test_heads.Session.__new__(test_heads.Session)
    session.unavailable = {}

    def fails(*arguments):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(test_heads, "measure", fails)
    with pytest.raises(RuntimeError):
        test_heads.test_head(None, session, None, CPU, case("verl"))
    assert session.unavailable == {"tb-frozen: verl": "fails: no kernel image"}


def test_too_little_memory_is_said(monkeypatch):
    session = test_heads.Session.__new__(test_heads.Session)
    session.unavailable = {}
    monkeypatch.setattr(method, "free_bytes", lambda device: 10**9)
    large = case("naive PyTorch", shape=Shape(16384, 4096, 131072, length=512))
    with pytest.raises(pytest.skip.Exception, match=r"needs about 3\d GB, 1 GB are free"):
        test_heads.test_head(None, session, None, CPU, large)
    assert list(session.unavailable) == ["tb-frozen: naive PyTorch"]


@pytest.mark.parametrize("units", [False, True], ids=["", "bf16 units"])
def test_table_of_cases(monkeypatch, units):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    for device in (CPU, torch.device("cuda")):
        found = list(table(device))
        assert len({one.id for one in found}) == len(found)
        assert {one.group for one in found} == set(GROUPS)
        some = {peers.ROUNDED} if device != CPU or not units else set()  # of no use there
        assert {one.peer for one in found if one.group == "tb-frozen"} == set(peers.PEERS) - some
        growing = (("tokens", "n"), ("vocabulary", "v"), ("hidden", "h"))
        growing += (("sequences", "sequences"), ("group size", "group"))
        assert [axis for axis, _ in growing] == list(AXES)
        for axis, size in growing:
            ours = [c for c in found if c.axis == axis and c.peer == "powerflow-fast"]
            sizes = [getattr(c.shape, size) for c in ours]
            assert [b / a for a, b in zip(sizes, sizes[1:], strict=False)] == [2, 2, 2]
        dtypes = {torch.bfloat16} if device != CPU or units else set()
        assert {one.dtype for one in found} == dtypes | (
            {torch.float32} if device == CPU else set()
        )


def test_operations_and_bytes_of_a_step():
    n, h, v = SHAPE.n, SHAPE.h, SHAPE.v
    assert GROUPS["tb-frozen"].floor(SHAPE, 2) == (3 * 2 * n * h * v, 2 * h * (3 * n + v))
    assert GROUPS["tb-trained"].floor(SHAPE, 2) == (4 * 2 * n * h * v, 2 * h * (3 * n + 2 * v))
    assert GROUPS["forward"].floor(SHAPE, 4) == (2 * n * h * v, 4 * h * (n + v))
