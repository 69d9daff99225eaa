"""The rows of a run as a table for a terminal, which is Markdown too."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from bench import files
from bench.cases import BOTH, FORWARD
from bench.presets import PEERS, PRESETS
from bench.timing import Ratio

Row = Mapping[str, Any]

# What is to be reached, by preset, subject and direction: ratios to peers, "/" between those of which the fastest counts,
# and the share of the limit.
TARGETS: dict[str, dict[tuple[str, str], dict[str, float]]] = {
    "design": {
        ("route", FORWARD): {"eager": 4.5, "compile": 2.4},
        ("route", BOTH): {"eager": 3.5, "compile": 2.2},
        ("leave_one_out", FORWARD): {"eager": 11.0, "compile": 6.5},
        ("counterfactual_losses", FORWARD): {"eager": 7.0, "compile": 1.7},
        ("group_attention", FORWARD): {"eager/sdpa": 10.0, "compile": 6.5},
        ("group_attention", BOTH): {"eager/sdpa": 8.0, "compile": 5.0},
        ("alignment_loss", BOTH): {"eager": 10.0, "compile": 3.0},
        ("competency_aggregate", FORWARD): {"eager": 4.0, "compile": 1.6},
    },
    "gpu": {
        ("route", FORWARD): {"eager": 10.0, "compile-max-autotune": 2.0, "limit": 0.60},
        ("route", BOTH): {"eager": 8.0, "compile-max-autotune": 2.0, "limit": 0.50},
        ("leave_one_out", FORWARD): {"limit": 0.90},
        ("counterfactual_losses", FORWARD): {"eager": 8.0, "compile-max-autotune": 2.0},
        ("group_attention", FORWARD): {"sdpa/flash-attn/xformers": 10.0, "limit": 0.85},
        ("group_attention", BOTH): {"limit": 0.75},
        ("competency_aggregate", FORWARD): {"limit": 0.85},
    },
}


def against_targets(row: Row) -> list[tuple[str, float, float]]:
    """(what, target, value, NaN where it was not measured) for what has a target at the preset exactly as it stands."""
    preset = PRESETS[row["preset"]]
    own = asdict(replace(preset.sizes, **preset.changes.get(row["subject"], {})))
    if "ours" not in row or (row["sizes"], row["dtype"], row["device"]) != (own, preset.dtype, preset.device):
        return []
    targets = TARGETS.get(row["preset"], {}).get((row["subject"], row["direction"]), {})
    return [(what, target, _value(row, what)) for what, target in targets.items()]


def _value(row: Row, what: str) -> float:
    if what == "limit":
        share = (row["limit"] or {}).get("share")
        return math.nan if share is None else share
    found = [row["peers"].get(name, {}) for name in what.split("/")]
    return min((peer["ratio"]["value"] for peer in found if "ratio" in peer), default=math.nan)


def lines(rows: Sequence[Row]) -> list[str]:
    """The table, and below it every row that has no time, every note and every peer that is missing or refused."""
    timed = [row for row in rows if "ours" in row]
    names = [name for name in PEERS if any("ratio" in row["peers"].get(name, {}) for row in timed)]
    header = ["benchmark", "ours", "ms (quartiles)", *names, "fastest", "emptied", "eager, kept"]
    header += ["GB/s", "GFLOP/s", "of the limit", "peak MB", "host us", "target"]
    found = files.table([header, *(_cells(row, names) for row in timed)]) if timed else []
    if timed:
        limits = [row["limit"] for row in timed if row["limit"]]
        found += [
            "",
            "A ratio is the peer's time over ours, ± the larger side of its 95 % interval (? fewer than 6 rounds).",
        ]
        found += _limits(limits)
    notes: dict[str, list[str]] = {}
    for row in rows:
        said = [row["error"]] if "error" in row else [*row["notes"]]
        for name, peer in row["peers"].items():
            said += [f"{name} {kind}: {peer[kind]}" for kind in ("missing", "refused") if kind in peer]
        for note in said:
            notes.setdefault(note, []).append(row["id"])
    return found + [f"{note}: {files.some(ids)}" for note, ids in notes.items()]


def _cells(row: Row, names: Iterable[str]) -> list[str]:
    ours, memory = row["ours"], row["memory"]
    milliseconds = f"{ours['median'] * 1e3:.3g} ({ours['q1'] * 1e3:.3g}-{ours['q3'] * 1e3:.3g})"
    achieved = row["achieved"] or {}
    return [
        row["id"],
        row["backend"],
        milliseconds,
        *(_ratio(row["peers"].get(name)) for name in names),
        row["fastest"] or "",
        _ratio(memory.get("ours_emptied")),
        _ratio(memory.get("eager_kept")),
        _scaled(achieved.get("bytes_per_second"), 1e9),
        _scaled(achieved.get("operations_per_second"), 1e9),
        _share(row["limit"]),
        _scaled(row["peak_bytes"], 1e6),
        _scaled(row["host_seconds"], 1e-6),
        _target(row),
    ]


def _ratio(peer: Row | None) -> str:
    return ratio(peer["ratio"]) if peer and "ratio" in peer else ""


def ratio(fields: Row) -> str:
    """A ratio as a row has it, with the larger side of its interval; `?` where there were too few rounds for one."""
    found = Ratio(**fields)
    noise = max(found.high / found.value - 1, 1 - found.low / found.value)
    return f"{found.value:.2f} ±{noise:.0%}" + ("" if found.certain else "?")


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def _share(limit: Row | None) -> str:
    if limit is None:
        return ""
    if limit["share"] is None:
        return "too small"
    return f"{limit['share']:.0%} of {limit['floor'] * 1e3:.3g} ms ({limit['held_by']})"


def _target(row: Row) -> str:
    words = {True: "met", False: "MISSED"}
    return ", ".join(
        f"{what} {target:g} {'not measured' if math.isnan(value) else words[value >= target]}"
        for what, target, value in against_targets(row)
    )


def _limits(limits: Sequence[Row]) -> list[str]:
    values = {
        "copy into a reused buffer, GB/s": "copy_bandwidth",
        "into a fresh one, GB/s": "copy_bandwidth_fresh",
        "products, GFLOP/s": "product_rate",
        "at the ops' shapes": "product_rate_at_shapes",
    }
    spans = []
    for words, key in values.items():
        if some := [limit[key] / 1e9 for limit in limits if limit[key]]:
            spans.append(f"{words} {min(some):.1f}-{max(some):.1f}")
    return [f"Limits, lowest and highest of the rows: {'; '.join(spans)}."] if spans else []
