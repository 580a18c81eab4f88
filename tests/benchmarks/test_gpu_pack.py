"""The folder for a GPU machine without a network: what is packed, and how it unpacks."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import triton

from benchmarks.gpu.pack import __main__ as command
from benchmarks.gpu.pack import unpack, wheels

ROOT = Path(__file__).resolve().parents[2]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
# In processes of their own: here kernels are interpreted.
FILL = """
import os, sys
from pathlib import Path
from benchmarks.gpu.pack import launches
from benchmarks.kernels import absent

cache = Path(os.environ["TRITON_CACHE_DIR"])
launches.note_keys(cache)
(cache / launches.LAUNCHERS).mkdir()
absent.use("sm_90", lambda *_: None)
absent.launch_residual(12, 2)
print(launches.collect(cache, Path(sys.argv[1])), *launches.GROUPS)
"""
LAUNCH = """
from benchmarks.kernels import absent
from triton import knobs

hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
absent.use("sm_90", lambda *_: None)
absent.launch_residual(12, 2)
print(hits.count(True), hits.count(False))
"""
ALL = """
from benchmarks.gpu.pack import launches
from benchmarks.kernels import absent
from triton import knobs

launched = []
knobs.runtime.jit_cache_hook = lambda **_: launched.append(1) or True  # not compiled
absent.use("sm_90")
for launch in launches.GROUPS.values():
    before = len(launched)
    launch()
    print(len(launched) - before)
