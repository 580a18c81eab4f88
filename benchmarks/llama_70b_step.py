"""PowerFlow steps on a 70B-shaped Llama with random weights, on one 80 GB GPU.

    python -m benchmarks.llama_70b_step                        # NF4, 80 layers, 8k tokens
    python -m benchmarks.llama_70b_step --weights fp8 --layers 40
    python -m benchmarks.llama_70b_step --scale 100 --tokens 64 --steps 2  # 1/100, for a CPU: 2 min

The base is made and packed one layer at a time on the device, so that its bf16 form never exists as
a whole. The steps are those of `PowerFlowTrainer` with a rank-16 adapter and activation
checkpointing; only the completions are random tokens instead of samples. Prints what
`powerflow-fast plan` expects, then per step time, tokens/s and the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerflow_fast.model_shapes import ModelShape, model_shape
from powerflow_fast.plan import Run, plan

# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E); blocks of 64 share a scale.
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
BLOCK = 64


class PackedLinear(nn.Linear):
    """A frozen linear layer held in NF4 or fp8; each product unpacks it, backward again."""

    def __init__(self, dense: Tensor, kind: str) -> None:  # [out, in]
        super().__init__(dense.shape[1], dense.shape[0], bias=False, device="meta")
        blocks = dense.float().view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-8)
        if kind == "nf4":
            levels = NF4.to(dense.device)
            index = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
            packed = index.view(-1, 2)
            packed = packed[:, 0] * 16 + packed[:, 1]
            pair = torch.arange(256, device=dense.device)
            table = torch.stack([levels[pair // 16], levels[pair % 16]], 1).to(dense.dtype)
            self.register_buffer("table", table)  # [256, 2]
        else:
            packed = (blocks / scale).to(torch.float8_e4m3fn)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale.to(dense.dtype))  # [blocks, 1]
        # Read by PEFT for device and dtype only.
        self.weight = nn.Parameter(dense.new_empty(0), requires_grad=False)

    def unpacked(self) -> Tensor:  # [out, in]
        if self.packed.dtype == torch.uint8:
            values = F.embedding(self.packed.int(), self.table).view(-1, BLOCK)
        else:
            values = self.packed.to(self.scale.dtype)
        return (values * self.scale).view(self.out_features, self.in_features)

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


def build(shape: ModelShape, kind: str, device: torch.device, dtype: torch.dtype):
    """The model with random weights, made and packed layer by layer on `device`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.to_config(), dtype=dtype)
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
    return model


def pack(layer: nn.Module, kind: str) -> None:
    """Replace every linear layer inside `layer`."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child.weight.data, kind))


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
    words = " ".join(str(2 + i % 900) for i in range(prompt))
    return PowerFlowTrainer(
        model,
        args,
        Dataset.from_dict({"prompt": [words] * 64}),
        processing_class=tokenizer(1000),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_func=rollout,
        callbacks=list(callbacks),
    )


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", choices=("nf4", "fp8", "bf16"), default="nf4")
    parser.add_argument("--scale", type=int, default=1, help="1/SCALE of the size")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=8192, help="of a sequence, 1/8 is prompt")
    parser.add_argument("--micro-batch", type=int, default=1, choices=(1, 2))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", default="runs/llama-70b-step")
    options = parser.parse_args(argv)
    shape = scaled(model_shape("Llama-3-70B"), options.scale, options.layers)
    device, dtype = torch.device(options.device), torch.bfloat16
    if device.type == "cpu":
        dtype = torch.float32
    run = Run(shape, weights=options.weights, tokens=options.tokens, completions=1)
    expected = plan(run, options.micro_batch)
    print(
        f"{shape.parameters() / 1e9:.2f}e9 parameters, {shape.num_layers} layers, {options.weights}"
        f"; plan: weights {expected.weights / 1e9:.2f} GB, "
        f"largest moment {expected.total / 1e9:.2f} GB"
    )
    began = time.perf_counter()
    trainer = make_trainer(build(shape, options.weights, device, dtype), options)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        print(f"built in {time.perf_counter() - began:.0f} s, {held / 1e9:.2f} GB held")
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    rows = []
    for log in trainer.state.log_history:
        if "step_time" in log:
            tokens = 2 * options.tokens
            row = {"step": log["step"], "seconds": log["step_time"], "loss": log["loss"]}
            row |= {"tokens_per_second": tokens / log["step_time"]}
            row |= {"peak_gb": log["memory/peak_gb"], "kl": log["kl"]}
            rows.append(row)
            print(json.dumps(row))
    if device.type == "cuda":
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        path = Path(__file__).parent / "results" / f"llama-70b-step-{name}.json"
        facts = vars(options) | {"parameters": shape.parameters(), "torch": torch.__version__}
        path.write_text(json.dumps({"options": facts, "steps": rows}, indent=1) + "\n")
        print(f"written to {path}")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
