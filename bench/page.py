"""`python -m bench page`: docs/results.md and its pictures from the committed files in bench/results/, and from nothing else.

The same files give the same page, byte for byte, and the same pictures with the same matplotlib. Times are given for GPUs
alone: on a CPU a time says as much about the machine's other work as about the code.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import files, gate, roofline, table
from bench.cases import DIRECTIONS
from bench.files import Results
from bench.presets import DTYPES, PRESETS
from tiger_fast.ops import backends

DOCS = files.ROOT / "docs"
NOT_MEASURED = "not measured"
# The presets that figures are stated for, and that have targets: (kind of device, preset, type).
STATED = tuple((kind, name, PRESETS[name].dtype) for kind, name in (("CPU", "design"), ("GPU", "gpu")))
Row = Mapping[str, Any]

INTRODUCTION = """# Results

Made by `python -m bench page` from the files in bench/results/; do not edit. [bench/README.md](../bench/README.md) says how
each figure is measured. A ratio is a peer's time over ours in the same interleaved run, so more than 1 means that ours is
faster. In a file of several runs it is the median of the runs' ratios (by lower quartiles), ± the run that is furthest from
it. Everything else, and every figure of a file of one run, is of one run, ± the larger side of a 95 % interval that says
nothing of other runs (`?`: too few rounds for one): threaded calls of a few milliseconds wait for the scheduler now and then,
and a ± of 100 % and more beside a ratio says that these runs settle nothing about that row. `eager` is the reference backend
in plain PyTorch, `compile` torch.compile of it, `algebra` the kernels' algebra in plain PyTorch. For CPUs no times are given:
one says as much about the machine's other work as about the code, and so do the rates, which are of one run alone. `contract`
is the version of how times were taken; 1 differs from 2 in the noise of `kept` alone, whose processes had one parent. A row
without a line under Targets has no goal of its own."""

COLUMNS = """`spread` is between the quartiles of our rounds, relative to their median. `kept` is eager's ratio in a process
where glibc keeps all memory (in `smoke` with one thread), `emptied` our time without any kept memory over ours. GB/s and
GFLOP/s are what any implementation must move and compute, over our time; `limit` is the floor's share of our time, where the
floor follows from copy bandwidth and matrix products measured in the same run, and what holds it; data that stays in the caches
passes 100 %. `peak` is what a call takes beyond its arguments, and beside it eager's."""

STEPS = """`none` is the time of the step without the counterfactual loss over that of the step with it, in the same interleaved
rounds."""

NOTICED = """What `pytest bench/ --gate` should notice with this file as its baseline, in nine of ten runs, by the noise of
its runs (what was counted is in [bench/README.md](../bench/README.md#the-gate)): ours slower by at least this
factor in all rows of a subject, where a run is no noisier than those of the baseline. `notices` is by eager
with kept memory where that was measured, `as used` by eager with fresh memory and all threads."""

# The names of this page's pictures: class, preset, type and what they show.
PICTURE = re.compile(rf"(cpu|cuda|hip|unknown)-.+-({'|'.join(DTYPES)})-(ratios|roofline|scaling)\.svg")


def render(found: Sequence[Results]) -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION, "## Where", _where(found), "## Targets", *_targets(found), "## CPU and GPU", _summary(found)]
    for results in found:
        parts += _file(results)
    return "\n\n".join(parts) + "\n"


def _kind(results: Results) -> tuple[str, str]:
    row = next(iter(results.rows.values()))
    return row["preset"], row["dtype"]


def _gpu(results: Results) -> bool:
    return not (results.device_class or "cpu").startswith("cpu")


def _title(results: Results) -> str:
    return " ".join([results.device_class or results.device, *_kind(results)])


def _stem(results: Results) -> str:
    return "-".join([results.device_class or "unknown", *_kind(results)])


