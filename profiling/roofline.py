"""What both reports share: the roofline picture as a file, and recordings that are none."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.roofline import Point, plot


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
    axes = plot(figure, bandwidth, rates, shown)
    axes.set_title(title)
    axes.set_xlabel(f"operations for each byte from or to memory\n(limits: {source})", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"roofline: {path}"


def synthetic(text: str) -> str | None:
    """What the first line of a recording says of where its numbers come from, where that is no real run."""
    first = text.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("# SYNTHETIC") else None
