"""`python -m tiger_fast infer PHOTOGRAPH`: predictions and routing maps of the shipped tiger-tiny head."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tiger_fast import models
from tiger_fast._extras import require
from tiger_fast.models import TIGER
from tiger_fast.viz import predictions_figure, routing_figure

SHIPPED = Path(models.__file__).parent / "weights" / "tiger-tiny.safetensors"


def fit_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centred crop with the aspect ratio of `size`, resized to it: (3, h, w) -> (3, H, W), in [0, 1]."""
    height, width = image.shape[-2:]
    scale = min(height / size[0], width / size[1])
    rows, columns = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - rows) // 2, (width - columns) // 2
    crop = image[None, :, top : top + rows, left : left + columns]
    return F.interpolate(crop, size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def read_image(path: Path) -> Tensor:
    """A picture file, upright, as (3, H, W) float32 in [0, 1]; transparency is dropped, grey becomes RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a picture that can be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    pillow = require("PIL.Image", extra="train")
    upright = require("PIL.ImageOps", extra="train").exif_transpose
    numpy = require("numpy", extra="train")
    try:
        with pillow.open(path) as picture:
            pixels = numpy.asarray(upright(picture).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 255


@torch.no_grad()
def infer(model: TIGER, image: Tensor, out: Path) -> list[Path]:
    """Write predictions.png, routing.png and predictions.npz for one image (3, H, W) in [0, 1]; returns their paths."""
    numpy = require("numpy", extra="train")
    image = fit_image(image, model.settings.image_size)
    output = model.eval()(image[None])
    predictions = {task.name: task.predict(output.predictions[task.name]) for task in model.tasks}
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / name for name in ("predictions.png", "routing.png", "predictions.npz")]
    predictions_figure(image[None], predictions).savefig(paths[0], dpi=150)
    figure = routing_figure(image, output.weights[0], model.task_names, model.expert_names, model.settings.grid)
    figure.savefig(paths[1], dpi=150)
    arrays = {name: value[0].numpy() for name, value in predictions.items()}
    numpy.savez_compressed(paths[2], **arrays, routing_weights=output.weights[0].numpy())
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a photograph, predict, print what was found and where the pictures are."""
    options = argparse.ArgumentParser(prog="python -m tiger_fast infer", description=__doc__)
    options.add_argument("photograph", type=Path)
    options.add_argument("--model", type=Path, default=SHIPPED, help="a file that TIGER.save wrote")
    options.add_argument("--out", type=Path, default=Path("runs/infer"), help="folder for the results")
    chosen = options.parse_args(arguments)
    try:
        model, image = TIGER.load(chosen.model), read_image(chosen.photograph)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    paths = infer(model, image, chosen.out)
    print("wrote " + ", ".join(map(str, paths)))
