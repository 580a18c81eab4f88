"""What every shift of the kernels rests on: 2 to the power of an integer is exact."""

import torch
import triton
import triton.language as tl


@triton.jit
def exp2_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.exp2(tl.load(x_ptr + offs)))


def test_exp2_of_integers_is_exact(device):
    last = 127 if device.type == "cuda" else 126  # numpy's, on AVX-512, is one bit off at 127
    powers = torch.arange(-126, last + 1, device=device).float()
    padded = torch.nn.functional.pad(powers, (0, 256 - len(powers)))
    result = torch.full_like(padded, float("nan"))
    exp2_kernel[(1,)](padded, result, SIZE=256)
    truth = torch.ldexp(torch.ones_like(powers, dtype=torch.float64), powers.int())
    assert torch.equal(result[: len(powers)].double(), truth)
