"""Train the four specialists on scenes nobody else uses, and probe what their tokens know.

    python -m tiger_fast.training.specialists                # train all four, write the weights, print the probe table
    python -m tiger_fast.training.specialists --probe        # the table alone, for the weights that ship

Each specialist learns one pretext, through a head that is linear in its tokens: a token predicts the 8 x 8 pixels it
covers, so that tokens carry layout finer than themselves. The head is then dropped. Three of the four see colours
shuffled and faded during training, so that they cannot lean on them; appearance sees them as they are.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiger_fast._extras import require
from tiger_fast.data.scenes import (
    IGNORE_INDEX,
    NUM_CLASSES,
    SPECIALIST_HELDOUT_OFFSET,
    SPECIALIST_OFFSET,
    Scenes,
)
from tiger_fast.experts.base import Expert
from tiger_fast.experts.specialists import SPECIALISTS, WEIGHTS, build_specialist, load_specialists

GRID = (12, 16)
CELL = 8  # pixels of a 96 x 128 image along a side of a token
LUMA = (0.299, 0.587, 0.114)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Pretext:
    """What a specialist predicts, per pixel, and how wrong it is."""

    channels: int
    loss: Callable[[Tensor, Batch], Tensor]  # prediction (B, channels, H, W), batch -> scalar
    shuffle_colours: bool


def semantics_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy; classes weigh as 1 / sqrt(their share of the batch), so that rare ones count without ruling."""
    target = batch["semseg"]
    counts = torch.bincount(target[target != IGNORE_INDEX], minlength=NUM_CLASSES).clamp(min=1)
    return F.cross_entropy(prediction, target, weight=counts.float().rsqrt(), ignore_index=IGNORE_INDEX)


def geometry_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """L1 of depth in metres plus three times L1 of the normals, over valid pixels: about equal shares of the sum."""
    valid = (batch["depth"] > 0).float()
    depth = (prediction[:, :1] - (batch["depth"] - 3.5)).abs()  # 3.5 m: about the mean depth, so heads begin near it
    normals = (prediction[:, 1:] - batch["normals"]).abs().mean(dim=1, keepdim=True)
    return ((depth + 3.0 * normals) * valid).sum() / valid.sum()


def boundaries_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy, boundaries (6 % of the pixels) weighing five times as much as the rest."""
    return _balanced_bce(prediction, batch["edge"])


def appearance_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of what stands out, plus L1 of each pixel's chroma against its image's mean chroma."""
    chroma = _chroma(batch["image"])
    relative = 10.0 * (chroma - chroma.mean(dim=(2, 3), keepdim=True))  # a deviation of about 1
    return _balanced_bce(prediction[:, :1], batch["saliency"].unsqueeze(1)) + 0.5 * F.l1_loss(
        prediction[:, 1:], relative
    )


PRETEXTS: dict[str, Pretext] = {
    "semantics": Pretext(NUM_CLASSES, semantics_loss, shuffle_colours=True),
    "geometry": Pretext(4, geometry_loss, shuffle_colours=True),
    "boundaries": Pretext(1, boundaries_loss, shuffle_colours=True),
    "appearance": Pretext(3, appearance_loss, shuffle_colours=False),
}


def _balanced_bce(prediction: Tensor, target: Tensor) -> Tensor:
    valid = target != IGNORE_INDEX
    five = torch.tensor(5.0)
    return F.binary_cross_entropy_with_logits(prediction[valid], target[valid].float(), pos_weight=five)


def _luma(images: Tensor) -> Tensor:
    return sum(weight * images[:, i : i + 1] for i, weight in enumerate(LUMA))


def _chroma(images: Tensor) -> Tensor:
    """Red and blue less luma (B, 2, H, W): colour without lightness."""
    return images[:, 0::2] - _luma(images)


def shuffle_colours(images: Tensor, generator: torch.Generator) -> Tensor:
    """Permute each image's channels and scale its colourfulness by 0 to 1."""
    order = torch.rand(images.shape[0], 3, generator=generator).argsort(dim=1)
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    grey = _luma(images)
    return grey + torch.rand(images.shape[0], 1, 1, 1, generator=generator) * (images - grey)