def _where(found: Sequence[Results]) -> str:
    lines = []
    for results in found:
        facts, kind = results.machine, _kind(results)
        revision = (facts.get("revision") or "unknown")[:12] + (" DIRTY" if facts.get("dirty") else "")
        rows = files.measured(results).values()
        runs = max((len(peer["ratio"]) for row in rows for peer in row.get("runs", {}).values()), default=1)
        told = (facts.get(name) for name in ("threads", "torch", "contract_version"))
        words = results.device_class, results.device, *kind, *told, revision
        lines.append([*(str(word) for word in words), str(facts.get("date", ""))[:10], str(runs)])
    if not found:
        return "No results are committed."
    return _table(
        ["class", "device", "preset", "type", "threads", "torch", "contract", "revision", "date", "runs"], lines
    )


# -- targets -----------------------------------------------------------------------------------------------------------


def _stated(found: Sequence[Results], kind: str, preset: str, dtype: str) -> list[Results]:
    return [r for r in found if _kind(r) == (preset, dtype) and _gpu(r) == (kind == "GPU")]


def _targets(found: Sequence[Results]) -> list[str]:
    parts = []
    for kind, preset, dtype in STATED:
        those = _stated(found, kind, preset, dtype)
        lines = []
        for (op, direction), wanted in table.TARGETS[preset].items():
            reached = [_reached(r.rows.get(f"{op}/{direction}")) for r in those] or [{}]
            for what, least in wanted.items():
                cells = [_target(what, values.get(what, [math.nan]), least) for values in reached]
                lines.append([op, direction, what.replace("/", " or "), _figure(what, least), *cells])
        head = ["op", "direction", "against", "target", *([r.device_class for r in those] or [kind])]
        parts += [f"{kind}, preset `{preset}`, {dtype}:", _table(head, lines)]
    return parts


def _reached(row: Row | None) -> dict[str, list[float]]:
    if not row:
        return {}
    return {what: _by_run(row, what) or [value] for what, _, value in table.against_targets(row)}


def _by_run(row: Row, what: str) -> list[float]:
    # Of several peers the fastest of each run.
    runs = row.get("runs", {})
    return [min(ratios) for ratios in zip(*(runs[peer]["ratio"] for peer in what.split("/") if peer in runs))]


def _target(what: str, values: Sequence[float], least: float) -> str:
    if any(map(math.isnan, values)):
        return NOT_MEASURED
    met = sum(value >= least for value in values)
    value = statistics.median(values)
    some = "" if met in (0, len(values)) else f" ({met} of {len(values)} runs)"
    return f"{_figure(what, value)} {'met' if value >= least else 'MISSED'}{some}"


def _figure(what: str, value: float) -> str:
    return f"{value:.0%}" if what == "limit" else f"{value:.2f}"


# -- tables ------------------------------------------------------------------------------------------------------------


def _summary(found: Sequence[Results]) -> str:
    # The presets that figures are stated for, beside each other.
    sides = []
    for kind, preset, dtype in STATED:
        those = _stated(found, kind, preset, dtype)
        sides += [(results.device_class, results.rows) for results in those] or [(kind, {})]
    names = dict.fromkeys((op, direction) for op in backends.OPS for direction in DIRECTIONS)
    head = ["op", "direction"]
    for side, _ in sides:
        head += [f"{side}: eager", f"{side}: fastest peer", f"{side}: limit"]
    lines = []
    for op, direction in names:
        cells = [op, direction]
        for _, rows in sides:
            row = rows.get(f"{op}/{direction}", {})
            ratios = {peer: found["value"] for peer in row.get("peers", {}) if (found := files.ratio(row, peer))}
            fastest = min(ratios, key=ratios.__getitem__, default=None)
            cells += [
                _ratio(row, "eager") or NOT_MEASURED,
                f"{_ratio(row, fastest)} {fastest}" if fastest else NOT_MEASURED,
            ]
            cells.append(_limit(row) or NOT_MEASURED)
        lines.append(cells)
    return _table(head, lines)


