"""Figures made of tensors; each function returns a matplotlib Figure that no window owns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tiger_fast._extras import require


def _figure(rows: int, columns: int, *, cell: tuple[float, float] = (2.0, 1.6)) -> tuple[Any, Any]:
    # Figure directly, not pyplot: no global state, no display, nothing to close.
    figure = require("matplotlib.figure", extra="train").Figure(
        figsize=(cell[0] * columns, cell[1] * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _pixels(image: Tensor) -> Any:
    return image.detach().cpu().movedim(0, -1).clamp(0, 1).numpy()


def routing_figure(
    image: Tensor, weights: Tensor, tasks: Sequence[str], experts: Sequence[str], grid: tuple[int, int]
) -> Any:
    """Routing weights of one image: a row per task, a column per expert, over the darkened image.

    Args:
        image: (3, H, W) in [0, 1].
        weights: (T, N, M).
        tasks, experts: their names.
        grid: rows and columns of the token grid.

    Returns:
        A matplotlib Figure; colours run from 0 to 1 in every panel.
    """
    figure, axes = _figure(len(tasks), len(experts) + 1)
    grey = _pixels(image).mean(-1)
    extent = (0, grey.shape[1], grey.shape[0], 0)
    maps = weights.detach().cpu().transpose(1, 2).unflatten(2, grid)  # (T, M, rows, columns)
    shown = None
    for row, task in enumerate(tasks):
        axes[row, 0].imshow(_pixels(image), extent=extent)
        axes[row, 0].set_ylabel(task, fontsize=8)
        for column, expert in enumerate(experts):
            axis = axes[row, column + 1]
            axis.imshow(grey, cmap="gray", extent=extent)
            shown = axis.imshow(maps[row, column], vmin=0, vmax=1, cmap="viridis", alpha=0.75, extent=extent)
            share = float(maps[row, column].mean())
            axis.set_title(f"{expert} {share:.2f}" if row == 0 else f"{share:.2f}", fontsize=8)
    figure.colorbar(shown, ax=axes[:, -1].tolist(), fraction=0.1, label="routing weight")
    return figure


def _drawn(name: str, value: Tensor) -> dict[str, Any]:
    # How a prediction or a target of shape (C, H, W) or (H, W) is shown.
    value = (
        value.detach().cpu().float().squeeze(0) if value.dim() == 3 and value.shape[0] == 1 else value.detach().cpu()
    )
    if value.dim() == 3:
        return {"X": ((value + 1) / 2).clamp(0, 1).movedim(0, -1).numpy()}
    shown = torch.where(value == 255, torch.nan, value.float()) if name != "depth" else value.float()
    if name == "depth":
        return {"X": shown.numpy(), "cmap": "magma_r", "vmin": 0, "vmax": 10}
    if name in ("saliency", "edge"):
        return {"X": shown.numpy(), "cmap": "gray", "vmin": 0, "vmax": 1}
    return {"X": shown.numpy(), "cmap": "tab20", "vmin": 0, "vmax": 19, "interpolation": "nearest"}


def predictions_figure(
    images: Tensor, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor] | None = None
) -> Any:
    """Predictions beside the ground truth: a row per image, one or two columns per task; ignored pixels are red.

    Args:
        images: (B, 3, H, W) in [0, 1].
        predictions: by task, as `Task.predict` gives them, (B, C, H, W) or (B, H, W).
        targets: by task, as in a sample; None where there is no truth.

    Returns:
        A matplotlib Figure.
    """
    sources = [("prediction", predictions)] if targets is None else [("truth", targets), ("prediction", predictions)]
    columns = [(name, label, source) for name in predictions for label, source in sources]
    figure, axes = _figure(len(images), 1 + len(columns))
    for row, image in enumerate(images):
        axes[row, 0].imshow(_pixels(image))
        for column, (name, label, source) in enumerate(columns, start=1):
            axes[row, column].imshow(**_drawn(name, source[name][row]))
            axes[row, column].set_facecolor("tab:red")  # shows where a label is to be ignored
            if row == 0:
                axes[row, column].set_title(f"{name}\n{label}", fontsize=8)
    return figure


def curves_figure(curves: Mapping[str, Sequence[float]], ylabel: str) -> Any:
    """Training curves by name, one line each, over steps; smoothed over a fiftieth of their length."""
    figure, axes = _figure(1, 1, cell=(7.0, 4.0))
    axis = axes[0, 0]
    for name, values in curves.items():
        values = torch.tensor(values)
        window = max(len(values) // 50, 1)
        smooth = values.unfold(0, window, 1).mean(-1)
        axis.plot(torch.arange(len(smooth)) + window, smooth, label=name, linewidth=1)
    axis.set_xticks(range(0, max(map(len, curves.values())) + 1, max(max(map(len, curves.values())) // 10, 1)))
    axis.tick_params(labelsize=8)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(require("matplotlib.ticker", extra="train").LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(require("matplotlib.ticker", extra="train").ScalarFormatter())
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)
    return figure
