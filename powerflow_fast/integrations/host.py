"""The package that a door opens into: its version, and its functions where it has imported them."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def check_version(
    package: str, tested: tuple[str, ...], if_missing: str = "", if_other: str = ""
) -> None:
    """ValueError, which ends with the advice given, unless a version of `tested` is installed."""
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ValueError(f"{package}: not installed{if_missing}") from None
    if ".".join(found.split(".")[:2]) not in tested:
        raise ValueError(f"{package}: tested with {', '.join(tested)}, found {found}{if_other}")


def replace_function(package: str, name: str, old: Any, new: Any) -> None:
    """In every module of `package` where `name` is `old`; later imports get `new` from these."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(f"{package}.") and vars(module).get(name) is old:
            setattr(module, name, new)
