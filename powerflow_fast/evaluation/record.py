"""What a run was: `run.json` for the commands that come after it, and a card for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import powerflow_fast
from powerflow_fast.evaluation.comparison import as_markdown
from powerflow_fast.models.lm_head import base_model
from powerflow_fast.models.smollm2 import HUB_NAME, NAME

FILE = "run.json"
ARGUMENTS = (  # of the trainer
    "alpha num_generations max_completion_length temperature learning_rate balance log_z seed"
).split()


@dataclass
class RunRecord:
    """Facts of a run. `measured_run` adds what it measured."""

    model: str  # folder or name of the base
    alpha: float
    chat: bool | None  # prompts were messages; None: not known (a stream)
    adapter: bool  # LoRA; False: all parameters were trained
    prompts: int | None  # None: not known
    num_generations: int
    max_completion_length: int
    temperature: float
    learning_rate: float
    balance: str
    log_z: str
    seed: int
    steps: int = 0
    note: str = ""  # further sentences for the card
    quantize: str = "none"
    minutes: float | None = None
    held_out: dict[str, Any] = field(default_factory=dict)  # `comparison.compare`, and a forecast
    version: str = powerflow_fast.__version__

    @classmethod
    def of(cls, trainer: Any) -> RunRecord:
        """Of the run that `trainer`, a PowerFlowTrainer, is set up for."""
        args, data = trainer.args, trainer.train_dataset
        sized = hasattr(data, "__len__")
        policy = trainer.accelerator.unwrap_model(trainer.model)
        return cls(
            model=getattr(base_model(policy).config, "_name_or_path", "") or "",
            chat=not isinstance(data[0]["prompt"], str) if sized else None,
            adapter=hasattr(policy, "peft_config"),
            prompts=len(data) if sized else None,
            **{name: getattr(args, name) for name in ARGUMENTS},
        )

    def save(self, folder: str | Path) -> None:
        """Write `run.json` and the card, README.md, to `folder`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        (path / "README.md").write_text(self.card(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord | None:
        """The record in `folder`, or None where there is none.

        Raises:
            ValueError: for a file that this version cannot read.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a record of a run ({error})") from None

    @property
    def hub_name(self) -> str:
        """Name of the base on the Hub; "" where it has none."""
        if self.model == NAME:
            return HUB_NAME
        return "" if Path(self.model).exists() or not self.model else self.model

    def card(self, merged: bool = False) -> str:
        """The model card: Markdown with the header that the Hub reads.

        Args:
            merged: the adapter was merged into the base, and the card is of the whole model.
        """
        adapter = self.adapter and not merged
        head = [f"base_model: {self.hub_name}"] if self.hub_name else []
        head += ["library_name: peft" if adapter else "library_name: transformers"]
        head += ["pipeline_tag: text-generation"]
        head += [f"tags: [{'lora, ' if adapter else ''}powerflow, trl]"]
        kind = "LoRA adapter" if adapter else "Model"
        base = self.hub_name or f"a model from `{self.model or 'memory'}`"
        held = self.held_out
        measured = as_markdown(held) if held else "Nothing was measured on held-out prompts."
        parts = [
            "---\n" + "\n".join(head) + "\n---",
            f"# {kind} trained with PowerFlow, alpha = {self.alpha:g}",
            f"Trained without labels or rewards toward the power {self.alpha:g} of its base, "
            f"{base}, with the length-aware Trajectory-Balance loss of PowerFlow "
            "(arXiv 2603.18363, eq. 10)" + (", and merged into the base." if merged else "."),
            self._settings(),
            *([self.note] if self.note else []),
            f"## Use\n\n{self._use(adapter)}",
            f"## Measured\n\n{measured}",
        ]
        return "\n\n".join(parts) + "\n"

    def _settings(self) -> str:
        count = "" if self.prompts is None else f" {self.prompts}"
        form = {True: ", as messages of the chat template", False: ", as plain text", None: ""}
        return (
            f"* prompts:{count}{form[self.chat]}; no answers\n"
            f"* {self.steps} optimizer steps, {self.num_generations} completions a prompt, at "
            f"most {self.max_completion_length} tokens, at temperature {self.temperature:g}\n"
            f"* learning rate {self.learning_rate:g}, log Z' `{self.log_z}`, balance "
            f"`{self.balance}`, seed {self.seed}\n"
            f"* powerflow-fast {self.version}"
        )

    def _use(self, adapter: bool) -> str:
        name = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
        package = "peft" if adapter else "transformers"
        base = self.hub_name or self.model
        tokenizer = base if adapter and base else "this-folder"
        return (
            f"```python\nfrom {package} import {name}\nfrom transformers import AutoTokenizer\n\n"
            f'model = {name}.from_pretrained("this-folder")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")\n```'
        )
