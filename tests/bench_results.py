"""Results of bench without measuring: a machine whose noise is known, and documents as pytest-benchmark writes them."""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from bench import files, presets, timing
from bench.suites import Benchmark

SIZES = asdict(presets.PRESETS["smoke"].sizes)
SUBJECTS = (
    "route",
    "leave_one_out",
    "counterfactual_losses",
    "group_attention",
    "alignment_loss",
    "adapter",
    "router",
    "step",
)
DIRECTIONS = ("forward", "forward+backward")
# 48 rows, as a small preset has: eight subjects, both directions, and two more of a size.
IDS = tuple(f"{subject}/{d}{tail}" for subject in SUBJECTS for d in DIRECTIONS for tail in ("", "/T=1", "/T=8"))


@dataclass
class Machine:
    """Time with noise, all of it drawn from a seed.

    rounds: how many a row has. noise: of a round, relative, for the quieter rows; others have up to four times as much.
    bursts: the share of samples in which somebody else's load takes up to twice the time on top. drift: of a ratio from run
    to run, which no round sees. lasting: the share of its variance that stays for a run and what is measured again for it.
    Half of what stays, and half of what does not, is common to all rows. slow: factors of ours by subject.
    """

    seed: int = 0
    rounds: int = 15
    noise: float = 0.03
    bursts: float = 0.1
    drift: float = 0.01
    lasting: float = 0.5
    slow: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draws = random.Random(self.seed)

    def _moved(self, name: str) -> float:
        # The logarithm of how far a ratio is off for all of a measurement.
        stays = self._run[""] + self._run.setdefault(name, self.draws.gauss(0, 1))
        passes = self._pass + self.draws.gauss(0, 1)
        return self.drift * (math.sqrt(self.lasting / 2) * stays + math.sqrt((1 - self.lasting) / 2) * passes)

    def row(self, name: str, peers: Iterable[str] = ("eager",)) -> dict[str, Any]:
        """One row, measured afresh."""
        own = random.Random(name)  # what is a row's own stays the same over runs and machines
        noise = self.noise * max(1.0, 4 * own.random() ** 3)
        seconds, wanted = 10 ** own.uniform(-4, -2), list(peers)
        factor = {"ours": self.slow.get(name.split("/")[0], 1.0), **{peer: own.uniform(1, 8) for peer in wanted}}

        def sample(who: str) -> float:
            burst = 1 + 2 * self.draws.random() * (self.draws.random() < self.bursts)
            return seconds * factor[who] * math.exp(self.draws.gauss(0, noise)) * burst

        found = {}
        for who in ("ours", *wanted):
            moved = math.exp(self._moved(name)) if who != "ours" else 1.0
            found[who] = timing.Timing(tuple(sample(who) * moved for _ in range(self.rounds)), 1)
        return row(name, found)

    def document(self, names: Iterable[str] = IDS, peers: Iterable[str] = ("eager",)) -> dict[str, Any]:
        """One run of the benchmarks."""
        self._run, self._pass = {"": self.draws.gauss(0, 1)}, self.draws.gauss(0, 1)
        return document([self.row(name, peers) for name in names], **self.facts)

    def twice(self, names: Iterable[str] = IDS, **keywords: Any) -> dict[str, Any]:
        """One run of the benchmarks for a baseline: every row is measured again."""
        found = self.document(names, **keywords)
        second = self.again((name, "eager") for name in names)
        for benchmark in found["benchmarks"]:
            benchmark["extra_info"]["again"] = second[benchmark["param"]]
        return found

    def again(self, wanted: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """`gate.Again` for the latest run."""
        self._pass = self.draws.gauss(0, 1)
        return {name: self.row(name) for name in dict.fromkeys(name for name, _ in wanted)}


def with_kept(found: dict[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what another one, which has eager, says as its measurement with kept memory."""
    eager, ours = kept["peers"]["eager"], kept["ours"]
    ratio = eager["q1"] / ours["q1"]
    found["memory"] = {"eager_kept": {**eager, "ours": ours, "processes": [0.99 * ratio, ratio / 0.99]}}
    return found


@cache
def sizes(name: str, preset: str) -> dict[str, int]:
    """Those of a preset's row."""
    subject, direction, *tail = name.split("/")
    variant = {size: int(value) for size, _, value in (word.partition("=") for word in tail)}
    return asdict(Benchmark(subject, direction, variant).sizes(presets.settings(preset, device="cpu")))


def row(name: str, timings: Mapping[str, timing.Timing], **changes: Any) -> dict[str, Any]:
    """A row as bench writes it, from the timings of ours and of peers."""
    subject, direction, *tail = name.split("/")
    peers = {}
    for peer, found in timings.items():
        if peer != "ours":
            ratio = timing.ratio(found, timings["ours"])
            fields = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "certain": ratio.certain}
            peers[peer] = {**found.summary(), "error": 1e-6, "ratio": fields}
    seconds = timings["ours"].median
    return {
        "id": name,
        "suite": "scaling" if tail else "models" if subject in ("router", "head", "step") else "ops",
        "subject": subject,
        "direction": direction,
        "variant": {tail[0].split("=")[0]: int(tail[0].split("=")[1])} if tail else {},
        "preset": "smoke",
        "sizes": sizes(name, "smoke"),
        "dtype": "float32",
        "device": "cpu",
        "backend": "cpu",
        "ours": timings["ours"].summary(),
        "peers": peers,
        "fastest": min(peers, key=lambda peer: peers[peer]["ratio"]["value"], default=None),
        "memory": {},
        "cost": {"bytes": 1_000_000, "operations": 5_000_000},
        "achieved": {"bytes_per_second": 1e6 / seconds, "operations_per_second": 5e6 / seconds},
        "limit": {
            "copy_bandwidth": 2e10,
            "product_rate": 1e11,
            "floor": 5e-5,
            "held_by": "bytes",
            "share": 5e-5 / seconds,
        },
        "peak_bytes": 3_000_000,
        "host_seconds": None,
        "notes": [],
        **changes,
    }


def document(rows: Iterable[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """pytest-benchmark's JSON of rows, with facts of the machine that differ."""
    machine = {
        "node": "somebody's",
        "device": {"name": "A processor", "class": "cpu-x86_64-avx2-2c"},
        "torch": "2.13.0+cpu",
        "threads": 2,
        "revision": "0" * 40,
        "dirty": False,
        "load": [0.1, 0.1, 0.1],
        "busy": 0.1,
        "date": "2026-01-01T00:00:00Z",
        "contract_version": 2,
        **facts,
    }
    benchmarks = [
        {
            "group": None,
            "name": f"test_op[{each['id']}]",
            "fullname": f"bench/test_ops.py::test_op[{each['id']}]",
            "params": None,
            "param": each["id"],
            "extra_info": each,
            "options": {},
            "stats": {**each.get("ours", {"median": 0.0}), "data": [1.0, 2.0], "iterations": 1},
        }
        for each in rows
    ]
    return {"machine_info": machine, "commit_info": {}, "benchmarks": benchmarks, "version": "5.3.1"}


def results(found: Mapping[str, Any], name: str = "run.json") -> files.Results:
    """A document as if it had been read."""
    return files.results(found, files.Path(name))
