"""Names of launches come from what Triton made of them, whatever the arguments are called."""

from types import SimpleNamespace
from typing import NamedTuple

from benchmarks.kernels.names import Launch, flags, switches


class Pair(NamedTuple):
    hidden: object
    bias_ptr: object


def params(*constants: bool):
    return [SimpleNamespace(is_constexpr=constant) for constant in constants]


def test_what_is_given_and_what_is_on():
    signature = {
        "exp_logits_ptr": "*bf16",
        "bias_ptr": "constexpr",  # None
        "num_n": "constexpr",  # 1, which Triton made constant
        "USE_TMA": "constexpr",
        "SOFTCAP": "constexpr",
        "MODELS": "constexpr",
        "ROUND_TO": "constexpr",
    }
    constants = {(1,): None, (2,): 1, (3,): True, (4,): False, (5,): 2, (6,): None}
    found = switches(params(*[False] * 3, *[True] * 4), signature, constants)
    assert list(found) == ["exp_logits", "num_n", "use_tma", "models=2"]


def test_named_tuples_are_taken_apart():
    signature = {"model": Pair("*bf16", "constexpr"), "plain": ("*fp32", ("constexpr", "i32"))}
    constants = {(0, 1): None, (1, 1, 0): None}
    found = switches(params(False, False), signature, constants)
    assert list(found) == ["model.hidden", "plain.0", "plain.1.1"]
    given = {"model": Pair("*bf16", "*fp32")}
    assert list(switches(params(False), given, {})) == ["model.hidden", "model.bias"]


def test_a_flag_is_what_differs():
    a = Launch("k", "", "a", ("hidden", "exp_logits", "store_tma", "models=2"))
    b = Launch("k", "", "b", ("hidden", "models=2"))
    c = Launch("k", "odd", "c", ("hidden", "models=1"))
    assert flags(a, [a, b]) == ("exp_logits",) and flags(b, [a, b]) == ()
    assert flags(a, [a, b, c]) == ("exp_logits", "models=2")
    assert flags(c, [a, b, c]) == ("models=1", "odd")
