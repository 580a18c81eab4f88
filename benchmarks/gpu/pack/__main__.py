"""`python -m benchmarks.gpu.pack`: fills one folder with what a bare GPU machine lacks.

    python -m benchmarks.gpu.pack [--to gpu-pack] [--limit-mib 60]

Wheels of the peers, cut down to what runs there, and every kernel that the staged benchmark
launches, compiled for Hopper by the Triton of that machine. On it, in a copy of this repository:

    . gpu-pack/activate && make bench-gpu ARGS="--out FOLDER"

Takes 6 minutes on two cores, nearly all of it compression. What lies in build/gpu-pack from the
last time is used again: the packages until wheels.py changes, kernels until their code does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import results_file
from benchmarks.gpu.__main__ import positive
from benchmarks.gpu.pack import unpack, wheels

WORK = Path("build") / "gpu-pack"
ROOT = Path(__file__).resolve().parents[3]
GROUPS = ("heads", "correctness", "candidates", "certified", "timed")  # of launches.py
MIB = 1 << 20
ACTIVATE = """\
# Peers and compiled kernels for this shell:  . gpu-pack/activate
powerflow_pack=$(dirname "${BASH_SOURCE:-gpu-pack/activate}")
powerflow_pack=$("${PYTHON:-python3}" "$powerflow_pack/unpack.py") && eval "$powerflow_pack"
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.pack", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--to", type=Path, default=Path("gpu-pack"), metavar="FOLDER")
    parser.add_argument("--limit-mib", type=positive, default=60.0, help="the most it may weigh")
    args = parser.parse_args(argv)
    if args.to.exists() and not replaceable(args.to):
        print(f"--to: {args.to} is no folder that this command filled; name another")
        return 2
    work = WORK.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(2) as pool:  # the compressor and the compiler have a core each
            packages = pool.submit(pack_packages, work)
            kernels = pool.submit(pack_kernels, work)
            archives = {unpack.PACKAGES: packages.result(), unpack.KERNELS: kernels.result()}
    except subprocess.CalledProcessError as error:
        print(f"exit status {error.returncode}: {' '.join(map(str, error.cmd))}")
        return 1
    write(args.to, archives)
    return 0 if within(args.to, args.limit_mib) else 1


def replaceable(folder: Path) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / unpack.MANIFEST).exists())


def pack_packages(work: Path) -> Path:
    archive = work / f"packages-{wheels.list_hash()}.tar.xz"
    if not archive.exists():
        (work / "wheels").mkdir(exist_ok=True)
        files = wheels.download(work / "wheels")
        if missing := wheels.unmet(files):
            raise SystemExit(f"not packed, and not expected there: {', '.join(missing)}")
        site = work / "site"
        shutil.rmtree(site, ignore_errors=True)
        wheels.unpack(files, site)
        print(f"{len(files)} packages: compressing takes about 5 minutes", flush=True)
        wheels.compress(site, archive)
    return archive


def pack_kernels(work: Path) -> Path:
    """Compiled in processes whose Triton is the machine's, not this environment's."""
    triton = work / wheels.TRITON
    if not triton.exists():
        partial = work / "triton.partial"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", partial, wheels.TRITON], check=True)
        partial.rename(triton)
    cache, folder = work / "cache", work / "kernels"
    shutil.rmtree(cache / "keys", ignore_errors=True)  # what was launched, this time
    shutil.rmtree(cache / "launchers", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | unpack.COMPILED_WITH
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(triton), str(ROOT)]),
    }
    module = [sys.executable, "-m", "benchmarks.gpu.pack.launches"]
    for group in GROUPS:
        print(f"compiling: {group}", flush=True)
        subprocess.run([*module, "--group", group], env=environment, cwd=ROOT, check=True)
    subprocess.run([*module, "--collect", folder], env=environment, cwd=ROOT, check=True)
    archive = work / unpack.KERNELS
    wheels.compress(folder, archive)
    return archive


def write(to: Path, archives: dict[str, Path]) -> None:
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name, path in archives.items():
        shutil.copy(path, to / name)
    shutil.copy(unpack.__file__, to)
    (to / "activate").write_text(ACTIVATE)
    manifest = {
        "python": wheels.PYTHON,
        "triton": wheels.TRITON.partition("==")[2],
        "commit": results_file.commit(),
        "packages": [wheel.requirement for wheel in wheels.WHEELS],
        "expected": sorted(wheels.EXPECTED),
        "sha256": {name: wheels.digest(to / name) for name in archives},
    }
    (to / unpack.MANIFEST).write_text(json.dumps(manifest, indent=1))


def within(folder: Path, limit: float) -> bool:
    sizes = {path.name: path.stat().st_size / MIB for path in folder.iterdir()}
    listed = ", ".join(f"{name} {size:.2f}" for name, size in sorted(sizes.items()))
    total = sum(sizes.values())
    print(f"{folder}: {total:.1f} MiB ({listed})")
    if total > limit:
        print(f"over --limit-mib {limit:g}: wheels.py says what is packed")
    return total <= limit


if __name__ == "__main__":
    sys.exit(main())
