"""PowerFlow's length-aware Trajectory-Balance loss, fused with the language-model head.

The public names are `linear_logprobs`, `paired_linear_logprobs`, `tb_loss`, `fused_linear_tb_loss`,
`FusedLinearTBLoss`, `LogZHead`, `sample` and `shared_prompt_hidden_states`, and with the extra
`train` also `PowerFlowTrainer` and `PowerFlowConfig`. All are loaded on first use, so importing the
package imports nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "FusedLinearTBLoss",
    "LogZHead",
    "PowerFlowConfig",
    "PowerFlowTrainer",
    "TBOutput",
    "__version__",
    "fused_linear_tb_loss",
    "linear_logprobs",
    "paired_linear_logprobs",
    "sample",
    "shared_prompt_hidden_states",
    "tb_loss",
]

_HOME = {
    "linear_logprobs": "head",
    "paired_linear_logprobs": "head",
    "tb_loss": "loss",
    "fused_linear_tb_loss": "loss",
    "FusedLinearTBLoss": "loss",
    "TBOutput": "loss",
    "LogZHead": "log_z",
    "sample": "models.sampling",
    "shared_prompt_hidden_states": "models.shared_prompt",
    "PowerFlowTrainer": "training.trainer",
    "PowerFlowConfig": "training.config",
}
_EXTRAS = {  # modules that an extra of this package brings
    "train": "transformers trl peft accelerate datasets yaml matplotlib rich pandas tqdm",
    "demo": "gguf sentencepiece",
}
if TYPE_CHECKING:
    from powerflow_fast.head import linear_logprobs, paired_linear_logprobs
    from powerflow_fast.log_z import LogZHead
    from powerflow_fast.loss import FusedLinearTBLoss, TBOutput, fused_linear_tb_loss, tb_loss
    from powerflow_fast.models.sampling import sample
    from powerflow_fast.models.shared_prompt import shared_prompt_hidden_states
    from powerflow_fast.training.config import PowerFlowConfig
    from powerflow_fast.training.trainer import PowerFlowTrainer


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name}: {needs(error)}", name=error.name) from error
    globals()[name] = value
    return value


def needs(error: ImportError) -> str:
    """What to install, where an import failed."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in _EXTRAS.items():
        if module in modules.split():
            return (
                f"{module} is not installed: pip install 'powerflow-fast[{extra}]' "
                f"(in a clone: pip install '.[{extra}]')"
            )
    return str(error)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