def load_batch(offset: int, size: int) -> Batch:
    """Scenes offset .. offset + size - 1, stacked."""
    samples = list(Scenes(size, offset=offset))
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def train_specialist(name: str, steps: int, batch_size: int = 8, rate: float = 2e-3, seed: int = 0) -> Expert:
    """Train one specialist on ``steps * batch_size`` scenes, each seen once; AdamW, warm-up and cosine decay."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pretext, expert = PRETEXTS[name], build_specialist(SPECIALISTS[name])
    head = nn.Linear(expert.dim, pretext.channels * CELL * CELL)
    backbone = expert.backbone.requires_grad_(True)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_share(step, steps))
    started = time.perf_counter()
    for step in range(steps):
        batch = load_batch(SPECIALIST_OFFSET + step * batch_size, batch_size)
        images = shuffle_colours(batch["image"], generator) if pretext.shuffle_colours else batch["image"]
        loss = pretext.loss(predict_pixels(head, backbone(expert.condition(images, GRID))), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"{name} {step + 1}/{steps} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)
    backbone.half().float()  # what the file will hold
    backbone.requires_grad_(False)
    standardise(expert, SPECIALIST_OFFSET, 256)
    return expert


def _rate_share(step: int, steps: int, warm: int = 50) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def predict_pixels(head: nn.Linear, tokens: Tensor) -> Tensor:
    """Tokens (B, N, dim) to pixels (B, C, H, W): each token's prediction fills its own 8 x 8 cell."""
    cells = head(tokens).transpose(1, 2).unflatten(2, GRID)
    return F.pixel_shuffle(cells, CELL)


def standardise(expert: Expert, offset: int, count: int) -> None:
    """Set the expert's token statistics so that every channel has mean 0 and deviation 1 over these scenes."""
    net = expert.backbone
    net.token_mean.zero_()
    net.token_std.fill_(1.0)
    tokens = torch.cat([expert(load_batch(start, 16)["image"], GRID) for start in range(offset, offset + count, 16)])
    net.token_mean.copy_(tokens.mean(dim=(0, 1)))
    net.token_std.copy_(tokens.std(dim=(0, 1)))


def save_specialist(expert: Expert, folder: Path) -> Path:
    """Write ``NAME.safetensors``: parameters in float16, token statistics in float32."""
    safetensors = require("safetensors.torch", extra="train")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{expert.name}.safetensors"
    buffers = dict(expert.backbone.named_buffers())
    state = {key: value if key in buffers else value.half() for key, value in expert.backbone.state_dict().items()}
    path.write_bytes(safetensors.save(state))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Probes: a ridge regression from tokens to the pixels of their cells, for every specialist and task.

PROBE_TASKS = {
    "semseg": ("mIoU", True),
    "depth": ("RMSE, m", False),
    "normals": ("mean angle, deg", False),
    "saliency": ("AP", True),
    "edge": ("AP", True),
}


def probe_table(experts: Sequence[Expert], train: int = 400, test: int = 200) -> dict[str, dict[str, float]]:
    """{task: {expert: score}} of linear probes fitted on ``train`` held-out scenes and scored on ``test`` others."""
    fit, held = load_batch(SPECIALIST_HELDOUT_OFFSET, train), load_batch(SPECIALIST_HELDOUT_OFFSET + train, test)
    table: dict[str, dict[str, float]] = {task: {} for task in PROBE_TASKS}
    for expert in experts:
        known, unseen = encode(expert, fit["image"]), encode(expert, held["image"])
        for task in PROBE_TASKS:
            table[task][expert.name] = probe(task, known, fit, unseen, held)
    return table


def encode(expert: Expert, images: Tensor) -> Tensor:
    """An expert's tokens (B, N, C) of images (B, 3, H, W), sixteen at a time."""
    return torch.cat([expert(chunk, GRID) for chunk in images.split(16)])