"""


def run(code: str, *arguments, path: str = "", **environment) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([path, str(ROOT)]), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def make_wheel(folder: Path, wheel: wheels.Wheel, needs=(), files=("code.py",)) -> Path:
    stem = f"{wheel.name.replace('-', '_')}-{wheel.version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = [f"Name: {wheel.name}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        for name in files:
            archive.writestr(f"{wheel.name.replace('-', '_')}/{name}", name)
    return path


def write_pack(to: Path, kernels: Path | None = None, **changes) -> Path:
    """A small pack for this very Python and Triton."""
    build = to.with_name(f"{to.name}.build")
    (build / "site" / "peer").mkdir(parents=True)
    (build / "site" / "peer" / "__init__.py").write_text("here = True\n")
    if kernels is None:
        kernels = build / "kernels"
        (kernels / unpack.LAUNCHERS).mkdir(parents=True)
        (kernels / unpack.LAUNCHERS / "0-launcher.c").write_text("")
    archives = {unpack.PACKAGES: build / "packages", unpack.KERNELS: build / "compiled"}
    wheels.compress(build / "site", archives[unpack.PACKAGES])
    wheels.compress(kernels, archives[unpack.KERNELS])
    command.write(to, archives)
    manifest = json.loads((to / unpack.MANIFEST).read_text())
    manifest |= {"python": HERE, "triton": triton.__version__, "expected": ["pytest"]} | changes
    (to / unpack.MANIFEST).write_text(json.dumps(manifest))
    return to


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    monkeypatch.setattr(wheels, "WINDOW", 1 << 20)


def activate(pack: Path, target: Path, then: str = "true") -> subprocess.CompletedProcess:
    line = f". {pack}/activate && {then}"
    environment = os.environ | {"POWERFLOW_PACK": str(target), "PYTHON": sys.executable}
    environment["PYTHONPATH"] = "/already/there"
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)


def test_kernels_are_found_by_another_build_of_triton(tmp_path):
    said = run(FILL, tmp_path / "kernels", TRITON_CACHE_DIR=str(tmp_path / "cache")).split()
    assert int(said[0]) > 3 and set(said[1:]) == set(command.GROUPS)
    # Another build: the same files, all but one, in another place.
    other = tmp_path / "other"
    here = Path(find_spec("triton").submodule_search_locations[0])
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(here, other / "triton", copy_function=os.symlink, ignore=ignored)
    changed = other / "triton" / "compiler" / "errors.py"
    text = changed.read_text()
    changed.unlink()
    changed.write_text(text + "# of another build\n")
    cache = str(tmp_path / "empty")
    assert run(LAUNCH, path=str(other), TRITON_CACHE_DIR=cache).split() == ["0", said[0]]

    pack, target = write_pack(tmp_path / "pack", tmp_path / "kernels"), tmp_path / "target"
    environment = {"PYTHONPATH": str(other), "POWERFLOW_PACK": str(target)}
    program = [sys.executable, pack / "unpack.py"]
    subprocess.run(program, env=os.environ | environment, check=True, capture_output=True)
    cache = str(target / "triton")
    assert run(LAUNCH, path=str(other), TRITON_CACHE_DIR=cache).split() == [said[0], "0"]
    assert not list(Path(cache).rglob("*.ptx")), "only what a launch needs travels"


def test_every_group_is_launched_to_its_end():
    numbers = run(ALL).split()
    assert len(numbers) == len(command.GROUPS) and min(map(int, numbers)) > 100


def test_one_line_sets_a_shell_up_and_does_it_once(tmp_path):
    pack, target = write_pack(tmp_path / "a pack"), tmp_path / "target"
    pack = pack.rename(tmp_path / "pack")
    show = 'echo "$PYTHONPATH" "$TRITON_CACHE_DIR" $TRITON_DISABLE_LINE_INFO; '
    show += 'python3 -c "import peer; print(peer.here)"'
    first = activate(pack, target, f". {pack}/activate; {show}")
    paths = f"{target}/{unpack.SITE}:{target}/{unpack.SITE}/nvidia_cutlass_dsl/dsl_packages"
    assert first.stdout.splitlines() == [f"{paths}:/already/there {target}/triton 1", "True"]
    assert first.stderr.count("unpacked into") == 1, first.stderr
    assert "unpacked" not in activate(pack, target).stderr


def test_a_new_pack_takes_the_old_ones_place(tmp_path):
    target = tmp_path / "target"
    assert activate(write_pack(tmp_path / "old"), target).returncode == 0
    (target / unpack.SITE / "peer" / "old.py").write_text("")
    assert activate(write_pack(tmp_path / "new", commit="later"), target).returncode == 0
    assert not (target / unpack.SITE / "peer" / "old.py").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"python": "3.1"}, f"the packages are for Python 3.1, this is {HERE}"),
        ({"sha256": {unpack.KERNELS: "0"}}, "kernels.tar.xz is not what was packed"),
    ],
)
def test_a_pack_that_does_not_fit_is_refused(tmp_path, changes, said):
    pack = write_pack(tmp_path / "pack", **changes)
    done = activate(pack, tmp_path / "target", "echo went on")
    assert done.returncode != 0 and "went on" not in done.stdout and said in done.stderr
    assert not (tmp_path / "target").exists()


def test_a_folder_without_its_archives_is_named(tmp_path):
    pack = write_pack(tmp_path / "pack")
    (pack / unpack.PACKAGES).unlink()
    done = activate(pack, tmp_path / "target")
    assert done.returncode != 0 and unpack.PACKAGES in done.stderr


def test_another_triton_compiles_anew_and_missing_packages_are_named(tmp_path):
    pack = write_pack(tmp_path / "pack", triton="3.0.0", expected=["pytest", "no-such-thing"])
    done = activate(pack, tmp_path / "target", "ls $TRITON_CACHE_DIR")
    assert (done.returncode, done.stdout) == (0, "")
    assert "compiled by Triton 3.0.0" in done.stderr
    assert "a peer that needs it is skipped: no-such-thing" in done.stderr


def test_what_is_kept_of_a_wheel():
    bitsandbytes, unsloth = (
        next(w for w in wheels.WHEELS if w.name == name) for name in ("bitsandbytes", "unsloth-zoo")
    )
    kept = ["bitsandbytes/nn/modules.py", "bitsandbytes/libbitsandbytes_cuda130.so"]
    others = ["bitsandbytes/libbitsandbytes_cuda128.so", "bitsandbytes/libbitsandbytes_rocm72.so"]
    assert [bitsandbytes.keeps(name) for name in kept + others] == [True, True, False, False]
    assert unsloth.keeps("unsloth_zoo/fused_losses/fused_linear.py")
    assert unsloth.keeps(
        f"unsloth_zoo-{unsloth.version}.dist-info/METADATA"
    )  # its version is a result
    assert not unsloth.keeps("unsloth_zoo/__init__.py")


def test_every_need_is_packed_or_expected(tmp_path, monkeypatch):
    both = [wheels.Wheel("a-peer", "1.0"), wheels.Wheel("b", "2.0")]
    monkeypatch.setattr(wheels, "WHEELS", both)
    needs = ["torch>=2.0", "B", "Left_Out<3", 'for-tests; extra == "test"']
    files = [make_wheel(tmp_path, both[0], needs), make_wheel(tmp_path, both[1], ["a.peer"])]
    assert wheels.unmet(files) == ["a-peer needs left-out"]


def test_wheels_become_one_folder_and_always_the_same_archive(tmp_path, monkeypatch):
    wheel = replace(wheels.Wheel("peer", "1.0"), drop=("*/large.so",))
    monkeypatch.setattr(wheels, "WHEELS", [wheel])
    file = make_wheel(tmp_path, wheel, files=("code.py", "large.so", "tests/test_code.py"))
    digests = set()
    for name in ("one", "two"):
        wheels.unpack([file], tmp_path / name)
        wheels.compress(tmp_path / name, tmp_path / f"{name}.tar.xz")
        digests.add(wheels.digest(tmp_path / f"{name}.tar.xz"))
    site = tmp_path / "one"
    found = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert found == {"peer-1.0.dist-info/METADATA", "peer/code.py"}
    assert len(digests) == 1


def test_too_large_a_pack_fails(tmp_path, capsys):
    (tmp_path / "data").write_bytes(bytes(3 << 19))
    assert command.within(tmp_path, 1.6)
    assert not command.within(tmp_path, 1.4)
    assert "1.5 MiB" in capsys.readouterr().out


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert command.main(["--to", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.tex").exists() and str(tmp_path) in capsys.readouterr().out
