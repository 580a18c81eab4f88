"""A GPU that is not there: Triton binds, specialises and compiles every launch; none runs.

Import this module before any of the kernels' in a process of its own. The back end then takes
tensors of a CPU or of no storage ("meta"): a launch only asks a tensor for type and alignment.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from benchmarks.kernels.chips import CHIPS, is_amd  # noqa: E402
from powerflow_fast.kernels import config  # noqa: E402
from powerflow_fast.kernels.operands import BALANCES, Head  # noqa: E402
from powerflow_fast.kernels.residual import residual_backward, residual_forward  # noqa: E402
from powerflow_fast.logprobs import triton_backend, triton_sparse  # noqa: E402
from powerflow_fast.logprobs.backend import Upstream  # noqa: E402
from powerflow_fast.logprobs.options import HeadOptions  # noqa: E402
from powerflow_fast.logprobs.softmax_cache import new_softmax_cache  # noqa: E402

Watch = Callable[[object, object], None]  # of a launcher's source and metadata


class AbsentGpu:
    """The part of Triton's driver that compiling and launching need.

    Triton keeps compiled kernels by the device's number: every chip has one of its own.
    """

    def __init__(self, chip: str, watch: Watch) -> None:
        self.chip, self.watch = chip, watch
        self.shared = CHIPS[chip].shared  # bytes; a kernel that needs more is not launched

    @property
    def utils(self):
        return self

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        """Triton asks for one of each compiled kernel, before its first launch."""
        self.watch(source, metadata)
        return lambda *_: None

    def get_current_target(self) -> GPUTarget:
        if is_amd(self.chip):
            return GPUTarget("hip", self.chip, CHIPS[self.chip].warp)
        return GPUTarget("cuda", int(self.chip[3:]), CHIPS[self.chip].warp)

    def get_current_device(self) -> int:
        return list(CHIPS).index(self.chip)

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_device_properties(self, device) -> dict[str, int]:
        warp = CHIPS[self.chip].warp
        return {"max_shared_mem": self.shared, "multiprocessor_count": 1, "warpSize": warp}

    def load_binary(self, name, kernel, shared, device):
        return object(), 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module) -> None:
        pass


def use(chip: str, watch: Watch = lambda *_: None) -> AbsentGpu:
    """From now on kernels are launched for `chip`; `watch` sees each one that was compiled."""
    # What a kernel that did not run leaves is NaN, every time: every block of rows fails its check.
    torch.use_deterministic_algorithms(True, warn_only=True)
    gpu = AbsentGpu(chip, watch)
    driver.set_active(gpu)
    triton_backend.choose_backend = lambda *_: None  # type: ignore[assignment]
    triton_sparse._looks_sharp = lambda *_: True  # type: ignore[assignment]
    row = config.table_row(chip)
    config.chip_name = lambda _: row
    triton_sparse.choose_columns = few_columns
    return gpu


def few_columns(*arguments):
    """Every block of rows keeps three columns."""
    kept = choose_columns(*arguments)
    kept.counts.fill_(3)
    kept.columns.zero_()
    return kept


choose_columns = triton_sparse.choose_columns


def launch_head(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    *,
    models: int = 2,
    bias: bool = False,
    strided: bool = False,
    device: str = "cpu",
    whole: bool = True,
    **options,
) -> None:
    """The launches of a step with the head frozen, and trained.

    Unless it is not the `whole`, scores alone too, and the trained head's with stored exp-logits.
    With a gradient tolerance, those of the certified route.
    """
    hidden = torch.zeros(n, h, dtype=dtype, device=device)
    weight = torch.zeros(v, h, dtype=dtype, device=device)
    if strided:
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    targets = torch.zeros(n, dtype=torch.int64, device=device)
    added = torch.zeros(v, dtype=dtype, device=device) if bias else None
    head = Head(hidden, weight, added)
    reference = head if models == 2 else None
    plain = HeadOptions(**options)
    certified = plain.grad_tolerance > 0
    wants = replace(plain, route="sparse" if certified else "unit_gradient")
    out = triton_backend.forward(head, reference, targets, wants)
    ones = torch.ones(n, device=device)
    entropy = ones if plain.entropy else None
    upstream = Upstream(ones, entropy, targets, ones, ones, entropy)
    backward = (head, upstream, plain, (True, True, bias))
    if certified:
        # Of gathered columns: a number that is a multiple of 16, and one that is not.
        for number in (3, 16):
            few = torch.zeros_like(out.kept_columns)
            few[:, :number] = True
            triton_backend.backward(*backward, few)
        return
    triton_backend.backward(*backward)
    if not whole:
        return
    triton_backend.forward(head, reference, targets, plain)
    if not plain.entropy:
        cache = new_softmax_cache(hidden, weight, triton_backend.vocab_tiling(hidden.device))
        triton_backend.forward(head, reference, targets, replace(plain, route="cache"), cache)
        triton_backend.backward(*backward, cache=cache)


def launch_residual(tokens: int, sequences: int, masked: bool = False) -> None:
    """The launches of the residual and its gradient."""
    logps = torch.zeros(tokens)
    mask = torch.ones(tokens, dtype=torch.bool) if masked else None
    starts = torch.zeros(sequences, dtype=torch.int32)
    ones = torch.ones(sequences)
    for balance in BALANCES:
        rows = (starts, starts, mask)
        residual_forward(logps, logps, *rows, ones, ones, balance)
        residual_backward(ones, starts, *rows, tokens, balance)
