"""LA-TB in a loop of your own: `accelerate launch examples/plain_loop.py Qwen/Qwen2.5-0.5B`."""

import argparse

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from powerflow_fast import sample, tb_loss
from powerflow_fast.integrations.transformers import patch_head


def train(name, prompts, steps=100, group=8, max_new_tokens=64, lr=1e-4):
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name)
    patch_head(model)  # model(..., labels=, fused_lm_head=True) gives log-probs, never logits
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr))
    policy = accelerator.unwrap_model(model)
    own = prompts[accelerator.process_index :: accelerator.num_processes]
    for _ in range(steps):
        prompt = tokenizer(own, padding=True, return_tensors="pt").to(accelerator.device)
        sizes = dict(num_return_sequences=group, max_new_tokens=max_new_tokens)
        drawn = sample(policy, prompt.input_ids, prompt.attention_mask, **sizes)
        batch = dict(drawn._asdict(), fused_lm_head=True)
        with torch.no_grad(), policy.disable_adapter():
            reference = model(**batch).log_probs
        scored = model(**batch)
        objective = dict(alpha=4.0, log_z="group", group_size=group)
        out = tb_loss(scored.log_probs, reference, mask=scored.label_mask, **objective)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print({k: round(v.item(), 3) for k, v in out.metrics.items()})
    return policy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="LA-TB with LoRA in a loop of one's own")
    parser.add_argument("model", help="folder or name of a causal language model")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    train(arguments.model, ["What is 17 * 3?", "Name a river in France."], arguments.steps)
