"""Makes the repository's `kernels/` folder importable as `powerflow_fast.kernels`.

The folder has no `__init__.py`: a top-level package `kernels` would shadow Hugging Face's package
of that name for anyone who runs Python from the repository root. Installed, the kernels lie in
`powerflow_fast/kernels/`; in a checkout they lie beside this package.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_candidates = (_here / "kernels", _here.parent / "kernels")
__path__ = [str(next(folder for folder in _candidates if folder.is_dir()))]
