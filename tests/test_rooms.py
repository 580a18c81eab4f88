"""The rooms of the package: which may import which, and how large their parts may be."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import powerflow_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "powerflow_fast"
# A room is a folder; the door is what lies in the package itself. Each may import from itself.
MAY_IMPORT = {
    "kernels": [],
    "data": [],
    "logprobs": ["kernels"],
    "door": ["logprobs", "kernels"],
    "models": ["door", "logprobs"],
    "planning": ["models", "logprobs", "kernels"],
    "evaluation": ["models", "data", "door", "logprobs"],
    "training": ["evaluation", "models", "data", "door", "logprobs"],
    "integrations": ["training", "models", "data", "door", "logprobs"],
}
MAY_IMPORT["cli"] = list(MAY_IMPORT)
EXEMPT = ("powerflow_fast", "powerflow_fast.kernels")  # the lazy door, and the folder's path
FILES_OF_THE_DOOR = 10
FILE, FUNCTION, KERNEL = 400, 60, 120  # lines; of a public function without its docstring
PARAMETERS = 8


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        inside = path.relative_to(ROOT).with_suffix("").parts
        if inside[0] == "kernels":
            inside = ("powerflow_fast", *inside)
        found[".".join(inside).removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(module: str) -> str:
    """`powerflow_fast.loss` is in the door; `powerflow_fast.models.shapes` is in models."""
    if module == "powerflow_fast.__main__":
        return "cli"
    name = module.removeprefix("powerflow_fast.").split(".")[0]
    return name if name in MAY_IMPORT else "door"


@cache
def imported(module: str) -> dict[str, int]:
    """Our modules that it imports, also within functions or for types alone -> the line."""
    found = {}
    for node in ast.walk(tree(modules()[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(module, node.lineno)}: expected an absolute import"
            names = [home(node.module, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name in modules() and name not in (module, *EXEMPT):
                found.setdefault(name, node.lineno)
    return found


def home(module: str, name: str) -> str:
    """The module that `from module import name` takes the name from."""
    if module == "powerflow_fast":
        name = powerflow_fast._HOME.get(name, name)
    inner = f"{module}.{name}"
    return inner if inner in modules() else module


def where(module: str, line: int) -> str:
    return f"{modules()[module].relative_to(ROOT)}:{line}"


def functions(path: Path) -> Iterator[tuple[list[str], ast.FunctionDef]]:
    """Each function with the names that lead to it: ["LATBTrainer", "__init__"]."""
    todo = [([], tree(path))]
    while todo:
        names, parent = todo.pop()
        for node in ast.iter_child_nodes(parent):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            inner = [*names, node.name] if function or isinstance(node, ast.ClassDef) else names
            todo.append((inner, node))
            if function:
                yield inner, node


def report(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(sorted(found)), pytrace=False)


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in PACKAGE.glob("*/*.py")} | {"kernels", "door"}
    assert rooms == set(MAY_IMPORT)


def test_the_map_for_contributors_is_this_table():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| \d \| `?(\w+)\b.* \| ([^|]+) \|$", text, re.M)
    shown = {
        name: "every other room" if name == "cli" else ", ".join(may) or "no room"
        for name, may in MAY_IMPORT.items()
    }
    assert dict(rows) == shown


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_what_its_floor_may(name):
    allowed = {name, *MAY_IMPORT[name]}
    report(
        [
            f"{where(module, line)}: {name} imports {other}, expected one of {sorted(allowed)}"
            for module in modules()
            if module not in EXEMPT and room(module) == name
            for other, line in imported(module).items()
            if room(other) not in allowed
        ]
    )


def test_no_modules_import_each_other():
    arrows = {module: dict(imported(module)) for module in modules() if module not in EXEMPT}
    found = []
    while circle := first_circle(arrows):
        for module, other in zip(circle, circle[1:], strict=False):
            found.append(f"{where(module, arrows[module][other])} imports {other}, in a circle")
        del arrows[circle[0]][circle[1]]  # so that the next one shows
    report(found)


def first_circle(arrows: dict[str, dict[str, int]]) -> list[str]:
    """Modules that import each the next, the last one being the first; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_the_door_is_small():
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(files) <= FILES_OF_THE_DOOR, (
        f"powerflow_fast/: {len(files)} files, expected at most {FILES_OF_THE_DOOR}: {files}"
    )


def test_files_and_functions_are_short():
    found = []
    for module, path in modules().items():
        lines = len(path.read_text().splitlines())
        if lines > FILE:
            found.append(f"{where(module, 1)}: {lines} lines, expected at most {FILE}")
        for names, function in functions(path):
            most = KERNEL if is_kernel(function) else FUNCTION
            if (lines := lines_of(function, without_docstring=is_public(module, names))) > most:
                label = f"{where(module, function.lineno)}: {'.'.join(names)}"
                found.append(f"{label} has {lines} lines, expected at most {most}")
    report(found)


def is_kernel(function: ast.FunctionDef) -> bool:
    return "triton.jit" in map(ast.unparse, function.decorator_list)


def lines_of(function: ast.FunctionDef, without_docstring: bool) -> int:
    """From `def` to its end."""
    lines = function.end_lineno - function.lineno + 1
    if without_docstring and ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_functions_within_take_few_parameters():
    """Users name the many options of a public function; others pass a tuple or a dataclass."""
    found = []
    for module, path in modules().items():
        for names, function in functions(path):
            count = len(parameters(function))
            if count > PARAMETERS and room(module) != "kernels" and not is_public(module, names):
                label = f"{where(module, function.lineno)}: {'.'.join(names)}"
                found.append(f"{label} has {count} parameters, expected at most {PARAMETERS}")
    report(found)


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [one.arg for one in every if one and one.arg not in ("self", "cls", "ctx")]


def is_public(module: str, names: list[str]) -> bool:
    """Exported by the package, or without an underscore in a module that users import."""
    if powerflow_fast._HOME.get(names[0]) == module.removeprefix("powerflow_fast."):
        return True
    hidden = [name for name in names if name.startswith("_") and not name.endswith("__")]
    return room(module) in ("door", "integrations") and not hidden