def _file(results: Results) -> list[str]:
    rows = list(results.rows.values())
    suites = {suite: [row for row in rows if row["suite"] == suite] for suite in ("ops", "models", "scaling")}
    parts = [f"## {_title(results)}"]
    stem = _stem(results)
    if suites["ops"]:
        parts += [_sizes(suites["ops"]), COLUMNS, _rows(suites["ops"], results)]
        parts += [f"![ratios to each peer, by op](results/{stem}-ratios.svg)"]
        if any(row.get("limit") for row in suites["ops"]):
            parts += [f"![operations a second over operations a byte](results/{stem}-roofline.svg)"]
    steps = [row for row in suites["models"] if row["subject"] == "step"]
    models = [row for row in suites["models"] if row["subject"] != "step"]
    if models:
        parts += ["### Router and head", _rows(models, results)]
    if steps:
        parts += ["### Training step, by the counterfactual loss's mode", _steps(steps)]
    if suites["scaling"]:
        parts += ["### How cost grows", _scaling(suites["scaling"]), f"![cost by size](results/{stem}-scaling.svg)"]
    if (measured := files.measured(results)) and all("runs" in row for row in measured.values()):
        parts += ["### What the gate notices", NOTICED, _table(*gate.noticed(results))]
    if lines := _absent(rows):
        parts += ["### What is missing", "\n".join(f"- {line}" for line in lines)]
    return parts


def _sizes(rows: Sequence[Row]) -> str:
    # Those that most ops have, then what differs.
    texts = {row["subject"]: " ".join(f"{name}={value}" for name, value in row["sizes"].items()) for row in rows}
    usual = max(dict.fromkeys(texts.values()), key=list(texts.values()).count)
    others = [f"{op}: {text}" for op, text in texts.items() if text != usual]
    return "; ".join([usual, *others])


def _rows(rows: Sequence[Row], results: Results) -> str:
    peers = dict.fromkeys(peer for row in rows for peer, found in row.get("peers", {}).items() if "ratio" in found)
    memory = [name for name in ("eager_kept", "ours_emptied") if any(row.get("memory", {}).get(name) for row in rows)]
    head = ["", "ours", *(["us"] if _gpu(results) else []), "spread", *peers]
    head += [{"eager_kept": "kept", "ours_emptied": "emptied"}[name] for name in memory]
    head += ["GB/s", "GFLOP/s", "limit", "peak, MB", "eager's"] + (["host, us"] if _gpu(results) else [])
    lines = []
    for row in rows:
        cells = [f"{row['subject']} {row['direction']}", row["backend"]]
        if "ours" not in row:
            lines.append([*cells, _why(row), *[""] * (len(head) - 3)])
            continue
        ours, done = row["ours"], row.get("achieved") or {}
        cells += [_micro(ours["median"])] if _gpu(results) else []
        cells += [f"{(ours['q3'] - ours['q1']) / ours['median']:.0%}", *(_ratio(row, peer) for peer in peers)]
        if "eager_kept" in memory:
            cells.append(_ratio(row, files.KEPT))
        if "ours_emptied" in memory:
            emptied = row["memory"].get("ours_emptied")
            cells.append(table.ratio(emptied["ratio"]) if emptied else "")
        cells += [
            _giga(done.get("bytes_per_second")),
            _giga(done.get("operations_per_second")),
            _limit(row),
            _mega(row),
            _mega(row["peers"].get("eager", {})),
        ]
        cells += [_micro(row.get("host_seconds"))] if _gpu(results) else []
        lines.append(cells)
    return _table(head, lines)


def _steps(rows: Sequence[Row]) -> str:
    peers = dict.fromkeys(peer for row in rows for peer, found in row.get("peers", {}).items() if "ratio" in found)
    head = ["mode", *(["none"] if any(row.get("none") for row in rows) else []), *peers, "peak, MB", "eager's"]
    lines = []
    for row in rows:
        if "ours" not in row:
            lines.append([row["direction"], _why(row), *[""] * (len(head) - 2)])
            continue
        cells = [row["direction"]]
        if "none" in head:
            cells.append(table.ratio(row["none"]["ratio"]) if row.get("none") else "")
        cells += [*(_ratio(row, peer) for peer in peers), _mega(row), _mega(row["peers"].get("eager", {}))]
        lines.append(cells)
    return "\n\n".join([*([STEPS] if "none" in head else []), _table(head, lines)])


