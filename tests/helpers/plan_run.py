"""A real step whose peak of memory test_memory.py compares with the plan's."""

import ctypes
import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from powerflow_fast import fused_linear_tb_loss, tb_loss
from powerflow_fast.logprobs.torch_attention import TILES
from powerflow_fast.models.lm_head import base_model, read_head
from powerflow_fast.models.packed_attention import accept_packed_rows
from powerflow_fast.models.packing import lay_out
from powerflow_fast.models.shapes import ModelShape
from powerflow_fast.planning.memory import Run

SHAPES = {
    "llama": ModelShape("llama", 256, 8192, 6, 4, 2, 64, 768),
    "phi3": ModelShape("phi3", 256, 8192, 6, 4, 4, 64, 768),  # as Phi-3-mini, all heads have keys
}
SEQUENCES = 8
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def run_of(kind: str, checkpointing: bool, prompt: int = 0) -> Run:
    sizes = dict(weights="fp32", lora_rank=8, tokens=256, device="cpu")
    shared = dict(prompt_tokens=prompt, group=SEQUENCES)
    return Run(SHAPES[kind], checkpointing=checkpointing, **sizes, **shared)


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) * 1024


def build(kind: str, checkpointing: bool):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        SHAPES[kind].to_config(pad_token_id=0), dtype=torch.float32
    )
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def step(model, ids, fused: bool, prompt: int) -> None:
    """With a `prompt` its tokens are shared and not scored; without one all tokens are scored."""
    base = base_model(model)
    head = read_head(base)
    lengths, layout = torch.full((len(ids),), prompt), "shared" if prompt else "padded"
    if prompt:
        accept_packed_rows(base)
        ids[:, :prompt] = ids[0, :prompt]
    rows = lay_out(ids, torch.ones_like(ids), lengths, layout)
    targets = (ids[:, prompt:] if prompt else ids.roll(-1, 1)).flatten()
    scored = torch.ones_like(ids[:, prompt:], dtype=torch.bool)

    def states():
        hidden = rows.hidden_states(base)
        return rows.predicting(hidden, scored) if prompt else hidden

    with torch.no_grad(), model.disable_adapter():
        reference = states()
        if not fused:
            reference = token_logps(reference, head.weight, targets)
    hidden = states()
    offsets = torch.arange(0, len(targets) + 1, len(targets) // len(ids), dtype=torch.int32)
    options = dict(log_z="group", group_size=4, alpha=4.0, cu_seqlens=offsets)
    if fused:
        loss = fused_linear_tb_loss(hidden, head.weight, targets, reference, **options).loss
    else:
        loss = tb_loss(token_logps(hidden, head.weight, targets), reference, **options).loss
    loss.backward()


def token_logps(hidden, weight, targets):
    logits = (hidden @ weight.T).float().clone()  # as a bf16 model's would be copied
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def measure(out: Path, kind: str, checkpointing: bool, fused: bool, prompt: int) -> None:
    """Leaves the bytes resident at the peak of the second step less those before it, in float32."""
    # Freed blocks go back to the system, so that a freed one does not hide a new one.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    model = build(kind, checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, SHAPES[kind].vocab_size, (SEQUENCES, run_of(kind, False).tokens))
    # Libraries, thread pools, what MKL keeps of a tile's product, gradients and optimizer states.
    step(model, ids[:4, :32].clone(), fused, prompt and 16)
    head = read_head(base_model(model)).weight.detach()
    torch.mm(torch.ones(TILES[head.dtype][0], head.shape[1]), head.T)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(model, ids, fused, prompt)
    out.write_text(str(resident("VmHWM") - before))
