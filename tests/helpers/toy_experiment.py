"""An experiment as `benchmarks.evidence` wants it, whose second stage depends on its first."""

from pathlib import Path

from benchmarks.evidence import Run

TITLE = "Toy"
FOLDER = Path()  # set by the test; travels to the workers in a run's options


def plan(done):
    folder = str(FOLDER)
    search = [Run(f"search {x}", {"x": x, "folder": folder}) for x in (1, 2, 3)]
    if not all(run.name in done for run in search):
        return search
    best = max(search, key=lambda run: done[run.name]["score"]).options["x"]
    return [*search, Run("final", {"x": 10 * best, "folder": folder})]


def run(x, folder):
    with open(Path(folder) / "executed", "a") as log:
        log.write(f"{x}\n")
    if (Path(folder) / f"fail {x}").exists():
        raise RuntimeError(f"run {x} failed")
    return {"score": -abs(x - 2)}


def summarise(done):
    return {"final": done["final"]["score"]}


def draw(figure, results):
    figure.subplots().plot([0, results["summary"]["final"]])


def tables(results):
    return f"| final |\n| --- |\n| {results['summary']['final']} |"