def probe(
    task: str, tokens: Tensor, batch: Batch, test_tokens: Tensor, test_batch: Batch, ridge: float = 1e-3
) -> float:
    """Fit on tokens (B, N, dim) and a batch, score on others; ignored pixels are 0 to the fit and not scored."""
    target = F.pixel_unshuffle(_probe_target(task, batch), CELL).flatten(2).transpose(1, 2)
    features = _with_bias(tokens)
    gram = features.T @ features
    gram += ridge * features.shape[0] * torch.eye(gram.shape[0], dtype=gram.dtype)
    solution = torch.linalg.solve(gram, features.T @ target.flatten(0, 1).double())
    cells = (_with_bias(test_tokens) @ solution).unflatten(0, test_tokens.shape[:2])
    prediction = F.pixel_shuffle(cells.transpose(1, 2).unflatten(2, GRID), CELL).float()
    return _probe_score(task, prediction, test_batch)


def _with_bias(tokens: Tensor) -> Tensor:
    flat = tokens.flatten(0, 1).double()
    return torch.cat([flat, torch.ones(flat.shape[0], 1, dtype=flat.dtype)], dim=1)


def _probe_target(task: str, batch: Batch) -> Tensor:
    """What the regression aims at, (B, C, H, W)."""
    target = batch[task]
    if task == "semseg":
        return F.one_hot(target.clamp(max=NUM_CLASSES), NUM_CLASSES + 1)[..., :NUM_CLASSES].movedim(-1, 1).float()
    if task in ("saliency", "edge"):
        return (target == 1).float().reshape(target.shape[0], 1, *target.shape[-2:])
    return target


def _probe_score(task: str, prediction: Tensor, batch: Batch) -> float:
    target = batch[task]
    if task == "semseg":
        return _miou(prediction.argmax(dim=1), target)
    if task == "depth":
        return (prediction - target)[target > 0].square().mean().sqrt().item()
    if task == "normals":
        valid = batch["depth"][:, 0] > 0
        cosine = F.cosine_similarity(prediction, target, dim=1)[valid]
        return cosine.clamp(-1, 1).acos().rad2deg().mean().item()
    target = target.reshape(prediction.shape)
    valid = target != IGNORE_INDEX
    return average_precision(prediction[valid], target[valid] == 1)


def _miou(prediction: Tensor, target: Tensor) -> float:
    valid = target != IGNORE_INDEX
    pairs = torch.bincount(target[valid] * NUM_CLASSES + prediction[valid], minlength=NUM_CLASSES**2)
    confusion = pairs.view(NUM_CLASSES, NUM_CLASSES).double()
    hits = confusion.diag()
    return (hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)).mean().item()


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Area under precision over recall, by rank: the mean of precision at each positive."""
    ranked = positive[scores.argsort(descending=True, stable=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, ranked.numel() + 1, dtype=torch.float64)
    return ((precision * ranked).sum() / ranked.sum()).item()


def format_table(table: dict[str, dict[str, float]]) -> str:
    """The probe table as text, the best of each row starred."""
    names = list(next(iter(table.values())))
    lines = [f"{'probe':<28}" + "".join(f"{name:>13}" for name in names)]
    for task, scores in table.items():
        metric, higher = PROBE_TASKS[task]
        best = (max if higher else min)(scores.values())
        row = "".join(f"{scores[name]:>12.3f}{'*' if scores[name] == best else ' '}" for name in names)
        lines.append(f"{task + ' (' + metric + (', up)' if higher else ', down)'):<28}" + row)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the named specialists and write their weights, then print the probe table; or the table alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=list(SPECIALISTS), default=list(SPECIALISTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=800, help="training steps of 8 scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="where weights are written and read")
    parser.add_argument("--probe", action="store_true", help="do not train: probe the weights in --folder")
    options = parser.parse_args(arguments)
    if not options.probe:
        torch.set_num_threads(1)  # the same weights on a machine of any number of cores
        for name in options.names:
            print(save_specialist(train_specialist(name, options.steps, seed=options.seed), options.folder))
    print(format_table(probe_table(load_specialists(options.names, options.folder))))


if __name__ == "__main__":
    main()
