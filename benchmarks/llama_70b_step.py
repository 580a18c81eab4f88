"""PowerFlow steps on a 70B-shaped Llama with random weights, on one 80 GB GPU.

    python -m benchmarks.llama_70b_step                        # NF4, 80 layers, 8k tokens
    python -m benchmarks.llama_70b_step --weights fp8 --layers 40
    python -m benchmarks.llama_70b_step --scale 100 --tokens 64 --steps 2  # 1/100, for a CPU: 2 min

The base is made and packed one layer at a time on the device, so that its bf16 form never exists as
a whole; NF4 is bitsandbytes'. The steps are those of `PowerFlowTrainer` with a rank-16 adapter and
activation checkpointing; only the completions are random tokens instead of samples. Prints what
`powerflow-fast plan` expects, then per step time, tokens/s and the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from powerflow_fast.models.shapes import ModelShape, model_shape
from powerflow_fast.planning.memory import Run, plan

BLOCK = 64


class Fp8Linear(nn.Linear):
    """A frozen linear layer held in fp8; each product unpacks it, backward again."""

    def __init__(self, dense: Tensor) -> None:  # [out, in]
        super().__init__(dense.shape[1], dense.shape[0], bias=False, device="meta")
        blocks = dense.float().view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-8)
        self.register_buffer("packed", (blocks / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.to(dense.dtype))  # [blocks, 1]
        # Read by PEFT for device and dtype only.
        self.weight = nn.Parameter(dense.new_empty(0), requires_grad=False)

    def unpacked(self) -> Tensor:  # [out, in]
        values = self.packed.to(self.scale.dtype) * self.scale
        return values.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x.to(self.scale.dtype), self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.unpacked().T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.unpacked(), None


def scaled(shape: ModelShape, scale: int, layers: int | None) -> ModelShape:
    """1/`scale` of the parameters of the layers: an eighth of the width, and as many layers."""
    if scale > 1:
        shape = replace(
            shape,
            hidden_size=shape.hidden_size // 8,
            intermediate_size=shape.intermediate_size // 8,
            num_heads=shape.num_heads // 8,
            num_kv_heads=shape.num_kv_heads // 8,
            vocab_size=shape.vocab_size // 8,
            num_layers=max(1, shape.num_layers * 64 // scale),
        )
    return replace(shape, num_layers=layers or shape.num_layers)


def build(shape: ModelShape, kind: str, device: torch.device, dtype: torch.dtype, context: int):
    """The model with random weights, made and packed layer by layer on `device`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        config = shape.to_config(max_position_embeddings=context)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(device)
    torch.manual_seed(0)
    for layer in [*model.model.layers, model.model.norm, model.model.embed_tokens, model.lm_head]:
        layer.to_empty(device=device)
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
            parameter.requires_grad_(False)
        if kind != "bf16" and layer in list(model.model.layers):
            pack(layer, kind)
    model.is_loaded_in_4bit = kind == "nf4"  # as PEFT asks
    return model


def pack(layer: nn.Module, kind: str) -> None:
    """Replace every linear layer inside `layer`."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = Fp8Linear(child.weight.data) if kind == "fp8" else nf4(child)
                setattr(parent, name, packed)


def nf4(dense: nn.Linear) -> nn.Linear:
    """bitsandbytes' layer with double quantisation, 4.127 bits a weight (arXiv 2305.14314)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = dense.weight.data
    kind = dict(compress_statistics=True, quant_type="nf4")
    layer = Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        device="meta",
        **kind,
    )
    layer.weight = Params4bit(weight, requires_grad=False, **kind).to(weight.device)
    return layer


def tokenizer(size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="0", eos_token="1", padding_side="left"
    )


def make_trainer(model, options: argparse.Namespace, callbacks=()):
    from datasets import Dataset
    from peft import LoraConfig

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer

    prompt = options.tokens // 8
    draw = torch.Generator().manual_seed(1)

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        shape = (len(prompts), options.tokens - prompt)
        completions = torch.randint(2, 1000, shape, generator=draw).tolist()
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    cpu = options.device == "cpu"
    args = PowerFlowConfig(
        options.output_dir,
        use_cpu=cpu,
        bf16=not cpu,
        alpha=4.0,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=max(1, 2 // options.micro_batch),
        num_generations=2,
        max_completion_length=options.tokens - prompt,
        max_steps=options.steps,
        gradient_checkpointing=True,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        sample_completions=0,
    )
    words = " ".join(str(2 + i % 8) for i in range(prompt))  # digits: a token each
    return PowerFlowTrainer(
        model,
        args,
        Dataset.from_dict({"prompt": [words] * 64}),
        processing_class=tokenizer(1000),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_func=rollout,
        callbacks=list(callbacks),
    )


def run(options: argparse.Namespace, report: Callable[[dict], object]) -> None:
    """Builds and trains; `report` gets a line when the model stands and one after each step."""
    from transformers import TrainerCallback

    shape = scaled(model_shape("Llama-3-70B"), options.scale, options.layers)
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    setup = Run(shape, weights=options.weights, tokens=options.tokens, completions=1)
    expected = plan(setup, options.micro_batch)

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "step_time" not in logs:
                return
            rate = 2 * options.tokens / logs["step_time"]
            peak = round(1e9 * logs["memory/peak_gb"])
            row = {"step": state.global_step, "seconds": logs["step_time"], "loss": logs["loss"]}
            report(row | {"tokens_per_second": rate, "peak_bytes": peak, "kl": logs["kl"]})

    began = time.perf_counter()
    model = build(shape, options.weights, device, dtype, options.tokens)
    trainer = make_trainer(model, options, [Report()])
    facts = {"parameters": shape.parameters(), "layers": shape.num_layers}
    facts |= {"planned_weights_bytes": expected.weights, "planned_bytes": expected.total}
    if device.type == "cuda":
        facts["held_bytes"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    report(facts | {"build_seconds": time.perf_counter() - began})
    trainer.train()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", choices=("nf4", "fp8", "bf16"), default="nf4")
    parser.add_argument("--scale", type=int, default=1, help="1/SCALE of the size")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=8192, help="of a sequence, 1/8 is prompt")
    parser.add_argument("--micro-batch", type=int, default=1, choices=(1, 2))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", default="runs/llama-70b-step")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    rows: list[dict] = []

    def report(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    run(arguments(argv), report)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
