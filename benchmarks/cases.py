"""The table of cases: which group runs which peer on which inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Shape
from benchmarks.peers import PEERS, ROUNDED, Composed
from powerflow_fast import reference
from powerflow_fast.models.shapes import model_shape

Outputs = tuple[Tensor, ...]
ANCHOR = Shape(16384, 4096, 131072, length=512)  # other projects publish times for it
# Ours, what people write by hand, and what a trainer gives them: where all would take too long.
FEW_PEERS = ("powerflow-fast", "naive PyTorch", "TRL fused head")
AXES = ("tokens", "vocabulary", "hidden", "sequences", "group size")  # of the scaling group


def _forward(method: Composed, inputs: Inputs) -> Outputs:
    with torch.no_grad():
        return (method.logps(inputs),)


def _pair(method: Composed, inputs: Inputs) -> Outputs:
    with torch.no_grad():
        return method.pair(inputs)


def _step(method: Composed, inputs: Inputs) -> Outputs:
    """Forward and backward of LA-TB: the gradients."""
    return _gradients(method.tb(inputs).loss, inputs)


def _gradients(loss: Tensor, inputs: Inputs) -> Outputs:
    leaves = [x for x in (inputs.hidden, inputs.weight) if x.requires_grad]
    return torch.autograd.grad(loss, leaves)


@dataclass(frozen=True)
class Group:
    """What is timed, and the matrix products that no way of doing it can do without."""

    title: str
    products: int
    run: Callable[[Composed, Inputs], Outputs]
    train_head: bool = False

    @property
    def has_gradient(self) -> bool:
        return self.run is _step

    def floor(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        """Operations, and bytes that must move: inputs read once, gradients written once."""
        hidden_sized = {_forward: 1, _pair: 2, _step: 3}[self.run]
        heads = 2 if self.train_head else 1
        moved = itemsize * shape.h * (hidden_sized * shape.n + heads * shape.v)
        return self.products * shape.product_flops, moved

    def outputs_of(self, method: Composed, inputs: Inputs, sequences: int) -> Outputs:
        """What `truth` gives for the first sequences, through the path that is timed."""
        n = int(inputs.cu_seqlens[sequences])
        if not self.has_gradient:
            return tuple(x[:n] for x in self.run(method, inputs))
        # Tokens of the other sequences get a zero gradient.
        loss = method.tb(inputs).residual[:sequences].square().mean()
        grad_hidden, *grad_weight = _gradients(loss, inputs)
        return (grad_hidden[:n], *grad_weight)

    def truth(self, inputs: Inputs, sequences: int, alpha: float) -> Outputs:
        """The specification in float64 on the first sequences."""
        part = inputs.sequences(sequences)
        hidden = part.hidden.detach().double().requires_grad_()
        weight = part.weight.detach().double().requires_grad_(self.train_head)
        with torch.set_grad_enabled(self.has_gradient):
            logps, _ = reference.linear_logprobs(hidden, weight, part.targets)
        with torch.no_grad():
            ref_logps, _ = reference.linear_logprobs(part.ref_hidden, weight, part.targets)
        if not self.has_gradient:
            return (logps,) if self.run is _forward else (logps, ref_logps)
        ones = torch.ones(sequences, dtype=torch.float64, device=hidden.device)
        lengths = part.cu_seqlens.diff().tolist()
        policy, base = logps.split(lengths), ref_logps.split(lengths)
        log_z = 0 * ones
        if part.group is not None:
            pairs = zip(policy, base, strict=True)
            own = torch.stack([alpha * q.mean() - p.detach().mean() for p, q in pairs])
            log_z = own.view(-1, part.group).mean(1).repeat_interleave(part.group)
        loss, _ = reference.tb_loss(
            policy,
            base,
            log_z=log_z,
            alpha=alpha * ones,
            psi=0 * ones,
            weights=ones,
        )
        return _gradients(loss, replace(part, hidden=hidden, weight=weight))


GROUPS = {
    "tb-frozen": Group("LA-TB forward and backward, frozen head", 3, _step),
    "forward": Group("log-probs, forward", 1, _forward),
    "pair": Group("log-probs of policy and reference, forward", 2, _pair),
    "tb-trained": Group("LA-TB forward and backward, trained head", 4, _step, train_head=True),
    "scaling": Group("LA-TB forward and backward, frozen head, sizes doubled", 3, _step),
}


@dataclass(frozen=True)
class Case:
    group: str
    peer: str
    shape_name: str
    shape: Shape
    source: str  # of the inputs
    dtype: torch.dtype
    axis: str | None = None  # of the scaling group: one of AXES

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.group, self.shape_name, self.source, dtype, self.peer]
        return "-".join(part.replace(" ", "_") for part in parts)

    @property
    def logits(self) -> int:
        return self.shape.n * self.shape.v

    def bytes_needed(self, input_sets: int) -> int:
        """A rough count of what must fit: input sets, gradients, logits, float64 truth."""
        shape, item = self.shape, self.dtype.itemsize
        inputs = input_sets * item * shape.h * (2 * shape.n + shape.v)
        truth = 8 * (2 * shape.h * shape.v + 6 * shape.length * shape.v)
        return inputs + max(PEERS[self.peer].logit_bytes * self.logits, truth)


def table(device: torch.device, *, tiny: bool = False) -> Iterator[Case]:
    """Every case for a device; `tiny` walks the same code in seconds."""
    dtypes = head_dtypes(device)
    for dtype in dtypes:
        yield from _heads(device, dtype, tiny)
    yield from _scaling(device, dtypes[0], tiny)


def head_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Types that people train a head in: not float32 on a GPU, nor bf16 where no unit has it."""
    if device.type == "cuda":
        return (torch.bfloat16,)
    bf16 = (torch.bfloat16,) if torch.cpu._is_avx512_bf16_supported() else ()
    return (torch.float32, *bf16)


