"""Where every gigabyte of a training run goes, and the largest micro-batch that fits.

Counted from the model's shape, not measured: the tensors that autograd keeps in a transformers
decoder with LoRA on every linear layer and an attention that keeps no [L, L] scores (Gemma 2's
keeps none only with flash-attn). Tests compare the counts with what autograd keeps and with the
measured peak of real steps. Bytes are per GPU; a GB is 1e9 bytes.
"""

from __future__ import annotations

import reprlib
from bisect import bisect_right
from dataclasses import dataclass, replace

from powerflow_fast.kernels.config import (
    CACHE_TILE,
    DLOGITS_BYTES,
    EXP_LOGITS_BYTES,
    STATISTICS_BYTES,
)
from powerflow_fast.logprobs.softmax_cache import LARGEST_BYTES
from powerflow_fast.logprobs.validation import check_choice
from powerflow_fast.models.shapes import FAMILIES, LARGEST_SIZE, ModelShape

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "nf4": 4.127 / 8}  # QLoRA, arXiv 2305.14314: 4.127
QUANTIZED = ("fp8", "nf4")  # linear layers only; embedding and head stay bf16
CPU_TILES = 16 << 20  # bytes of the torch head's tiles
RESTING = "weights reference gathered adapter gradients optimizer".split()  # always there
MOST_SEQUENCES = 1 << 22  # of a micro-batch, that are tried
RESERVED = 0.05  # of a GPU's memory: driver, allocator, fragmentation; an assumption


def _check_positive(name: str, value: float) -> None:
    if not 0 < value <= LARGEST_SIZE:
        raise ValueError(
            f"{name}: expected a number > 0 and at most {LARGEST_SIZE:.0e}, "
            f"got {reprlib.repr(value)}"
        )


