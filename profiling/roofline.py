"""What both reports share: the roofline picture (operations for each byte, and how fast), and recordings that are none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """What was measured: a name, operations done, bytes moved, seconds taken."""

    name: str
    operations: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.bytes

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


def draw(
    path: Path, title: str, bandwidth: float, rates: Mapping[str, float], points: Sequence[Point], source: str
) -> str:
    """Write the picture; what became of it, in a line.

    Args:
        path: of the PNG.
        title: above it.
        bandwidth: bytes a second that memory gives at most.
        rates: operations a second at most, by the name of what does them.
        points: those without operations, bytes or time are left out.
        source: where the limits come from.
    """
    shown = [point for point in points if min(point.operations, point.bytes, point.seconds) > 0]
    if not shown or bandwidth <= 0 or not rates:
        return f"no roofline: {'no kernel has counts of operations and bytes' if not shown else 'no limits are known'}"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no roofline: matplotlib is not installed"
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ridges = [rate / bandwidth for rate in rates.values()]
    low = min(*(point.intensity for point in shown), *ridges) / 4
    high = max(*(point.intensity for point in shown), *ridges) * 4
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        axes.plot([low, rate / bandwidth, high], [low * bandwidth, rate, rate], color="black", linewidth=1)
        axes.annotate(f"{name}, {_short(rate)}OP/s", (high, rate), ha="right", va="bottom", fontsize=8)
    axes.annotate(
        f"{_short(bandwidth)}B/s", (min(ridges) / 2, min(ridges) / 2 * bandwidth), ha="right", va="bottom", fontsize=8
    )
    for number, point in enumerate(shown):
        label = f"{number + 1}: {point.name}"
        axes.plot([point.intensity], [point.rate], "o", markersize=5, label=label)
        axes.annotate(str(number + 1), (point.intensity, point.rate), xytext=(4, 4), textcoords="offset points")
    bottom = min(*(point.rate for point in shown), *rates.values()) / 10
    axes.set(
        xscale="log", yscale="log", title=title, ylabel="operations a second", ylim=(bottom, 3 * max(rates.values()))
    )
    axes.set_xlabel(f"operations for each byte from or to memory\n(limits: {source})", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(True, which="major", linewidth=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"roofline: {path}"


def _short(value: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g} "


def synthetic(text: str) -> str | None:
    """What the first line of a recording says of where its numbers come from, where that is no real run."""
    first = text.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("# SYNTHETIC") else None