def _why(row: Row) -> str:
    # What is known of a row without times; one that was only checked has no error.
    return row.get("error", NOT_MEASURED)


def curves(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows of each (subject, direction, size), by that size's value."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        for name in row["variant"]:
            if "ours" in row:
                found.setdefault((row["subject"], row["direction"], name), []).append(row)
    return {key: sorted(some, key=lambda row: row["variant"][key[2]]) for key, some in found.items()}


def _scaling(rows: Sequence[Row]) -> str:
    lines = []
    for (subject, direction, name), some in curves(rows).items():
        first = some[0]["ours"]["median"]
        values = ", ".join(str(row["variant"][name]) for row in some)
        times = ", ".join(f"{row['ours']['median'] / first:.2f}" for row in some)
        lines.append(
            [f"{subject} {direction}", f"{name} = {values}", times, ", ".join(_ratio(row, "eager") for row in some)]
        )
    return _table(["", "sizes", "our time, the first = 1", "eager"], lines)


def _absent(rows: Sequence[Row]) -> list[str]:
    lines: dict[str, list[str]] = {}
    for row in rows:
        for peer, found in row.get("peers", {}).items():
            for kind in ("missing", "refused"):
                if kind in found:
                    lines.setdefault(f"{peer}: {found[kind]}", []).append(row["id"])
        if row.get("error"):
            lines.setdefault(row["error"], []).append(row["id"])
    return [f"{line} ({', '.join(ids)})" for line, ids in lines.items()]


def _ratio(row: Row, peer: str | None) -> str:
    found = files.ratio(row, peer)
    return table.ratio(found) if found else ""


def _limit(row: Row) -> str:
    limit = row.get("limit") or {}
    if not limit or "ours" not in row:
        return ""
    return "too small" if limit["share"] is None else f"{limit['share']:.0%} ({limit['held_by']})"


def _giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3g}"


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.4g}"


def _mega(found: Mapping[str, Any]) -> str:
    return "" if found.get("peak_bytes") is None else f"{found['peak_bytes'] / 1e6:.3g}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(files.table([head, *lines]))


# -- pictures ----------------------------------------------------------------------------------------------------------


def pictures(found: Sequence[Results]) -> dict[str, Callable[[Any], None]]:
    """What draws each picture of the page into a matplotlib figure, by file name."""
    drawn: dict[str, Callable[[Any], None]] = {}
    for results in found:
        stem, rows = _stem(results), list(files.measured(results).values())
        ops = [row for row in rows if row["suite"] == "ops"]
        lines = curves(row for row in rows if row["suite"] == "scaling")
        limited = [row for row in ops if row.get("limit")]
        for name, draw, what in (
            ("ratios", draw_ratios, ops),
            ("roofline", draw_roofline, limited),
            ("scaling", draw_scaling, lines),
        ):
            if what:
                drawn[f"{stem}-{name}.svg"] = lambda figure, draw=draw, what=what: draw(figure, what)
    return drawn


