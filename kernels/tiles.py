"""What the kernels that multiply hidden states by the vocabulary share: the product, the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from powerflow_fast.kernels.config import is_interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Triton 3.9's interpreter keeps bfloat16 as raw 16-bit integers, and multiplies those.
INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def as_factor(tile):
    """A tile that arithmetic may be done with: itself, except in the interpreter."""
    if INTERPRETED and tile.dtype == tl.bfloat16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def above_shift(logits, shift):
    """logits * log2(e) - shift with one rounding: a large offset common to both cancels exactly."""
    if INTERPRETED:  # its fma rounds the product
        return (logits.to(tl.float64) * LOG2E - shift.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(logits, LOG2E, -shift)


@triton.jit
def round_to(tile, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even; the interpreter would truncate to bfloat16."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = tile.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        tile = tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)
    return tile.to(DTYPE)


@triton.jit
def walk_in_groups(program, num_units, num_tiles, GROUP: tl.constexpr):
    """-> unit and tile of a program: GROUP units walk the tiles together and share them in L2."""
    first = program // (GROUP * num_tiles) * GROUP
    width = min(num_units - first, GROUP)
    within = program % (GROUP * num_tiles)
    return first + within % width, within // width


@triton.jit
def multiply_transposed(
    hidden,  # [N, H] pointer, or tensor descriptor if USE_TMA
    weight,  # [V, H] likewise
    start_n,
    start_v,
    offs_v,  # [BLOCK_V] rows of the weight, start_v onwards if USE_TMA
    mask_v,
    num_n,
    num_h,
    strides,  # of hidden, of weight
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of hidden @ weight.T in float32."""
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    num_steps = tl.cdiv(num_h, BLOCK_H)
    if USE_TMA:
        for step in range(num_steps):
            tile_h = hidden.load([start_n, step * BLOCK_H])
            tile_w = weight.load([start_v, step * BLOCK_H])
            acc = tl.dot(as_factor(tile_h), as_factor(tile_w).T, acc)
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_h = tl.arange(0, BLOCK_H)
        mask_n = offs_n < num_n
        stride_hn, stride_hh, stride_wv, stride_wh = strides
        # int64 before the product: N x H and V x H can pass 2^31.
        rows_h = hidden + offs_n.to(tl.int64)[:, None] * stride_hn
        rows_w = weight + offs_v.to(tl.int64)[None, :] * stride_wv
        for step in range(num_steps):
            offs = step * BLOCK_H + offs_h
            mask_h = offs < num_h
            offs = offs.to(tl.int64)
            tile_h = tl.load(
                rows_h + offs[None, :] * stride_hh,
                mask=mask_n[:, None] & mask_h[None, :],
                other=0.0,
            )
            tile_w = tl.load(
                rows_w + offs[:, None] * stride_wh,
                mask=mask_h[:, None] & mask_v[None, :],
                other=0.0,
            )
            acc = tl.dot(as_factor(tile_h), as_factor(tile_w), acc, input_precision="ieee")
    return acc


@triton.jit
def select(condition, chosen, others):
    """`chosen` or `others`, four numbers each."""
    a = tl.where(condition, chosen[0], others[0])
    b = tl.where(condition, chosen[1], others[1])
    c = tl.where(condition, chosen[2], others[2])
    d = tl.where(condition, chosen[3], others[3])
    return a, b, c, d