def shapes(device: torch.device, *, tiny: bool = False) -> dict[str, Shape]:
    """Heads by name; the first serves every group, the others the frozen step alone."""
    if tiny:
        return {"tiny": Shape(64, 128, 512, length=16)}
    if device.type == "cpu":
        return {"SmolLM2-135M": model_head("SmolLM2-135M", n=256, length=64)}
    return {
        "anchor": ANCHOR,
        "Llama-3-8B": model_head("Llama-3-8B", n=8192, length=512),
        "Qwen2.5-7B": model_head("Qwen2.5-7B", n=8192, length=512),
    }


def _heads(device: torch.device, dtype: torch.dtype, tiny: bool) -> Iterator[Case]:
    named = shapes(device, tiny=tiny)
    first = next(iter(named))
    rounds = device.type == "cpu" and dtype == torch.bfloat16
    peers = [peer for peer in PEERS if peer != ROUNDED or rounds]
    for name, shape in named.items():
        yield from (Case("tb-frozen", peer, name, shape, "random", dtype) for peer in peers)
    if first == "SmolLM2-135M":
        for peer in FEW_PEERS:
            yield Case("tb-frozen", peer, first, named[first], "SmolLM2", dtype)
    for group in ("forward", "tb-trained", "pair"):
        # Without a kernel for it, a pair takes twice the forward; a CPU has no time to show that.
        for peer in FEW_PEERS if (group, device.type) == ("pair", "cpu") else peers:
            yield Case(group, peer, first, named[first], "random", dtype)


def model_head(name: str, n: int, length: int) -> Shape:
    model = model_shape(name)
    return Shape(n, model.hidden_size, model.vocab_size, length)


def _scaling(device: torch.device, dtype: torch.dtype, tiny: bool) -> Iterator[Case]:
    """Each size doubled from the same start; tokens for a few peers, the other axes for ours.

    log Z' is 0 on every axis but the group size, where it is the group's, from groups of 2: of one
    sequence alone it would leave no gradient.
    """
    if tiny:
        start = Shape(32, 64, 256, length=8)
    elif device.type == "cuda":
        start = Shape(2048, 2048, 32768, length=128)
    else:
        start = Shape(256, 256, 12288, length=16)
    for axis in AXES:
        for doublings in range(2 if tiny else 4):
            factor = 2**doublings
            shape = {
                "tokens": replace(start, n=factor * start.n),
                "vocabulary": replace(start, v=factor * start.v),
                "hidden": replace(start, h=factor * start.h),
                "sequences": replace(start, length=start.length // factor),
                "group size": replace(start, group=2 * factor),
            }[axis]
            for peer in FEW_PEERS if axis == "tokens" else FEW_PEERS[:1]:
                yield Case("scaling", peer, f"{axis}_x{factor}", shape, "random", dtype, axis)
