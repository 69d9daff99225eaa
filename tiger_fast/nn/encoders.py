"""From frozen features and images to tokens of one width: ExpertProjection (TIGER eq. 2) and the query encoder."""

import torch.nn.functional as F
from torch import Tensor, nn


class ExpertProjection(nn.Sequential):
    """F' = LayerNorm(FFN(F)), a frozen expert's tokens in the shared width (TIGER eq. 2).

    Args:
        in_dim: C_k, the expert's width.
        hidden: units of the feed-forward network.
        dim: D, the shared width.

    Maps (B, N, C_k) to (B, N, D).
    """

    def __init__(self, in_dim: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.LayerNorm(dim))


class QueryEncoder(nn.Module):
    """A small convolutional stem from the image to query tokens on the token grid (TIGER sec. 3.3).

    Args:
        dim: D.
        patch_size: pixels per token side, a power of two; a stride-2 convolution per factor of two.
        width: channels of the first convolution, doubled at each further one.

    Raises:
        ValueError: for a patch size that is not a power of two.
    """

    def __init__(self, dim: int, patch_size: int, width: int = 16) -> None:
        super().__init__()
        depth = patch_size.bit_length() - 1
        if patch_size != 2**depth or depth < 1:
            raise ValueError(f"patch_size must be a power of two from 2 up, got {patch_size}")
        self.patch_size = patch_size
        layers: list[nn.Module] = []
        channels = 3
        for level in range(depth):
            layers += [
                nn.Conv2d(channels, width << level, 3, stride=2, padding=1),
                nn.GroupNorm(4, width << level),
                nn.GELU(),
            ]
            channels = width << level
        self.stem = nn.Sequential(*layers, nn.Conv2d(channels, dim, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Query tokens.

        Args:
            images: (B, 3, H, W) in [0, 1], any size; resized to grid * patch_size as an expert's are (eq. 1).
            grid: (rows, columns) of the token grid.

        Returns:
            (B, N, D), N = rows * columns, row by row.
        """
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        # Centred on zero: [0, 1] pixels to [-1, 1].
        return self.norm(self.stem(images * 2 - 1).flatten(2).transpose(1, 2))
