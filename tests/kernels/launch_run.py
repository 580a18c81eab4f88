"""Launches every kernel as on a GPU that is not there: bound, specialised, compiled; not run.

    python -m tests.kernels.launch_run sm_90

Triton's driver is a stand-in. What this finds the interpreter cannot: arguments that do not fit a
signature, and code that does not compile for the numbers that Triton makes constants (1).
"""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from powerflow_fast import backend_triton, certified_triton  # noqa: E402
from powerflow_fast.kernel_facts import CHIPS  # noqa: E402
from powerflow_fast.kernels import columns, config  # noqa: E402
from powerflow_fast.numerators import new_numerators  # noqa: E402
from powerflow_fast.options import HeadOptions  # noqa: E402

CHIP = sys.argv[1]
launched: set[str] = set()


class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, *arguments):
        launched.add(self.name)


class Device:
    """The part of Triton's driver that compiling and launching need."""

    launcher_cls = Launcher

    @property
    def utils(self):
        return self

    def get_current_target(self):
        return GPUTarget("cuda", int(CHIP[3:]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": CHIPS[CHIP].shared, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name, kernel, shared, device):
        return object(), 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass


def launch(n, h, v, dtype, *, models=2, bias=False, strided=False, **options):
    table = config.TABLE["float32" if dtype == torch.float32 else CHIPS[CHIP].row]
    hidden, weight = torch.zeros(n, h, dtype=dtype), torch.zeros(v, h, dtype=dtype)
    if strided:
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    targets = torch.zeros(n, dtype=torch.int64)
    bias = torch.zeros(v, dtype=dtype) if bias else None
    reference = (hidden, weight, bias) if models == 2 else None
    head = (hidden, weight, bias, targets)
    options = HeadOptions(**options)
    backend_triton.forward(*head, reference, options, True, config=table)
    ones = torch.ones(n)
    grad_entropy = ones if options.entropy else None
    needs = (True, True, bias is not None)
    backward = (ones, grad_entropy, *head, ones, grad_entropy, options, needs, None)
    backend_triton.backward(*backward, None, config=table)
    if not options.entropy:
        layout = backend_triton.numerators_layout(hidden.device)
        numerators = new_numerators(hidden, weight, layout, True)
        exact = HeadOptions(softcap=options.softcap)
        backend_triton.forward(*head, reference, exact, False, numerators, config=table)
        backend_triton.backward(*backward, numerators, config=table)


def residual():
    tokens, mask = torch.zeros(12), torch.ones(12, dtype=torch.bool)
    starts, ends = torch.tensor([0, 3]), torch.tensor([3, 12])
    pair = torch.ones(2)
    backend_triton.sequence_residual_forward(
        tokens, tokens, starts, ends, mask, pair, pair, "length"
    )
    backend_triton.sequence_residual_backward(pair, ends, starts, ends, None, 12, "token")


def few_columns(*arguments):
    """What an empty kernel leaves is arbitrary: every block keeps three columns."""
    kept = choose_columns(*arguments)
    kept.counts.fill_(3)
    kept.columns.zero_()
    return kept


driver.set_active(Device())
backend_triton._check_inputs = lambda *_: None
certified_triton._looks_sharp = lambda *_: True
choose_columns, columns.choose_columns = columns.choose_columns, few_columns
for dtype in (torch.bfloat16, torch.float32):
    launch(1, 1, 1, dtype)
    launch(130, 64, 512, dtype, bias=True, softcap=30.0, entropy=True, round_logits=True)
launch(17, 40, 257, torch.float16, models=1, strided=True)
launch(600, 64, 512, torch.bfloat16, grad_tolerance=1e-3)
residual()
print(*sorted(launched))
