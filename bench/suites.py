"""Every benchmark by its id: `route/forward`, `head/forward+backward`, `step/decode`, `route/forward/T=8`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bench import models, timing
from bench.cases import BOTH, DIRECTIONS, FORWARD, OPS, TOLERANCES, Case, Cost, Sizes, size
from bench.peers import compiled, peers, takes_part
from bench.presets import PEERS, Settings, parse_shape, peak
from bench.timing import Plan
from tiger_fast._extras import unknown

SUITES = ("ops", "models", "scaling")

# How cost grows: subject, direction, and a size's values. A fraction is of the preset's own size.
SCALES: tuple[tuple[str, str, dict[str, tuple[float, ...]]], ...] = (
    ("route", FORWARD, {"T": (1, 4, 16), "M": (2, 4, 8, 16), "N": (0.25, 4.0), "D": (0.5, 2.0), "R": (8, 32, 128)}),
    ("leave_one_out", FORWARD, {"T": (1, 4, 16), "M": (2, 4, 8)}),
    ("counterfactual_losses", FORWARD, {"C": (10, 40, 160), "M": (2, 4, 8)}),
    ("group_attention", FORWARD, {"G": (2, 4, 8)}),
    ("alignment_loss", BOTH, {"M": (2, 4, 8)}),
    ("competency_aggregate", FORWARD, {"M": (2, 4, 8)}),
    ("adapter", FORWARD, {"C": (256, 1024)}),
    ("counterfactual_pass", BOTH, {"M": (2, 4, 8)}),
)


@dataclass
class Built:
    """A benchmark that is ready to run.

    Attributes:
        calls: by name, "ours" first, then those of the peers that are there, "eager" among them.
        missing: why by name, for those that are not.
        beside: what is timed in the same rounds and compared with nobody: "none", for a step with the counterfactual loss ours
            without.
        tolerance: what outputs may differ by.
        difference: of two results.
        truth: what makes the right ones, where it is not eager.
        cost: by formula, or None.
        small: a call of ours with next to nothing to compute, or None; its time is the host's share of every call.
        flush: the calls have one set of arguments, so that on CUDA the L2 cache is to be flushed before each; else they are
            `Turns`, on CUDA through copies of the arguments that are larger than the cache.
    """

    calls: dict[str, timing.Call]
    missing: dict[str, str]
    tolerance: float
    difference: Callable[[Any, Any], float]
    truth: timing.Call | None = None
    cost: Cost | None = None
    small: timing.Call | None = None
    flush: bool = False
    beside: dict[str, timing.Call] = field(default_factory=dict)

    def check(self) -> tuple[dict[str, float], dict[str, str]]:
        """`timing.check` of its calls."""
        return timing.check(
            self.calls, reference="eager", tolerance=self.tolerance, difference=self.difference, truth=self.truth
        )


@dataclass(frozen=True)
class Benchmark:
    """What a row is about: an op or a model, a direction (for a step its counterfactual mode), and sizes that differ from the
    preset's."""

    subject: str
    direction: str
    variant: Mapping[str, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The benchmark's name everywhere."""
        return "/".join([self.subject, self.direction, *(f"{k}={v}" for k, v in self.variant.items())])

    @property
    def suite(self) -> str:
        """One of `SUITES`."""
        if self.variant:
            return "scaling"
        return "ops" if self.subject in OPS else "models"

    def sizes(self, settings: Settings) -> Sizes:
        """The sizes in a run; a model's batch is the preset's own.

        Raises:
            ValueError: where they do not go together.
        """
        found = settings.sizes(self.subject, self.variant)
        if self.subject in OPS or "B" in settings.changes:
            return found
        return replace(found, B=settings.preset.batch)

    def backend(self, settings: Settings) -> str:
        """The backend of ours."""
        return settings.backend_of(self.subject if self.subject in OPS else "route")

    def plan(self, settings: Settings) -> Plan:
        """How long it is measured; a step, which takes long, in fewer rounds."""
        warmup = min(0.3, settings.seconds / 4)
        return Plan(warmup=warmup, seconds=settings.seconds, least=9 if self.suite == "ops" else 6)

    def needs(self, settings: Settings) -> int:
        """Bytes of memory that measuring takes: what the eager reference does, arguments, temporaries and results, with the
        results of another that are compared with it; the buffers of the limits, a large copy's and a library product's; and, on
        CUDA, the copies that are rotated and their results. Allocates nothing."""
        sizes, copies, products = self.sizes(settings), 0, 0

        def make() -> timing.Call:
            nonlocal copies, products
            # On the CPU, whatever the device: the bytes are the same.
            on_host = replace(settings, device="cpu")
            if self.subject not in OPS:
                model, *without = self._models(on_host)
                copies = 2 * size([each.trained for each in without])  # what AdamW keeps of them
                return model.call("reference")
            case = self._case(on_host, sizes)
            if settings.device == "cuda":
                given, returned = case.tensor_bytes(self.direction)
                copies = (_turns(size(case.arguments)) - 1) * (given + returned)
            # Drawn in float32; the largest of them, which are made one after the other.
            drawn = (
                4 * (a * b + b * c) + settings.torch_dtype.itemsize * a * c
                for a, b, c in case.cost(self.direction).products
            )
            products = max(drawn, default=0)
            eager = case.call(case.function("reference"), self.direction)
            return eager if settings.dtype == "float32" else lambda: (eager(), case.exact(self.direction)())

        # A copy's source, its target and a fresh one.
        return peak(make) + copies + max(products, 3 * timing.COPY_BYTES[settings.device])

    def _models(self, settings: Settings) -> list[models.Model]:
        # A step has one without the counterfactual loss beside it.
        directions = [self.direction]
        if self.subject == "step" and self.direction != "none":
            directions.append("none")
        return [models.Model(self.subject, direction, self.sizes(settings), settings) for direction in directions]

    def _compiles(self, settings: Settings) -> bool:
        if not any(takes_part(name, settings) for name in PEERS if "compile" in name):
            return False
        # Compiling takes some ten seconds a row on a CPU.
        chosen = settings.preset.compiled
        return chosen is None or (self.subject in chosen and not self.variant)

    def build(self, settings: Settings) -> Built:
        """Arguments, calls of ours and of every peer that takes part."""
        return self._build_op(settings) if self.subject in OPS else self._build_model(settings)

    def _case(self, settings: Settings, sizes: Sizes) -> Case:
        return Case(self.subject, sizes, settings.torch_dtype, settings.device)

    def _build_op(self, settings: Settings) -> Built:
        sizes, backend = self.sizes(settings), self.backend(settings)
        case = self._case(settings, sizes)
        turns = _turns(size(case.arguments)) if settings.device == "cuda" else 1
        cases = [case, *(self._case(settings, sizes) for _ in range(turns - 1))]
        others, missing = peers(case, settings, compiles=self._compiles(settings))
        functions = {"ours": case.function(backend), **others}
        calls: dict[str, timing.Call] = {}
        for name, function in functions.items():
            calls[name] = timing.Turns(each.call(function, self.direction) for each in cases)
        least = self._case(settings, replace(sizes, B=1, N=1, D=sizes.heads, C=1, R=1))
        small = least.call(least.function(backend), self.direction)
        built = Built(calls, missing, TOLERANCES[settings.device, settings.dtype], timing.error)
        if settings.dtype != "float32":
            built.truth, built.difference = case.exact(self.direction), _error_of_values
        built.cost, built.small = case.cost(self.direction), small
        return built

    def _build_model(self, settings: Settings) -> Built:
        model, *without = self._models(settings)
        calls = {"ours": model.call(self.backend(settings)), "eager": model.call("reference")}
        if self._compiles(settings):
            for name, function in compiled("compile", model.function, settings, fullgraph=False).items():
                if takes_part(name, settings):
                    calls[name] = model.call("reference", function)
        built = Built(calls, {}, models.TOLERANCES[settings.dtype], models.disagreement, flush=True)
        built.beside = {each.direction: each.call(self.backend(settings)) for each in without}
        return built


def _error_of_values(ours: Any, expected: Any) -> float:
    both = tree_map_only(Tensor, lambda t: t.detach().float(), (list(tree_leaves(ours)), list(tree_leaves(expected))))
    return timing.error(*both)


def _turns(argument_bytes: int) -> int:
    # Copies of the arguments that together are four L2 caches, so that every call finds its own in device memory.
    return max(2, min(64, -(-4 * timing.l2_bytes() // max(argument_bytes, 1))))


def of(suite: str, settings: Settings) -> Iterator[Benchmark]:
    """The benchmarks of a suite in a run."""
    if suite == "ops":
        yield from (Benchmark(op, direction) for op in settings.preset.ops for direction in DIRECTIONS)
    elif suite == "models":
        if settings.preset.models:
            names = [name for name in models.SUBJECTS if name != "counterfactual_pass"]
            yield from (Benchmark(name, direction) for name in names for direction in models.SUBJECTS[name])
    else:
        for subject, direction, axes in SCALES:
            if subject in settings.preset.ops or subject in models.SUBJECTS and settings.preset.models:
                yield from _scaled(subject, direction, axes, settings)


def _scaled(
    subject: str, direction: str, axes: Mapping[str, tuple[float, ...]], settings: Settings
) -> Iterator[Benchmark]:
    own = settings.sizes(subject)
    for name, values in axes.items():
        whole = [v if isinstance(v, int) else round(v * getattr(own, name)) for v in values]
        for value in (whole[0], whole[-1]) if settings.preset.ends else whole:
            benchmark = Benchmark(subject, direction, {name: value})
            try:
                benchmark.sizes(settings)
            except ValueError:  # a fraction of one's own shape that the heads do not divide, or that is 0
                continue
            yield benchmark


def find(text: str, settings: Settings) -> Benchmark:
    """The benchmark of an id, whether or not a suite has its variant.

    Raises:
        ValueError: for a subject or direction that does not exist, or sizes that do not go together.
    """
    subject, _, rest = text.partition("/")
    direction, *variant = rest.split("/")
    known = dict.fromkeys(OPS, DIRECTIONS) | models.SUBJECTS
    if subject not in known:
        raise unknown("benchmark", subject, known)
    if not direction:
        raise ValueError(f"{text!r} names no direction: {' or '.join(f'{subject}/{each}' for each in known[subject])}")
    if direction not in known[subject]:
        raise unknown(f"direction of {subject}", direction, known[subject])
    found = Benchmark(subject, direction, parse_shape(",".join(variant)) if variant else {})
    found.sizes(settings)
    return found