def draw_ratios(figure: Any, rows: Sequence[Row]) -> None:
    """A bar for each peer of each op, with its interval; to the right of 1 ours is faster."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"] if files.ratio(row, peer)))
    figure.set_size_inches(8, 0.4 * len(rows) + 1)
    axes = figure.add_subplot()
    height = 0.8 / max(len(peers), 1)
    for i, peer in enumerate(peers):
        places = [(n, files.ratio(row, peer)) for n, row in enumerate(rows) if files.ratio(row, peer)]
        values = [ratio["value"] for _, ratio in places]
        sides = [[r["value"] - r["low"] for _, r in places], [r["high"] - r["value"] for _, r in places]]
        heights = [n + i * height for n, _ in places]
        axes.barh(heights, values, height, xerr=sides, label=peer, error_kw={"elinewidth": 0.8})
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(rows))])
    axes.set_yticklabels([f"{row['subject']} {row['direction']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    _powers_of_two(axes.set_xscale, axes.xaxis)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("the peer's time over ours")
    axes.legend(fontsize=7)


def draw_roofline(figure: Any, rows: Sequence[Row]) -> None:
    """Each op's rate over its operations a byte, under the two limits that were measured beside it (the best of the rows')."""
    figure.set_size_inches(9, 5)
    bandwidth = max(row["limit"]["copy_bandwidth"] for row in rows)
    rates = {"torch's product": max(row["limit"]["product_rate"] for row in rows)}
    points = [
        roofline.Point(
            f"{row['subject']} {row['direction']}",
            row["cost"]["operations"],
            row["cost"]["bytes"],
            row["cost"]["operations"] / row["achieved"]["operations_per_second"],
        )
        for row in rows
    ]
    roofline.plot(figure, bandwidth, rates, points)


def draw_scaling(figure: Any, lines: Mapping[tuple[str, str, str], Sequence[Row]]) -> None:
    """For each size that grows: ours and the peers, relative to our time at the smallest."""
    columns = 3
    below = math.ceil(len(lines) / columns)
    figure.set_size_inches(10, 2.6 * below)
    for n, ((subject, direction, name), rows) in enumerate(lines.items()):
        axes = figure.add_subplot(below, columns, n + 1)
        first = rows[0]["ours"]["median"]
        peers = dict.fromkeys(peer for row in rows for peer in row["peers"] if files.ratio(row, peer))
        for who in ("ours", *peers):
            found = [
                (row["variant"][name], row["ours"] if who == "ours" else row["peers"].get(who, {})) for row in rows
            ]
            found = [(value, t["median"] / first) for value, t in found if "median" in t]
            axes.plot(*zip(*found), "o-", markersize=3, linewidth=1, label=who)
        _powers_of_two(axes.set_xscale, axes.xaxis)
        axes.set_xticks([row["variant"][name] for row in rows])
        _powers_of_two(axes.set_yscale, axes.yaxis)
        axes.set_title(f"{subject} {direction}", fontsize=7)
        axes.set_xlabel(name, fontsize=7)
        axes.tick_params(labelsize=6)
        if n == 0:
            axes.legend(fontsize=6)


def _powers_of_two(scale: Callable[..., None], axis: Any) -> None:
    # A ratio of 3 or 20 lies between two of them; a logarithmic axis's own labels are powers of ten.
    scale("log", base=2)
    axis.set_major_formatter("{x:g}")


def save(drawn: Mapping[str, Callable[[Any], None]], folder: Path) -> None:
    """Write the pictures, and take away those of files that are gone."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.name not in drawn and PICTURE.fullmatch(path.name):
            path.unlink()
    # Neither a date nor random ids; text as text, so that it is not drawn by whatever fonts are installed.
    with matplotlib.rc_context({"svg.hashsalt": "tiger_fast", "svg.fonttype": "none"}):
        for name, draw in drawn.items():
            figure = Figure(layout="tight")
            draw(figure)
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})


def read(folder: Path) -> tuple[list[Results], list[str]]:
    """The committed files by class and preset, and a line for each that is of no use."""
    found, problems = [], []
    for path in sorted(folder.glob("*/*.json")):
        try:
            results = files.load(path)
            if not results.rows:
                raise files.Unusable(f"{path}: no rows of bench in it")
            found.append(results)
        except files.Unusable as problem:
            problems.append(str(problem))
    return found, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench page", description=__doc__)
    parser.add_argument("--results", type=Path, default=files.RESULTS, help="folder (default: bench/results)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder (default: docs)")
    options = parser.parse_args(arguments)
    found, problems = read(options.results)
    if not found and not problems:
        problems.append(f"{options.results}: no results in it")
    for line in [*problems, *(line for results in found for line in files.warnings(results))]:
        print(line, file=sys.stderr)
    if not found:
        return 1
    try:
        files.make(options.out)
    except files.Unusable as problem:
        print(problem, file=sys.stderr)
        return 1
    (options.out / "results.md").write_text(render(found))
    save(pictures(found), options.out / "results")
    print(f"wrote {options.out / 'results.md'} from {len(found)} files")
    return int(bool(problems))