@triton.jit
def write_idle_zeros(
    out_ptr,  # [N, num_columns]
    stride,  # of its rows
    blocks_ptr,  # [row blocks] int32, the active ones first
    num_active,
    idle,  # tiles of the other blocks are numbered from 0, block by block
    num_n,
    num_columns,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The result's tile for a block in which no row counts."""
    num_tiles = tl.cdiv(num_columns, WIDTH)
    block = tl.load(blocks_ptr + num_active + idle // num_tiles)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = idle % num_tiles * WIDTH + tl.arange(0, WIDTH)
    mask = (offs_n < num_n)[:, None] & (offs < num_columns)[None, :]
    rows_out = out_ptr + offs_n.to(tl.int64) * stride
    zeros = tl.zeros(mask.shape, out_ptr.dtype.element_ty)
    tl.store(rows_out[:, None] + offs[None, :], zeros, mask=mask)


@triton.jit
def halve_columns(tile):
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tile.reshape([rows, 2, half]).permute(0, 2, 1).split()


@triton.jit
def sum_rows(tile):
    """[ROWS, COLUMNS] to [COLUMNS], ROWS a power of two.

    By halves: tl.sum's order follows the layout, and that the alignment of what was loaded, so that
    the number of tokens would show in the last bit.
    """
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    if rows == 1:
        total = tile.reshape([columns])
    else:
        upper, lower = tile.reshape([2, rows // 2, columns]).permute(1, 2, 0).split()
        total = sum_rows(upper + lower)
    return total


@triton.jit
def split_columns(tile, PARTS: tl.constexpr):
    """A tile's columns as a tuple of 1, 2 or 4 equal parts, left to right."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = halve_columns(tile)
        if PARTS == 2:
            parts = (left, right)
        else:
            parts = halve_columns(left) + halve_columns(right)
    return parts


@triton.jit
def form_logits(
    product,  # [BLOCK_N, BLOCK] tile of hidden @ weight.T
    bias_ptr,  # [V] or None
    offs_v,
    mask_v,  # of the columns; None: all
    form,
    ROUND_TO: tl.constexpr,
):
    """Logits of one tile, -inf where masked, and the softcap's slope (1 without one)."""
    if bias_ptr is not None:
        if mask_v is None:
            bias = tl.load(bias_ptr + offs_v)
        else:
            bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
        product += bias.to(tl.float32)[None, :]
    if ROUND_TO is not None:
        product = round_to(product, ROUND_TO).to(tl.float32)
    logits = product * form.scale
    slope = 1.0
    if form.cap is not None:
        # tanh and its derivative through exp(-2|x|): neither overflows, and the slope 1 - tanh^2
        # keeps its relative accuracy where tanh rounds to 1.
        decay = tl.exp2(tl.abs(logits) * (-2.0 * LOG2E))
        inverse = 1.0 / (1.0 + decay)
        capped = (1.0 - decay) * inverse * form.cap
        slope = 4.0 * decay * inverse * inverse
        logits = tl.where(logits < 0, -capped, capped)
    if mask_v is not None:
        logits = tl.where(mask_v[None, :], logits, float("-inf"))
    return logits, slope


@triton.jit
def tile_is_marked(target, mask_n, start_v, num_v, BLOCK_V: tl.constexpr):
    """Whether a tile holds a row's target or ends past the vocabulary. Others compare nothing."""
    here = mask_n & (target >= start_v) & (target < start_v + BLOCK_V)
    return (tl.max(here.to(tl.int32), 0) != 0) | (start_v + BLOCK_V > num_v)


class LogitForm(NamedTuple):
    """The numbers that `form_logits` takes; without a cap logits = scale * product."""

    scale: float
    cap: float | None
    dlogit_dproduct: float  # to be multiplied by the softcap's slope


def logit_form(options) -> LogitForm:
    if options.softcap is None:
        return LogitForm(options.scale, None, options.scale)
    cap = options.softcap
    return LogitForm(options.logit_scale / cap, cap / options.temperature, options.scale)


def rounding(options, dtype: torch.dtype):
    """Triton's type to which products are rounded, None where they are not."""
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return types[dtype] if options.round_logits else None


def strides_of(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    return *hidden.stride(), *weight.stride()


def can_describe(tensor: torch.Tensor) -> bool:
    """Whether the chip's copy engine can read this matrix: 16-byte rows from a 16-byte base."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return False
    stride = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and stride > 0 and stride % 16 == 0 and tensor.data_ptr() % 16 == 0


def describe(tensor: torch.Tensor | None, rows: int, columns: int, use_tma: bool):
    """The tensor itself, or its descriptor with the given tile shape."""
    if tensor is None or not use_tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])
