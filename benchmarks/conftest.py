"""`pytest benchmarks/`: options, the order of cases, and rows for the results file.

    pytest benchmarks/ --groups tb-frozen,forward --peers powerflow-fast,"naive PyTorch"
    pytest benchmarks/ --results runs/bench --budget 450

The end shows the tables of the pages. pytest-benchmark's own options (--benchmark-json,
--benchmark-compare, ...) work as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import head_tables, results_file, whole_step_tables
from benchmarks.markdown import plain
from benchmarks.method import Ceilings, Clock, ceilings
from benchmarks.names import listed, pick
from benchmarks.peers import PEERS
from benchmarks.second_lap import SecondLap

pytest_plugins = ["benchmarks.budget"]
# In order of importance; a file without a group of its own is the group its name says.
ORDER = ("tb-frozen", "certified", "forward", "scaling", "training-step", "pair", "tb-trained")

# Minutes each: only where --groups or the command line names them.
ON_REQUEST = ("busy", "grpo-step", "whole-step")


def pytest_addoption(parser: pytest.Parser) -> None:
    groups = f"of: {listed(ORDER + ON_REQUEST)}; default: {listed(ORDER)}"
    several = "separated by commas, or the option several times"
    parser.addoption("--groups", action="append", help=f"{groups}; {several}")
    parser.addoption("--peers", action="append", help=f"of: {listed(PEERS)}; {several}")
    parser.addoption("--results", type=Path, help="folder to write the results file to")
    parser.addoption("--tiny", action="store_true", help="tiny sizes: walk the code, time nothing")
    parser.addoption("--case-seconds", type=float, help="seconds of rounds per case")


def pytest_configure(config: pytest.Config) -> None:
    _chosen(config, "groups", ORDER, ON_REQUEST)
    _chosen(config, "peers", tuple(PEERS))
    if folder := config.getoption("results"):
        try:  # before minutes of measuring, not after
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            said = f"--results: expected a folder, got {folder} ({error.strerror})"
            raise pytest.UsageError(said) from None
    if config.getoption("tiny"):
        config.option.benchmark_quiet = True  # its tables hold nothing but times
    config.stash[SESSION] = Session(config)


def _chosen(
    config: pytest.Config, option: str, default: tuple[str, ...], more: tuple[str, ...] = ()
) -> set[str]:
    given = config.getoption(option)
    try:
        return set(default) if given is None else pick(given, default + more)
    except ValueError as error:
        raise pytest.UsageError(f"--{option}: {error}") from None


def group_of(item: pytest.Item) -> str:
    marker = item.get_closest_marker("benchmark")
    of_file = _group_of_file(item.path)
    return of_file if marker is None else marker.kwargs.get("group", of_file)


def _group_of_file(path: Path) -> str:
    return path.stem.removeprefix("test_").replace("_", "-")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chosen groups and peers, most important first, timed by the device's own clock."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    groups = _chosen(config, "groups", ORDER, ON_REQUEST)
    if config.getoption("groups") is None:  # pytest benchmarks/test_grpo_step.py
        groups |= {_group_of_file(Path(argument.partition("::")[0])) for argument in config.args}
    peers = {None, *_chosen(config, "peers", tuple(PEERS))}
    kept = [item for item in ours if group_of(item) in groups and peer_of(item) in peers]
    kept.sort(key=lambda item: (ORDER + ON_REQUEST).index(group_of(item)))
    timer = Clock(config.stash[SESSION].device).now
    for item in kept:  # pytest-benchmark reads one marker alone
        options = {"group": group_of(item), "timer": timer}
        item.add_marker(pytest.mark.benchmark(**options), append=False)
    if config.getoption("peers") is not None:
        absent = peers - {peer_of(item) for item in kept} - {None}
        if absent:
            note = f"\nNo case in these groups on this device for: {listed(sorted(absent))}."
            config.stash[SESSION].notes.append(note)
    left = set(ours) - set(kept)
    config.hook.pytest_deselected(items=[item for item in ours if item in left])
    items[:] = [*kept, *(item for item in items if item not in set(ours))]


def peer_of(item: pytest.Item) -> str | None:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters["case"].peer if "case" in parameters else parameters.get("peer")


class Session:
    """What one run of the benchmarks shares, and what it leaves."""

    def __init__(self, config: pytest.Config) -> None:
        self.tiny = config.getoption("tiny")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        default = 0.01 if self.tiny else 2.0
        self.case_seconds = config.getoption("case_seconds") or default
        self.rows: list[dict] = []
        self.steps: dict = {"rows": [], "unavailable": {}}  # of whole trainers
        self.busy: list[dict] = []  # a step beside other programs
        self.notes: list[str] = []  # lines for the end of the run
        self.unavailable: dict[str, str] = {}  # "group: peer" -> reason
        self.best_setting: dict[tuple, str] = {}
        self.cached: dict[tuple, object] = {}  # inputs of the case before: peers share them
        self.lap = SecondLap(Clock(self.device), self.case_seconds / 2)
        self.first_loss: dict[str, float] = {}  # of each training-step model
        self.ceilings: dict[torch.dtype, Ceilings] = {}
        # Peers compile anew for each shape and type, on purpose; 8 would do for one training run.
        torch._dynamo.config.recompile_limit = 64

    def measure_ceilings(self, dtype: torch.dtype) -> None:
        """Between groups: the best of a run is its ceiling, whatever else the machine does."""
        found = ceilings(self.device, dtype, tiny=self.tiny)
        self.ceilings[dtype] = found.best(self.ceilings.get(dtype, found))

    def finish(self) -> None:
        """The last second lap; every row over its floor, now that the ceilings are known."""
        self.lap.run()
        for row in self.rows:
            if "floor_flops" in row:
                ceiling = self.ceilings[getattr(torch, row["dtype"])]
                floor, set_by = ceiling.seconds(row["floor_flops"], row["floor_bytes"])
                row |= {"floor_seconds": floor, "floor_set_by": set_by}
                row["ratio_to_floor"] = row["seconds"] / floor

    def skip(self, group: str, peer: str, reason: str) -> None:
        """Skip the test and keep the reason for the results file."""
        self.unavailable[f"{group}: {peer}"] = reason
        pytest.skip(f"{peer}: {reason}")

    def content(self, dropped: list[str]) -> dict:
        reached = {str(d).removeprefix("torch."): vars(c) for d, c in self.ceilings.items()}
        return {
            "ceilings": reached,
            "rows": self.rows,
            "unavailable": self.unavailable,
            "dropped": dropped,
        }

    def report(self, folder: Path | None, dropped: list[str]) -> Iterator[str]:
        """Lines for the end of a run: its tables, and where the results are."""
        measured = {"tiny" if self.tiny else "head": self.content(dropped)} if self.rows else {}
        if self.steps["rows"] and not self.tiny:
            measured["whole-step"] = self.steps | {"dropped": dropped}
        if self.busy:
            measured["busy"] = {"rows": self.busy}
        for name, content in measured.items():
            for block in _tables(name, results_file.complete(content)):
                yield f"\n{plain(block)}"
        yield from self.notes
        if folder is None:
            return
        for name, content in measured.items():
            yield f"\nWritten to {results_file.write(name, content, folder)}"
        if measured.keys() - {"tiny"} and folder.resolve() != results_file.FOLDER:
            yield "To contribute it: copy it to benchmarks/results/ and run `make report`."
        if not measured:
            yield f"\nNothing was measured, nothing written to {folder}"


def _tables(measurement: str, results: dict) -> list[str]:
    if measurement == "whole-step":
        return whole_step_tables.tables([results])
    if measurement == "busy":
        return [results_file.source(results, short=True), *head_tables.busy_tables(results)]
    return head_tables.of_run(measurement, results)


SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def device(session: Session) -> torch.device:
    return session.device


@pytest.fixture
def record(session: Session):
    """Call with a row (a dict) to have it written to the results file."""
    return session.rows.append


@pytest.hookimpl(wrapper=True, tryfirst=True)  # pytest-benchmark writes its JSON in here
def pytest_sessionfinish(session: pytest.Session):
    config, ours = session.config, session.config.stash[SESSION]
    ours.finish()
    result = yield
    if not config.option.collectonly:
        dropped = config.pluginmanager.get_plugin("budget").dropped
        for line in ours.report(config.getoption("results"), dropped):
            print(line)
    return result
