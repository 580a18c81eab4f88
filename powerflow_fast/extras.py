"""Which extra of this package brings a module that is missing."""

from __future__ import annotations

EXTRAS = {
    "train": "transformers trl peft accelerate datasets yaml matplotlib rich pandas tqdm",
    "demo": "gguf sentencepiece",
}


def needs(error: ImportError) -> str:
    """What to install, where an import failed."""
    module = (getattr(error, "name", None) or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules.split():
            return (
                f"{module} is not installed: pip install 'powerflow-fast[{extra}]' "
                f"(in a clone: pip install '.[{extra}]')"
            )
    return str(error)
