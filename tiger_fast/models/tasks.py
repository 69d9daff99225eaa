"""What a dense task is: instruction, channels, loss, weight, metric; and the tasks of the papers' benchmarks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiger_fast._extras import unknown
from tiger_fast.nn.decoder import HeadFactory
from tiger_fast.nn.losses import (
    BalancedCrossEntropy,
    CrossEntropy,
    DepthL1,
    LossMap,
    NormalsL1,
    WeightedBCE,
)

# Weights of the scenes' classes in cross-entropy: 1 / sqrt(share of pixels), scaled to a mean of 1 over pixels, with
# the shares of the first 1,000 training scenes (wall 45 %, window 2 %).
SCENES_CLASS_WEIGHT = (0.84, 0.57, 1.22, 1.84, 2.29, 2.19, 1.41, 1.67, 2.68)

# (target, (rows, columns)) -> (token target, valid (B, N) bool), as functional.counterfactual_losses takes it.
TokenTarget = Callable[[Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


def identity(logits: Tensor) -> Tensor:
    """Logits as they are."""
    return logits


@dataclass(frozen=True)
class Task:
    """A dense task. A task of one's own is one of these; everything but the first four has a default.

    Attributes:
        name: the key of its target in a batch.
        instruction: the sentence that conditions the routing (TIGER sec. 3.2).
        channels: C of its logits.
        loss: (logits (B, C, H, W), target) -> LossMap, per-pixel losses with the pixels that count.
        weight: lambda_j of TIGER eq. 14.
        metric: makes its torchmetrics metric, updated with (logits, target); None: not evaluated.
        predict: logits -> what a user wants to see (classes, metres, unit normals, probabilities).
        head: makes its head; None: the decoder's default.
        token_loss, token_target: the loss's name in `functional.counterfactual_losses` and the token-level target,
            for the "linear" counterfactual mode; None: the task cannot be used in it.
    """

    name: str
    instruction: str
    channels: int
    loss: Callable[[Tensor, Tensor], LossMap]
    weight: float = 1.0
    metric: Callable[[], Any] | None = None
    predict: Callable[[Tensor], Tensor] = identity
    head: HeadFactory | None = None
    token_loss: str | None = None
    token_target: TokenTarget | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a task's name must be an identifier, got {self.name!r}")
        if self.channels < 1:
            raise ValueError(f"task {self.name!r}: channels must be at least 1, got {self.channels}")
        if (self.token_loss is None) != (self.token_target is None):
            raise ValueError(f"task {self.name!r}: token_loss and token_target go together")


def classes(logits: Tensor) -> Tensor:
    """The most likely class of every pixel, (B, C, H, W) -> (B, H, W) int64."""
    return logits.argmax(dim=1)


def unit_vectors(logits: Tensor) -> Tensor:
    """Normals of length 1, (B, 3, H, W)."""
    return F.normalize(logits, dim=1)


def salient_probability(logits: Tensor) -> Tensor:
    """The probability of class 1, (B, 2, H, W) -> (B, 1, H, W)."""
    return logits.softmax(dim=1)[:, 1:]


def non_negative(logits: Tensor) -> Tensor:
    """Depth in metres, at least 0."""
    return logits.clamp(min=0)


def majority_class(num_classes: int, ignore_index: int = 255) -> TokenTarget:
    """Token target for cross-entropy: the class that most of the token's labelled pixels have."""
    return partial(_majority, num_classes, ignore_index)


