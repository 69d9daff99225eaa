"""The roofline picture: how fast operations are done over how many there are for each byte, under the limits of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


def plot(figure: Any, bandwidth: float, rates: Mapping[str, float], points: Sequence[Point]) -> Any:
    """Draw points and limits into a figure of matplotlib; returns its axes.

    Args:
        figure: an empty one.
        bandwidth: bytes a second that memory gives at most.
        rates: operations a second at most, by the name of what does them.
        points: numbered in their order; all with operations, bytes and time.
    """
    axes = figure.add_subplot()
    ridges = [rate / bandwidth for rate in rates.values()]
    low = min(*(point.intensity for point in points), *ridges) / 4
    high = max(*(point.intensity for point in points), *ridges) * 4
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        axes.plot([low, rate / bandwidth, high], [low * bandwidth, rate, rate], color="black", linewidth=1)
        axes.annotate(f"{name}, {_short(rate)}OP/s", (high, rate), ha="right", va="bottom", fontsize=8)
    axes.annotate(
        f"{_short(bandwidth)}B/s", (min(ridges) / 2, min(ridges) / 2 * bandwidth), ha="right", va="bottom", fontsize=8
    )
    for number, point in enumerate(points, 1):
        # Neighbours, which are often the two directions of an op, share a colour.
        style = {"color": f"C{(number - 1) // 2 % 10}", "fillstyle": "none" if number % 2 else "full"}
        axes.plot([point.intensity], [point.rate], "o", markersize=5, label=f"{number}: {point.name}", **style)
        axes.annotate(str(number), (point.intensity, point.rate), xytext=(4, 4), textcoords="offset points", fontsize=7)
    bottom = min(*(point.rate for point in points), *rates.values()) / 10
    axes.set(xscale="log", yscale="log", ylabel="operations a second", ylim=(bottom, 3 * max(rates.values())))
    axes.set_xlabel("operations for each byte")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(True, which="major", linewidth=0.3)
    return axes


def _short(value: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g} "
