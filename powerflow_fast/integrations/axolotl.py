"""For Axolotl's `plugins:` list: `powerflow_fast.integrations.axolotl.PowerFlowPlugin`.

Supervised fine-tuning only: on its RL path Axolotl pins a TRL whose trainers ask for full logits.
Options of `patch_head` go under `powerflow_head:`, as `powerflow_head: {grad_tolerance: 1.0e-3}`.
"""

from __future__ import annotations

from typing import Any


def use_head(cfg: Any, trainer: Any) -> None:
    """Let the trainer that Axolotl has built take its loss from `patch_head`.

    Raises:
        ValueError: on the RL path, and for a model whose head `patch_head` refuses.
    """
    if cfg.get("rl"):
        raise ValueError(f"rl: expected none (supervised fine-tuning), got {cfg.get('rl')!r}")
    from powerflow_fast.integrations.transformers import patch_head

    head = dict(cfg.get("powerflow_head") or {})
    patch_head(trainer.accelerator.unwrap_model(trainer.model), with_labels=True, **head)


def __getattr__(name: str) -> type:
    if name == "PowerFlowArgs":
        from pydantic import BaseModel

        class PowerFlowArgs(BaseModel):
            """Keys that this plugin adds to Axolotl's configuration."""

            powerflow_head: dict[str, Any] | None = None

        return PowerFlowArgs
    if name != "PowerFlowPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axolotl.integrations.base import BasePlugin

    class PowerFlowPlugin(BasePlugin):
        """The two of Axolotl's hooks that the head needs."""

        def get_input_args(self):
            return f"{__name__}.PowerFlowArgs"

        def post_trainer_create(self, cfg, trainer):
            use_head(cfg, trainer)

    return PowerFlowPlugin
