"""What a clone, a wheel and an environment without the extras must be able to do."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import powerflow_fast

ROOT = Path(__file__).parent.parent


def run(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run code in a fresh interpreter from `cwd`, as `python -c` does: with `cwd` on sys.path."""
    env = {**os.environ, "PYTHONPATH": "" if path is None else str(path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_hugging_face_kernels_stays_importable_from_the_repository_root():
    out = run(
        "import kernels, transformers, powerflow_fast.kernels as ours\n"
        "from transformers.models.llama.modeling_llama import LlamaModel\n"
        "print(kernels.get_kernel.__module__, list(ours.__path__)[0])"
    )
    module, path = out.split()
    assert module.startswith("kernels") and Path(path) == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_light_and_needs_no_triton():
    """cut-cross-entropy#41, #5: the fallback without Triton that needs Triton."""
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"  # import triton now raises ImportError
        "import powerflow_fast\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "from powerflow_fast import fused_linear_tb_loss, LogZHead\n"
        "x, w = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)\n"
        "t = torch.arange(4)\n"
        "out = fused_linear_tb_loss(x, w, t, x.detach(), log_z=0.0, alpha=2.0,\n"
        "                           cu_seqlens=torch.tensor([0, 2, 4]))\n"
        "out.loss.backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "assert 'transformers' not in sys.modules and 'trl' not in sys.modules\n"
    )


def test_public_names():
    assert set(powerflow_fast.__all__) == set(powerflow_fast._HOME) | {"__version__"}
    for name in powerflow_fast.__all__:
        assert getattr(powerflow_fast, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = powerflow_fast.nothing_here


def test_wheel_holds_the_kernels_and_no_top_level_package_of_that_name(tmp_path):
    source = tmp_path / "source"  # a copy, so that no stale build/ of the checkout gets in
    for folder in ("powerflow_fast", "kernels"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    tops = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"powerflow_fast"}

    def files(folder: Path) -> set[Path]:
        kinds = (".py", ".jsonl", ".typed")
        return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in kinds}

    kernels = {Path("kernels") / path for path in files(ROOT / "kernels")}
    assert files(site / "powerflow_fast") == files(ROOT / "powerflow_fast") | kernels
    out = run(
        "import powerflow_fast, powerflow_fast.kernels as k\n"
        "print(powerflow_fast.__file__, list(k.__path__)[0])",
        cwd=tmp_path,
        path=site,
    )
    package, kernels = out.split()
    assert Path(package).parent == site / "powerflow_fast"
    assert Path(kernels) == site / "powerflow_fast" / "kernels"
    [metadata] = site.glob("*.dist-info/METADATA")
    requires = [x for x in metadata.read_text().splitlines() if x.startswith("Requires-Dist")]
    core = [x.split(":")[1].strip().split(">")[0] for x in requires if "extra ==" not in x]
    assert core == ["numpy", "torch", "triton"]


def test_python_files_keep_the_house_rules():
    """Triton is imported in kernels/ alone, or inside a function."""
    for path in (ROOT / "powerflow_fast").rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not any(name.split(".")[0] == "triton" for name in names), path
