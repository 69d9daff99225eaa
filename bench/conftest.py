"""pytest's side of bench/: options, rows into pytest-benchmark's JSON, the table at the end, the gate."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import again, files, gate, presets, slowed, suites, table, timing
from bench.measure import Row, Session

SESSION = pytest.StashKey[Session]()
ROWS = pytest.StashKey[list[Row]]()
FACTS = pytest.StashKey[dict[str, Any]]()
OPTIONS = pytest.StashKey[dict[str, Any]]()
VERDICT = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "tiger_fast's benchmarks (bench/README.md)")

    def add(name: str, text: str, **keywords: Any) -> None:
        group.addoption(f"--{name}", dest=f"bench_{name.replace('-', '_')}", help=text, **keywords)

    add("preset", f"the shape: {', '.join(presets.PRESETS)} (default: smoke)", metavar="NAME", default="smoke")
    add("shape", "sizes that differ from the preset's, such as B=8,N=4096", metavar="B=..,N=..")
    add("dtype", f"of activations: {', '.join(presets.DTYPES)} (default: the preset's)", metavar="NAME")
    add("device", "cpu or cuda (default: the preset's, or cuda where there is a GPU)", metavar="NAME")
    add("backend", "ours: reference, cpu or triton (default: the device's own)", metavar="NAME")
    add("seconds", "of rounds for each callable (default: the preset's)", type=float, metavar="S")
    add("peers", f"these only, or all: {', '.join(presets.PEERS)} (default: the preset's)", metavar="A,B")
    add("max-autotune", "torch.compile with max-autotune on a CPU too (slow)", action="store_true")
    add("gate", "fail where a ratio has fallen below the committed baseline's", action="store_true")
    add("baselines", "where those are (default: bench/results)", type=Path, metavar="FOLDER", default=files.RESULTS)


def _blind(config: pytest.Config) -> str | None:
    # What keeps the gate from seeing any time.
    if getattr(config.option, "numprocesses", None) or getattr(config.option, "tx", None):
        return "-n: the gate measures in one process, and its rows would stay in the workers"
    if config.getoption("bench_shape"):
        return "--shape: baselines are of presets"
    for name in ("benchmark_disable", "benchmark_skip"):
        if getattr(config.option, name, False):
            return f"--{name.replace('_', '-')}: nothing would be measured"
    return None


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs pytest-benchmark: pip install pytest-benchmark pytest-timeout")
    file = config.getoption("benchmark_json")
    if file and not Path(file).absolute().parent.is_dir():
        raise pytest.UsageError(f"--benchmark-json={file}: there is no such folder")
    if config.getoption("bench_gate") and (why := _blind(config)):
        raise pytest.UsageError(f"--gate does not go with {why}")
    names = ("preset", "shape", "dtype", "device", "backend", "seconds", "peers", "max_autotune")
    try:
        options = {name: config.getoption(f"bench_{name}") for name in names}
        settings = presets.settings(**options)
        slowed.factor("")  # refuses what the variable may not hold
    except ValueError as problem:
        raise pytest.UsageError(str(problem)) from None
    config.stash[SESSION], config.stash[ROWS], config.stash[OPTIONS] = Session(settings), [], options
    asked = {"seconds": settings.seconds, "backend": settings.backend, "slowed": os.environ.get(slowed.VARIABLE)}
    config.stash[FACTS] = timing.provenance(settings.device) | asked
    # Its table has times of ours only, and none of the peers'; --benchmark-verbose brings it back.
    config.option.benchmark_quiet = True
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch.*")  # torch's own, about itself


def pytest_sessionstart(session: pytest.Session) -> None:
    # Said before anything is measured, with -q too: the run ends with it, after its table.
    config = session.config
    if not config.getoption("bench_gate"):
        return
    settings, folder = config.stash[SESSION].settings, config.getoption("bench_baselines")
    path = files.baseline_path(config.stash[FACTS], settings.name, settings.dtype, folder)
    try:
        gate.baseline(path, files.Results(Path("this run"), config.stash[FACTS], {}, {}))
    except files.Unusable as problem:
        config.pluginmanager.get_plugin("terminalreporter").write_line(f"gate: will fail, {problem}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" in metafunc.fixturenames:
        found = list(suites.of(metafunc.module.SUITE, metafunc.config.stash[SESSION].settings))
        metafunc.parametrize("spec", found, ids=[benchmark.id for benchmark in found])


class Replay:
    """pytest-benchmark's timer for samples that are taken already: two calls of it are apart by the next one."""

    __name__ = "replay"

    def __init__(self) -> None:
        self._times: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        """Have these next."""
        self._times = iter([time for sample in samples for time in (0.0, sample)])

    def __call__(self) -> float:
        return next(self._times)