@dataclass(frozen=True)
class Run:
    """The training run that a plan is for.

    Args:
        shape: the model.
        gpus: their number.
        memory_gb: of each GPU [1e9 bytes].
        weights: "bf16", "fp32", or "nf4", "fp8" for the linear layers of a frozen base.
        lora_rank: LoRA on every linear layer; 0 trains all parameters, with a frozen second copy as
            the reference.
        tokens: of a sequence, prompt and completion, with padding where padding is computed.
        prompt_tokens: of these, the prompt that the completions of a group share: computed once a
            group and micro-batch, and not scored. 0: unknown, all tokens count.
        group: completions of a prompt.
        completions: sequences that one GPU samples at a time.
        sharding: "fsdp" divides weights, gradients and optimizer over the GPUs, "ddp" copies them.
        offload: with "fsdp": shards rest in main memory.
        offload_reference: the trainer's option: the second copy is on the GPU only while it scores
            a rollout.
        checkpointing: recompute each layer in the backward pass.
        device: "cuda" or "cpu", which decides the head's buffers.

    Raises:
        ValueError: for a value out of range, or options that do not go together.
    """

    shape: ModelShape
    gpus: int = 1
    memory_gb: float = 80.0
    weights: str = "bf16"
    lora_rank: int = 16
    tokens: int = 8192
    prompt_tokens: int = 0
    group: int = 8
    completions: int = 8
    sharding: str = "ddp"
    offload: bool = False
    offload_reference: bool = False
    checkpointing: bool = True
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("gpus", "memory_gb", "tokens", "group", "completions"):
            _check_positive(name, getattr(self, name))
        if not 0 <= self.prompt_tokens < self.tokens:
            raise ValueError(
                f"prompt_tokens: expected 0 to {self.tokens - 1:g}, less than tokens, got "
                f"{reprlib.repr(self.prompt_tokens)}"
            )
        if not 0 <= self.lora_rank <= LARGEST_SIZE:
            raise ValueError(
                f"lora_rank: expected 0 to {LARGEST_SIZE:.0e}, got {reprlib.repr(self.lora_rank)}"
            )
        check_choice("weights", self.weights, tuple(BYTES))
        check_choice("sharding", self.sharding, ("ddp", "fsdp"))
        if self.weights in QUANTIZED and (self.lora_rank == 0 or self.sharding == "fsdp"):
            raise ValueError(
                f"weights={self.weights!r}: expected LoRA and sharding='ddp'; quantised weights "
                "neither train nor shard here"
            )
        if self.offload and self.sharding != "fsdp":
            raise ValueError("offload: expected sharding='fsdp', whose shards it moves")
        if self.offload_reference and (self.lora_rank > 0 or self.sharding == "fsdp"):
            raise ValueError("offload_reference: expected lora_rank=0 and sharding='ddp'")

    @property
    def width(self) -> float:
        """Bytes of a number in activations."""
        return BYTES["fp32" if self.weights == "fp32" else "bf16"]

    def computed_tokens(self, sequences: int) -> int:
        """Tokens that pass through the layers for a micro-batch: each prompt once a group."""
        completions = (self.tokens - self.prompt_tokens) * sequences
        return completions + self.prompt_tokens * -(-sequences // self.group)

    def scored_tokens(self, sequences: int) -> int:
        """Tokens that reach the head: those of completions."""
        return (self.tokens - self.prompt_tokens) * sequences

    @property
    def copies_inputs(self) -> bool:
        """Whether each adapter copies its input: PEFT to the adapter's float32, autocast back.

        Beside bf16 layers; quantised ones leave the type to autocast, and FSDP's mixed precision
        makes the adapter bf16 while it is used.
        """
        return self.lora_rank > 0 and self.weights == "bf16" and self.sharding == "ddp"


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU; `host` is main memory of all ranks together."""

    weights: float
    reference: float  # a second copy, for full fine-tuning
    gathered: float  # full layers in use under FSDP, or a dequantised matrix
    adapter: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass
    head: float  # while the loss runs
    backward: float  # while a layer's backward pass runs: the head's is over then
    sampler: float  # key-value cache, while sampling, without the three above
    scoring: float  # an offloaded reference and its head, while it scores, without the four above
    host: float

    @property
    def total(self) -> float:
        """At the largest moment of training, sampling and scoring."""
        step = self.activations + max(self.head, self.backward)
        return sum(getattr(self, name) for name in RESTING) + max(step, self.sampler, self.scoring)


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Parameters of LoRA on the linear layers of every decoder layer."""
    return shape.num_layers * rank * sum(map(sum, shape.linear_layers()))


def layer_activations(run: Run) -> float:
    """Bytes per token that the backward pass of one decoder layer needs, inputs included.

    In the run's width: the normed inputs [H]; queries, keys, values (repeated for each query head)
    and attention's output, once as attention keeps it and once as the next layer's input [q each];
    gate, its silu, up and their product [I each]; the LoRA bottlenecks. In float32: the inputs of
    all norms, those of queries and keys included. Where norms train, the inputs of their weights.
    """
    shape, family, full = run.shape, FAMILIES[run.shape.model_type], run.lora_rank == 0
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layers = len(shape.linear_layers())
    # Attention's layers share a normed input, and so do gate and up.
    normed_inputs = layers - 2 if run.copies_inputs else 2
    attention = 5 * q
    if family.fused:  # values are a view, which keeps the whole output, unless they are repeated
        attention = max(attention, 4 * q + 3 * kv)
    numbers = normed_inputs * shape.hidden_size + attention + 4 * shape.intermediate_size
    normed = family.norms * shape.hidden_size + family.qk_norm * (q + kv)
    scaled = full * normed * (4 if family.wide_scale else run.width)
    return run.width * (numbers + layers * run.lora_rank) + 4 * normed + scaled


def micro_batch_activations(run: Run, sequences: int) -> float:
    """Bytes that the backward pass of one decoder layer needs of a micro-batch.

    Where prompts are shared, each completion has a copy of its prompt's keys and values, and the
    prompt keeps those of the whole row.
    """
    shape, computed = run.shape, run.computed_tokens(sequences)
    a_layer = layer_activations(run) * computed
    if run.prompt_tokens:
        copied = shape.num_heads * (run.tokens * sequences - computed)
        a_layer += 2 * shape.head_dim * run.width * (copied + shape.num_kv_heads * computed)
    return a_layer


def activation_bytes(run: Run, sequences: int) -> float:
    """Bytes that layers and last norm keep from forward to backward pass of a micro-batch.

    With shared prompts also the last states, of which those that predict are copied.
    """
    shape, computed = run.shape, run.computed_tokens(sequences)
    if run.checkpointing:
        a_layer = run.width * shape.hidden_size * computed
    else:
        a_layer = micro_batch_activations(run, sequences)
    widths = 4 + run.width * (2 if run.prompt_tokens else 1)
    last_norm = widths * shape.hidden_size * computed
    return a_layer * shape.num_layers + last_norm


def backward_bytes(run: Run, sequences: int) -> float:
    """Bytes beside `activation_bytes` while one layer's backward pass runs.

    Recomputed values with checkpointing, and gradients: of gate, up and their product [I each]. In
    a fused layer: of its output and its scaled adapter's [2I each]. Where inputs are copied: of the
    product, of its copy, and the float32 one between them.
    """
    fused = FAMILIES[run.shape.model_type].fused
    passing = (4 if fused or run.copies_inputs else 3) * run.shape.intermediate_size
    again = micro_batch_activations(run, sequences) if run.checkpointing else 0.0
    return run.width * passing * run.computed_tokens(sequences) + again


def head_bytes(run: Run, sequences: int, fused: bool = True) -> float:
    """Bytes of log-probs of policy and reference, and of the gradient of the hidden states.

    Fused: packed states of both models, and the larger of the two passes. A frozen head holds the
    unit gradient in float32, with a chunk's exp-logits and statistics, then with the gradient. A
    trained head holds its softmax cache for backward, with a chunk's statistics, then with a second
    copy of the states, their gradient in float32, a chunk's dlogits, and one of its two float32
    products at a time.
    Not fused: logits in the run's width, in float32, and their gradient (the reference's pass is
    over then).
    """
    n, h, v = run.scored_tokens(sequences), run.shape.hidden_size, run.shape.vocab_size
    width, on_cpu = run.width, run.device == "cpu"
    packed = n * h * (2 * width) + 64 * n  # and a few [N] vectors
    if not fused:
        return packed + n * h * width + n * v * (width + 4 + 4)
    statistics = CPU_TILES if on_cpu else STATISTICS_BYTES
    if run.lora_rank > 0:
        buffers = min(statistics + (0 if on_cpu else EXP_LOGITS_BYTES), n * v * (4 + width))
        return packed + n * h * 4 + max(buffers, n * h * width)
    values = min(LARGEST_BYTES, 4 * v * h, n * v * width)
    kept = values + values / width / CACHE_TILE * 4  # a float32 factor a tile
    chunk = CPU_TILES if on_cpu else DLOGITS_BYTES
    products = max(n * h * 4, min(chunk, 4 * v * h))
    backward = n * h * (width + 4) + min(chunk, n * v * width) + products
    return packed + kept + max(min(statistics, n * v * 4), backward)


def plan(run: Run, sequences: int, fused: bool = True) -> Memory:
    """Memory of a run with micro-batches of `sequences`; `fused`: with this library's head."""
    shape, width = run.shape, run.width
    total = shape.parameters()
    rows = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    linear = total - rows
    weights = linear * BYTES[run.weights] + rows * width
    shards = run.gpus if run.sharding == "fsdp" else 1
    if run.sharding == "fsdp":  # this layer, the next one, and the unit of embedding and head
        gathered = width * (2 * shape.layer_parameters() + rows)
    else:
        largest = max(inputs * outputs for inputs, outputs in shape.linear_layers())
        gathered = width * largest if run.weights in QUANTIZED else 0.0
    full = run.lora_rank == 0
    trained = total if full else lora_parameters(shape, run.lora_rank)
    trained_width = width if full else 4.0  # adapters are float32
    here = 0.0 if run.offload else 1.0 / shards
    resting = {
        "weights": weights * here,
        "reference": weights * here if full and not run.offload_reference else 0.0,
        "adapter": 0.0 if full else trained * trained_width * here,
        "gradients": trained * trained_width * here,
        "optimizer": 2 * trained * trained_width * here,  # AdamW
    }
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * width
    moved = weights * (2 if full else 1) + trained * trained_width * (3 if full else 4)
    head, copies = head_bytes(run, sequences, fused), run.gpus * run.offload_reference
    return Memory(
        gathered=gathered,
        activations=activation_bytes(run, sequences),
        backward=backward_bytes(run, sequences),
        head=head,
        sampler=cache * run.tokens * run.completions,
        scoring=weights + head if copies else 0.0,
        host=moved if run.offload else weights * copies,
        **resting,
    )


def largest_micro_batch(run: Run, fused: bool = True) -> int:
    """Sequences per GPU and pass that fit; 0 where not even one does."""
    budget = run.memory_gb * 1e9 * (1 - RESERVED)
    # The total grows with the sequences: those up to the budget are counted.
    return bisect_right(range(1, MOST_SEQUENCES), budget, key=lambda n: plan(run, n, fused).total)


def flops_per_token(run: Run) -> float:
    """Floating-point operations of one training step for a token of `tokens`-long sequences.

    Products of the layers: policy and reference forward, the gradient of the inputs, recomputation
    with checkpointing, the gradient of the weights where they train; causal attention, forward once
    a pass and twice in the gradient; the head's three products (four where it trains). A prompt
    counts once a group, and not for the head.
    """
    shape, full = run.shape, run.lora_rank == 0
    prompt, others = run.prompt_tokens / run.tokens, 1 - 1 / run.group
    layers = 2 * shape.num_layers * shape.layer_parameters()
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * run.tokens
    passes = 2 + run.checkpointing
    head = (4 if full else 3) * 2 * shape.hidden_size * shape.vocab_size
    of_layers = layers * (1 - prompt * others) * (passes + 1 + full)
    of_attention = attention * (1 - prompt * prompt * others) * (passes + 2)
    return of_layers + of_attention + head * (1 - prompt)


def _shared(run: Run, sequences: int) -> list[str]:
    if not run.prompt_tokens:
        return []
    computed, tokens = run.computed_tokens(sequences), run.tokens * sequences
    return [
        f"{run.group} completions share a prompt of {run.prompt_tokens} tokens: {computed} of "
        f"{tokens} tokens are computed"
    ]


LEGEND = """\
peak: what is always there, and the largest of training, sampling and scoring. Training:
activations, and the larger of the two lines under them. fused head: this library; plain logits:
[tokens, vocab] logits are formed. micro-batch: sequences that a GPU trains on at once."""


def report(run: Run, sequences: int | None = None, tflops: float | None = None) -> str:
    """The plan as a table.

    Args:
        run: what is planned.
        sequences: of a micro-batch; default: the most that fit.
        tflops: measured rate of a GPU [1e12 operations/s], for a throughput.

    Raises:
        ValueError: for a `sequences` or `tflops` that is not > 0.
    """
    for name, value in (("micro_batch", sequences), ("tflops", tflops)):
        if value is not None:
            _check_positive(name, value)
    fits = {fused: largest_micro_batch(run, fused) for fused in (True, False)}
    shown = sequences or max(fits[True], 1)
    memory = {fused: plan(run, shown, fused) for fused in (True, False)}
    gathered = "layers gathered" if run.sharding == "fsdp" else "one matrix dequantised"
    titles = {
        "weights": f"always: weights ({run.weights})",
        "reference": "always: reference, a second copy",
        "gathered": f"always: {gathered}",
        "adapter": f"always: adapter (rank {run.lora_rank})",
        "gradients": "always: gradients",
        "optimizer": "always: optimizer (AdamW)",
        "activations": f"training: activations{', checkpointed' if run.checkpointing else ''}",
        "head": "training: + log-probs, both models",
        "backward": "training: or + one layer's backward",
        "sampler": f"sampling: cache of {run.completions} sequences",
        "scoring": "scoring: the reference comes here",
        "total": "peak",
    }
    lines = [
        f"{run.gpus} GPU(s) of {run.memory_gb:g} GB, {run.sharding}{', offload' * run.offload}; "
        f"{shown} sequence(s) of {run.tokens} tokens a micro-batch",
        *_shared(run, shown),
        f"{'GB per GPU':<36}{'fused head':>12}{'plain logits':>14}",
    ]
    for name, title in titles.items():
        ours, plain = (getattr(memory[fused], name) / 1e9 for fused in (True, False))
        if ours or plain:
            lines.append(f"{title:<36}{ours:>12.2f}{plain:>14.2f}")
    lines.append(f"{'largest micro-batch':<36}{fits[True]:>12}{fits[False]:>14}")
    other = activation_bytes(replace(run, checkpointing=not run.checkpointing), shown) / 1e9
    lines.append(
        f"activations {'without' if run.checkpointing else 'with'} checkpointing: {other:.2f} GB"
    )
    if memory[True].host:
        lines.append(f"main memory, all ranks together: {memory[True].host / 1e9:.1f} GB")
    if tflops is None:
        lines.append("throughput: not measured on this GPU; give a rate with --tflops")
    else:
        rate = tflops * 1e12 / flops_per_token(run)
        lines.append(
            f"throughput at {tflops:g} TFLOP/s (given): {rate:.0f} tokens/s a GPU "
            "trained, sampling not counted"
        )
    lines.append(f"{RESERVED:.0%} of the memory is kept back for driver and allocator (assumed)")
    return "\n".join([*lines, LEGEND])
