"""One LA-TB training step of a whole model: random weights in a published shape, LoRA, AdamW.

The model runs as policy (with LoRA and activation checkpointing) and as reference (LoRA off), the
head under test forms the loss, and the adapter takes a step. LoRA is a few lines here, so that it
is the same wherever the benchmark runs; PEFT's does the same arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.inputs import INPUT_SETS, Inputs
from benchmarks.peers import Composed
from powerflow_fast.models.packed_attention import accept_packed_rows
from powerflow_fast.models.packing import Layout, lay_out
from powerflow_fast.models.shapes import ModelShape, model_shape

RANK = 16
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StepCase:
    name: str
    shape: ModelShape  # with as many layers as are built
    whole_layers: int
    sequences: int
    length: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        cut = self.shape.num_layers < self.whole_layers
        layers = f", {self.shape.num_layers} of {self.whole_layers} layers" if cut else ""
        return f"{self.name} shape{layers}"

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def cases(device: torch.device, free: int, *, tiny: bool = False) -> list[StepCase]:
    """Models for a device with `free` bytes; one that does not fit keeps the layers that do."""
    if tiny:
        shape = replace(model_shape("SmolLM2-135M"), num_layers=2, vocab_size=512, hidden_size=64)
        shape = replace(shape, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=128)
        return [StepCase("tiny", shape, 2, 2, 16, torch.float32)]
    if device.type == "cpu":
        shape = model_shape("SmolLM2-135M")
        return [StepCase("SmolLM2-135M", shape, shape.num_layers, 4, 64, torch.float32)]
    found = []
    for name in ("Llama-3.2-1B", "Llama-3-8B", "Llama-3-70B"):
        shape = model_shape(name)
        # Weights twice over a fifth: checkpointed activations, the head's chunks, LoRA.
        room = int(free / 1.25) // 2 - 2 * shape.vocab_size * shape.hidden_size
        layers = min(shape.num_layers, room // shape.layer_parameters())
        if layers > 0:
            cut = replace(shape, num_layers=layers)
            found.append(StepCase(name, cut, shape.num_layers, 8, 512, torch.bfloat16))
    return found


class LoRALinear(nn.Module):
    """y = W x + B A x, the latter only while `switch["on"]`."""

    def __init__(self, base: nn.Linear, switch: dict[str, bool]) -> None:
        super().__init__()
        self.base, self.switch = base, switch
        like = dict(device=base.weight.device, dtype=base.weight.dtype)
        self.down = nn.Linear(base.in_features, RANK, bias=False, **like)
        self.up = nn.Linear(RANK, base.out_features, bias=False, **like)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.down(x)) if self.switch["on"] else y


class TrainingStep:
    """Holds the model; each call is one optimizer step and returns the loss."""

    def __init__(self, case: StepCase, method: Composed, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(case.shape.to_config(), dtype=case.dtype)
        self.method, self.switch = method, {"on": True}
        self.model.requires_grad_(False)
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if name in ADAPTED:
                    setattr(module, name, LoRALinear(child, self.switch))
        options = {"use_reentrant": False}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.draw(case, case.length)

    def draw(self, case: StepCase, scored: int) -> None:
        """Texts of the case's sizes, of which the last `scored` tokens of each sequence count."""
        device = self.model.device
        size = (INPUT_SETS, case.sequences, case.length + 1)
        self.texts = itertools.cycle(
            torch.randint(case.shape.vocab_size, size, device=device).unbind()
        )
        ends = torch.arange(0, case.sequences * scored + 1, scored, device=device)
        self.cu_seqlens = ends.int()

    def __call__(self) -> Tensor:
        states, targets = self._pass(next(self.texts))
        hidden = states()
        self.switch["on"] = False
        with torch.no_grad():
            ref_hidden = states()
        self.switch["on"] = True
        weight = self.model.get_output_embeddings().weight
        inputs = Inputs(hidden, weight, targets, ref_hidden, self.cu_seqlens)
        loss = self.method.tb(inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _pass(self, text: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
        """A pass of the model to the states [N, H] that predict targets [N], and these."""

        def states() -> Tensor:
            out = self.model.model(input_ids=text[:, :-1], use_cache=False)
            return out.last_hidden_state.flatten(0, 1)

        return states, text[:, 1:].reshape(-1)


@dataclass(frozen=True)
class PromptCase(StepCase):
    """Completions of one prompt, which is the first `prompt` tokens of each sequence."""

    prompt: int
    layout: Layout

    @property
    def id(self) -> str:
        sizes = f"prompt {self.prompt}, {self.sequences} completions of {self.length - self.prompt}"
        return f"{super().id}, {sizes}"


class PromptStep(TrainingStep):
    """A step on the completions alone; `case.layout` says how often the prompt is computed."""

    def __init__(self, case: PromptCase, method: Composed, device: torch.device) -> None:
        super().__init__(case, method, device)
        accept_packed_rows(self.model)
        self.start = [p.detach().clone() for p in self.trained]
        self.use(case)

    def use(self, case: PromptCase) -> None:
        """Start again, with other sizes or another layout; the same sizes draw the same texts."""
        torch.manual_seed(0)
        self.prompt, self.layout = case.prompt, case.layout
        self.draw(case, case.length - case.prompt)
        with torch.no_grad():
            for parameter, start in zip(self.trained, self.start, strict=True):
                parameter.copy_(start)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def _pass(self, text: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
        text = text[:, :-1].clone()
        text[:, : self.prompt] = text[:1, : self.prompt]
        lengths = text.new_full((len(text),), self.prompt)
        rows = lay_out(text, torch.ones_like(text), lengths, self.layout)
        scored = torch.ones_like(text[:, self.prompt :], dtype=torch.bool)

        def states() -> Tensor:
            return rows.predicting(rows.hidden_states(self.model), scored)

        return states, text[:, self.prompt :].reshape(-1)
