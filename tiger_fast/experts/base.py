"""What every frozen vision expert is: a backbone with its own input conditioning, behind one interface."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """A frozen backbone that turns images into ``dim``-wide tokens on whatever grid is asked for (TIGER eq. 1).

    The image is resized to ``grid * patch_size`` pixels and conditioned with the expert's own ``mean`` and ``std``, so
    that experts of different patch sizes take the same [0, 1] images and give tokens of the same places. The backbone
    never trains: its parameters ask for no gradient, it stays in evaluation mode, and it runs under no_grad.

    Args:
        name: what routing reports call the expert.
        backbone: maps conditioned images (B, 3, h * patch_size, w * patch_size) to tokens (B, h * w, dim), row-major.
        patch_size: pixels of the resized image along a side of a token.
        dim: width of the tokens.
        mean: per-channel mean of the images (in [0, 1]) that the backbone was trained on.
        std: per-channel deviation of the same.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        patch_size: int,
        dim: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__()
        self.name = name
        self.patch_size = patch_size
        self.dim = dim
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Expert":
        """Stay in evaluation mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h * w, dim), row-major, of images (B, 3, H, W) in [0, 1] on ``grid`` = (h, w).

        Raises:
            TypeError: the images are not a floating-point tensor.
            ValueError: the images are not (B, 3, H, W), or the grid is not two positive integers.
        """
        return self.backbone(self.condition(images, grid))

    def condition(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The backbone's input (B, 3, h * patch_size, w * patch_size): resized and normalised. Raises as `forward`."""
        _check(images, grid)
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        images = images.to(self.mean.dtype)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"name={self.name!r}, patch_size={self.patch_size}, dim={self.dim}"


def _check(images: Tensor, grid: tuple[int, int]) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point with values in [0, 1], got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"grid must be two positive integers (rows, columns of tokens), got {grid!r}")