REPLAY = Replay()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The most important first: a run that is stopped has those.
    items.sort(key=lambda item: suites.SUITES.index(getattr(getattr(item, "module", None), "SUITE", suites.SUITES[-1])))
    for item in items:
        if "spec" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY, group=item.module.SUITE))
            item.add_marker(pytest.mark.timeout(0))  # a large shape takes what it takes


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[suites.Benchmark], None]:
    """Measures a benchmark and hands its samples and its row to pytest-benchmark."""

    def run(spec: suites.Benchmark) -> None:
        row, ours = request.config.stash[SESSION].row(spec, timed=benchmark.enabled)
        request.config.stash[ROWS].append(row)
        if "error" in row:
            benchmark.skipped = True  # pytest-benchmark is not to warn that it had nothing to do
            if row["error"].startswith("does not fit"):
                pytest.skip(row["error"])
            pytest.fail(row["error"], pytrace=False)
        benchmark.extra_info.update(row)
        if ours is None:
            benchmark.pedantic(lambda: None)
            return
        REPLAY.load([sample * ours.calls for sample in ours.samples])
        benchmark.pedantic(lambda: None, rounds=len(ours.samples), iterations=ours.calls)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(config.stash[FACTS])


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    # A benchmark without statistics would break pytest-benchmark's own comparison.
    output_json["not_measured"] = [row for row in config.stash[ROWS] if "error" in row]


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if config.getoption("bench_gate") and session.exitstatus == pytest.ExitCode.INTERRUPTED:
        config.stash[VERDICT] = "gate: not judged, the run was interrupted"
    elif config.getoption("bench_gate") and not config.option.collectonly:
        rows = {row["id"]: row for row in config.stash[ROWS]}
        now = files.Results(Path("this run"), config.stash[FACTS], {}, rows)
        measure = again.in_fresh_processes(config.stash[OPTIONS])
        report = gate.check(now, measure, config.getoption("bench_baselines"))
        config.stash[VERDICT] = report.text
        if report.failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if rows := config.stash[ROWS]:
        settings = config.stash[SESSION].settings
        changes = "".join(f", {size}={value}" for size, value in settings.changes.items())
        terminalreporter.section(f"bench, preset {settings.name}{changes}, {settings.dtype} on {settings.device}")
        facts = config.stash[FACTS]
        busy = "BUSY when this began: unless that has ended, it is in every number below"
        lines = [*timing.describe(facts).splitlines(), *([busy] if files.busy(facts) else [])]
        for line in [*lines, "", *table.lines(rows), *_idle(config, rows)]:
            terminalreporter.write_line(line)
    if VERDICT in config.stash:
        terminalreporter.section("gate")
        terminalreporter.write_line(config.stash[VERDICT])


def _idle(config: pytest.Config, rows: Sequence[Row]) -> list[str]:
    # Peers that were named and had nothing to compute: a table without them would look as if they had been forgotten.
    named = (config.getoption("bench_peers") or "").split(",")
    seen = {peer for row in rows for peer in row["peers"]}
    return [f"{name}: computes none of these rows" for name in named if name in presets.PEERS and name not in seen]


def pytest_unconfigure(config: pytest.Config) -> None:
    if SESSION in config.stash:
        config.stash[SESSION].close()
