"""Launches every kernel as on a GPU that is not there: bound, specialised, compiled; not run.

    python -m tests.kernels.launch_run sm_90 bfloat16

What this finds the interpreter cannot: arguments that do not fit a signature, and code that does
not compile for the numbers that Triton makes constants (1).
"""

import sys

from benchmarks.gpu.pack import absent  # before Triton

import torch  # isort: skip

launched: set[str] = set()
absent.use(sys.argv[1], lambda source, metadata: launched.add(metadata.name), machine_code=False)
dtype = getattr(torch, sys.argv[2])
absent.launch_head(1, 1, 1, dtype)
absent.launch_head(130, 64, 512, dtype, bias=True, softcap=30.0, entropy=True, round_logits=True)
absent.launch_head(17, 40, 257, dtype, models=1, strided=True)
absent.launch_head(600, 64, 512, dtype, grad_tolerance=1e-3)
absent.launch_residual(12, 2, masked=True)
print(*sorted(launched))
