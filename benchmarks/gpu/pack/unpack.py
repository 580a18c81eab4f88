"""Sets up on a machine what `make gpu-pack` packed: packages, and kernels that are compiled.

    . gpu-pack/activate        # in a shell: runs this file and takes what it prints

Needs nothing but Python and, for the kernels, Triton; no network. Unpacks into the folder
POWERFLOW_PACK (default: powerflow-pack in the folder for temporary files) once; a second call finds
it there. Prints lines for the shell on standard output, and everything else on standard error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

PACKAGES, KERNELS, MANIFEST = "packages.tar.xz", "kernels.tar.xz", "manifest.json"
# quack takes functions from a folder of this name for another package's, and no others.
SITE = "site-packages"
KEY, LAUNCHERS = "key", "launchers"  # within the kernels' archive; launches.py fills them
# Kernels without their source lines: less than half the size. Triton's keys say so, too, hence both
# the compiling and the looking up have it set.
COMPILED_WITH = {"TRITON_DISABLE_LINE_INFO": "1"}


def main() -> int:
    pack = Path(__file__).resolve().parent
    default = Path(tempfile.gettempdir()) / "powerflow-pack"
    target = Path(os.environ.get("POWERFLOW_PACK", default)).resolve()
    try:
        manifest = json.loads((pack / MANIFEST).read_text())
        refuse_other_pythons(manifest)
        began = time.monotonic()
        if set_up(pack, target, manifest):
            say(f"unpacked into {target} in {time.monotonic() - began:.0f} s")
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        say(f"{type(error).__name__}: {error}")
        return 2
    print("\n".join(exports(target, os.environ.get("PYTHONPATH", ""))))
    return 0


def say(text: str) -> None:
    print(f"gpu-pack: {text}", file=sys.stderr)


def refuse_other_pythons(manifest: dict) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != manifest["python"]:
        raise ValueError(
            f"the packages are for Python {manifest['python']}, this is {here} ({sys.executable}); "
            "set PYTHON to another"
        )


def set_up(pack: Path, target: Path, manifest: dict) -> bool:
    """Whether anything was to be done: not where this very pack lies unpacked already."""
    done = target / MANIFEST
    if done.exists() and json.loads(done.read_text()) == manifest:
        return False
    for name, expected in manifest["sha256"].items():
        if digest(pack / name) != expected:
            raise ValueError(f"{pack / name} is not what was packed; copy the folder again")
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    for name, folder in ((PACKAGES, SITE), (KERNELS, "kernels")):
        with tarfile.open(pack / name) as archive:
            archive.extractall(partial / folder, filter="data")
    say_what_is_missing(partial / SITE, manifest["expected"])
    install_kernels(partial / "kernels", target / "triton", partial / "triton", manifest["triton"])
    shutil.rmtree(partial / "kernels")
    (partial / MANIFEST).write_text(json.dumps(manifest))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return True


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say_what_is_missing(site: Path, expected: list[str]) -> None:
    """Packages that the machine should have brought: peers that need them will be skipped."""
    folders = [str(site), *sys.path]
    here = {normal(d.metadata["Name"] or "") for d in distributions(path=folders)}
    if missing := sorted(set(expected) - here):
        say(f"not installed here, so a peer that needs it is skipped: {', '.join(missing)}")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def install_kernels(packed: Path, cache: Path, folder: Path, version: str) -> None:
    """Fills `folder`, which will be renamed to `cache`, as Triton would have left it there.

    A cache entry's name is the hash of a key that begins with a hash of Triton's own files, among
    them a library that differs between versions of Python: so entries are named here.
    """
    folder.mkdir(parents=True)
    try:
        import triton
        from triton.runtime.cache import _base32, triton_key
    except ImportError:
        return say("no Triton here: its kernels stay packed")
    if triton.__version__ != version:
        return say(
            f"the kernels were compiled by Triton {version}, here is {triton.__version__}: "
            "they will be compiled anew"
        )
    own = triton_key()
    entries = [path.parent for path in packed.glob(f"*/{KEY}")]
    for entry in entries:
        key = hashlib.sha256((own + (entry / KEY).read_text()).encode()).hexdigest()
        name = _base32(key)
        (folder / name).mkdir()
        files = [path for path in entry.iterdir() if path.name != KEY]
        for path in files:
            shutil.move(path, folder / name / path.name)
        (metadata,) = [path.name for path in files if path.suffix == ".json"]
        described = json.loads((folder / name / metadata).read_text()) | {"hash": key}
        (folder / name / metadata).write_text(json.dumps(described))
        group = {"child_paths": {path.name: str(cache / name / path.name) for path in files}}
        (folder / name / f"__grp__{metadata}").write_text(json.dumps(group))
    launchers = compile_launchers(sorted((packed / LAUNCHERS).glob("*.c")), folder)
    say(f"{len(entries)} compiled kernels, {launchers} launchers")


def compile_launchers(sources: list[Path], cache: Path) -> int:
    """The C functions that start kernels, by this machine's compiler, side by side; how many."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    try:
        with ProcessPoolExecutor() as pool:
            return sum(pool.map(compile_launcher, [None, *sources]))
    except Exception as error:  # no driver, no compiler: Triton says so again when it needs them
        say(f"launchers are compiled when they are first used ({error})")
        return 0


def compile_launcher(source: Path | None) -> int:
    """Triton's own module with None."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    if source is None:
        driver.CudaUtils()
        return 0
    compile_module_from_src(
        src=source.read_text(),
        name=source.stem.partition("-")[2],
        library_dirs=driver.library_dirs(),
        include_dirs=driver.include_dirs,
        libraries=driver.libraries,
    )
    return 1


def exports(target: Path, path: str) -> list[str]:
    """For the shell: where Python finds the packages, and Triton its cache."""
    site = target / SITE
    # Put first by hand: .pth files are not read in a folder of PYTHONPATH.
    added = [str(site), str(site / "nvidia_cutlass_dsl" / "dsl_packages")]
    rest = [folder for folder in path.split(os.pathsep) if folder and folder not in added]
    whole = os.pathsep.join([*added, *rest])
    return [
        f"export PYTHONPATH={shlex.quote(whole)}",
        f"export TRITON_CACHE_DIR={shlex.quote(str(target / 'triton'))}",
        *(f"export {name}={value}" for name, value in COMPILED_WITH.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
