"""The options of the language-model head, in one frozen object that travels through autograd."""

from __future__ import annotations

import ast
import math
import operator
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

BACKENDS = ("auto", "torch", "triton")
# How a gradient comes about, in what the forward pass leaves for the backward pass:
# none           nothing: no gradient is wanted
# unit_gradient  d logps / d hidden, which the upstream gradient of logps scales row by row
# sparse         the unit gradient, and the columns that weight and bias get their gradients from
# cache          the softmax of the first rows (softmax_cache.py); logits of the rest are recomputed
# recompute      statistics alone: all logits are recomputed
Route = Literal["none", "unit_gradient", "sparse", "cache", "recompute"]


@dataclass(frozen=True)
class HeadOptions:
    """How logits are formed, and which quantities are wanted.

    logits = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature,
    with softcap(z) = c * tanh(z / c). One temperature serves policy, reference and entropy.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    round_logits: bool = False
    entropy: bool = False
    detach_entropy: bool = False  # it is only read: nothing is kept for its gradient
    grad_tolerance: float = 0.0
    backend: str = "auto"
    group_name: str | None = None
    route: Route = "none"

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)
        _require_finite("logit_scale", self.logit_scale)
        if self.softcap is not None:
            _require_positive("softcap", self.softcap)
        index = self.ignore_index  # Dynamo may have a symbol here, which has no attributes
        if isinstance(index, bool) or not (isinstance(index, int) or hasattr(index, "__index__")):
            raise ValueError(f"ignore_index: expected an integer, got {self.ignore_index!r}")
        if not isinstance(self.round_logits, bool):
            raise ValueError(f"round_logits: expected True or False, got {self.round_logits!r}")
        _require_finite("grad_tolerance", self.grad_tolerance)
        if not 0.0 <= self.grad_tolerance < 1.0:
            raise ValueError(
                "grad_tolerance: expected a probability mass in [0, 1), "
                f"got {self.grad_tolerance!r}"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {self.backend!r}")

    @property
    def scale(self) -> float:
        """Factor on hidden @ weight.T + bias where there is no softcap."""
        return self.logit_scale / self.temperature

    def encode(self) -> str:
        """A string for operator schemas, which hold only tensors and scalars (traced by Dynamo)."""
        return "\n".join(_encoded(getattr(self, name)) for name in _FIELDS)

    @staticmethod
    @lru_cache
    def decode(encoded: str) -> HeadOptions:
        return HeadOptions(*map(_decoded, encoded.split("\n")))

    @property
    def wants_unit_gradient(self) -> bool:
        return self.route in ("unit_gradient", "sparse")

    @property
    def reads_entropy_only(self) -> bool:
        """Whether no gradient comes through an entropy."""
        return self.detach_entropy or not self.entropy


def _encoded(value: object) -> str:
    """repr, but numbers, which Dynamo may trace as symbols (`dynamic=True`), give their values."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, int) and not isinstance(value, bool):
        return repr(operator.index(value))
    return repr(value)


def _decoded(text: str) -> Any:
    return float.fromhex(text) if text.startswith(("0x", "-0x")) else ast.literal_eval(text)


_FIELDS = tuple(field.name for field in fields(HeadOptions))


# What the doors to other trainers take: the rest of HeadOptions is the model's, or the trainer's.
DOOR_OPTIONS = ("backend", "grad_tolerance", "round_logits")


def check_door_options(options: dict[str, Any]) -> None:
    """ValueError unless `options` are values of DOOR_OPTIONS."""
    unknown = sorted(set(options) - set(DOOR_OPTIONS))
    if unknown:
        raise ValueError(f"{unknown[0]}: no such option of the head; expected of {DOOR_OPTIONS}")
    HeadOptions(**options)


def batch_invariant() -> bool:
    """Whether a row's unit gradient, too, is to have the same bits whatever the batch is.

    Log-probs, log-sum-exp and entropy of the Triton back end always have. The unit gradient is the
    vendor library's product, whose order of summation depends on the number of rows: with
    POWERFLOW_BATCH_INVARIANT=1 the last chunk of rows is as long as the others, which costs at most
    one chunk's product a call, and tiles are not tuned.
    """
    return os.environ.get("POWERFLOW_BATCH_INVARIANT") == "1"


def _require_finite(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _require_positive(name: str, value: float) -> None:
    _require_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