def _majority(num_classes: int, ignore_index: int, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    # A class that does not exist has no vote here; in the per-pixel loss it is a NaN.
    labelled = (pixels != ignore_index) & (pixels >= 0) & (pixels < num_classes)
    one_hot = F.one_hot(torch.where(labelled, pixels, 0), num_classes) * labelled[..., None]
    votes = _pool(one_hot.movedim(-1, 1).float(), grid)  # (B, N, C)
    return votes.argmax(dim=-1), votes.sum(dim=-1) > 0


def mean_of_valid(is_valid: Callable[[Tensor], Tensor]) -> TokenTarget:
    """Token target for a regression: the mean over the token's pixels where is_valid(target) (B, 1, H, W) holds."""
    return partial(_mean_where, is_valid)


def _mean_where(is_valid: Callable[[Tensor], Tensor], pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    valid = is_valid(pixels)
    share = _pool(valid.float(), grid)  # (B, N, 1)
    total = _pool(torch.where(valid, pixels, 0).float(), grid)
    return total / torch.where(share > 0, share, 1), share[..., 0] > 0


def _measured(depth: Tensor) -> Tensor:
    return (depth > 0) & depth.isfinite()


def _directed(normals: Tensor) -> Tensor:
    return (normals != 0).any(dim=1, keepdim=True) & normals.isfinite().all(dim=1, keepdim=True)


def _labelled(edge: Tensor) -> Tensor:
    return (edge != 255) & edge.isfinite()


def _metric(name: str, *args: Any, **options: Any) -> Any:
    # Metrics need torchmetrics, models do not.
    from tiger_fast import metrics

    return getattr(metrics, name)(*args, **options)


def _pool(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    # (B, C, H, W) -> (B, N, C), means over each token's pixels.
    size = (maps.shape[-2] // grid[0], maps.shape[-1] // grid[1])
    return F.avg_pool2d(maps, size).flatten(2).transpose(1, 2)


def semantic_segmentation(
    num_classes: int,
    *,
    class_weight: Sequence[float] | None = None,
    include_background: bool = True,
    name: str = "semseg",
    instruction: str = "Assign a semantic category, such as wall, floor or furniture, to every pixel of the image.",
    weight: float = 1.0,
) -> Task:
    """Semantic segmentation (or parsing): cross-entropy and mIoU, 255 ignored."""
    metric = partial(_metric, "SegmentationIoU", num_classes, include_background=include_background)
    loss = CrossEntropy(class_weight=class_weight)
    token = {"token_loss": "cross_entropy", "token_target": majority_class(num_classes)}
    return Task(name, instruction, num_classes, loss, weight, metric, classes, **token)


def depth_estimation() -> Task:
    """Monocular depth in metres: L1 where the target is > 0, RMSE."""
    metric = partial(_metric, "DepthRMSE")
    instruction = "Estimate how far every pixel of the image is from the camera, in metres."
    target = mean_of_valid(_measured)
    return Task("depth", instruction, 1, DepthL1(), 1.0, metric, non_negative, None, "l1", target)


def surface_normals() -> Task:
    """Surface normals: L1 on unit vectors, mean angular error in degrees."""
    metric = partial(_metric, "NormalsAngularError")
    instruction = "Predict the three-dimensional direction in which the surface faces at every pixel of the image."
    target = mean_of_valid(_directed)
    return Task("normals", instruction, 3, NormalsL1(), 10.0, metric, unit_vectors, None, "cosine", target)


def saliency_detection() -> Task:
    """Salient objects: balanced two-class cross-entropy, maxF."""
    metric = partial(_metric, "SaliencyMaxF")
    instruction = "Find the object whose appearance stands out and draws attention first in the image."
    token = {"token_loss": "cross_entropy", "token_target": majority_class(2)}
    return Task("saliency", instruction, 2, BalancedCrossEntropy(), 5.0, metric, salient_probability, **token)


def boundary_detection() -> Task:
    """Object boundaries: weighted binary cross-entropy, boundary F."""
    metric = partial(_metric, "BoundaryF")
    instruction = "Detect the boundaries and contours that separate objects and regions in the image."
    target = mean_of_valid(_labelled)
    return Task("edge", instruction, 1, WeightedBCE(), 50.0, metric, torch.sigmoid, None, "bce", target)


def human_parsing() -> Task:
    """PASCAL-Context's human parts: 7 classes, 255 ignored."""
    instruction = "Assign a human body part, such as head, torso, arm or leg, to every pixel of each person."
    return semantic_segmentation(7, name="parts", instruction=instruction, weight=2.0)


def nyud_tasks() -> list[Task]:
    """NYUD-v2: semseg (40 classes, no background), depth, normals, edge, with the protocol's lambdas."""
    return [
        semantic_segmentation(40, include_background=False),
        depth_estimation(),
        surface_normals(),
        boundary_detection(),
    ]


def pascal_tasks() -> list[Task]:
    """PASCAL-Context: semseg (21 classes), parts, saliency, normals, edge, with the protocol's lambdas."""
    return [
        semantic_segmentation(21),
        human_parsing(),
        saliency_detection(),
        surface_normals(),
        boundary_detection(),
    ]


def scenes_tasks() -> list[Task]:
    """The embedded scenes: semseg (frequency-weighted), depth, normals, saliency, edge, with the protocol's lambdas."""
    from tiger_fast.data.scenes import NUM_CLASSES

    return [
        semantic_segmentation(NUM_CLASSES, class_weight=SCENES_CLASS_WEIGHT),
        depth_estimation(),
        surface_normals(),
        saliency_detection(),
        boundary_detection(),
    ]


TASK_SETS: dict[str, Callable[[], list[Task]]] = {
    "nyud": nyud_tasks,
    "pascal": pascal_tasks,
    "scenes": scenes_tasks,
}


def library_task(name: str, channels: int, instruction: str, weight: float) -> Task:
    """The library's task of that name, number of channels, instruction and weight.

    Raises:
        ValueError: if there is none: it was somebody's own.
    """
    for tasks in TASK_SETS.values():
        for task in tasks():
            if (task.name, task.channels, task.instruction, task.weight) == (name, channels, instruction, weight):
                return task
    own = f"task {name!r} ({channels} channels, weight {weight}, {instruction!r})"
    raise ValueError(f"{own} is not one of the library's: pass it in tasks=")


def select_tasks(names: Sequence[str], among: Sequence[Task]) -> list[Task]:
    """The tasks called `names`, in that order.

    Raises:
        ValueError: for a name that none of them has; names the near match.
    """
    known = {task.name: task for task in among}
    for name in names:
        if name not in known:
            raise unknown("task", name, known)
    return [known[name] for name in names]
