"""Four small frozen experts that ship with the package, each of which learned one thing about `tiger_fast.data.Scenes`.

What each one knows is known, so a router over them can be checked: semantics should be asked for classes, geometry for
depth and normals, boundaries for edges and appearance for saliency. `tiger_fast.training.specialists` trains them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiger_fast._extras import require, unknown
from tiger_fast.experts.base import Expert

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Specialist:
    """One entry of the registry: what a specialist is called, its shape, and what it was trained to predict."""

    name: str
    patch_size: int  # even: the stem halves the image
    dim: int
    pretext: str


SPECIALISTS: dict[str, Specialist] = {
    entry.name: entry
    for entry in (
        Specialist("semantics", 6, 64, "the class of each pixel"),
        Specialist("geometry", 10, 48, "the depth and surface normal of each pixel"),
        Specialist("boundaries", 8, 40, "whether a thing ends at each pixel"),
        Specialist(
            "appearance", 4, 32, "which pixels' hue stands out, and each pixel's colour against the image's mean"
        ),
    )
}


class SpecialistNet(nn.Module):
    """Patchify and a few blocks of depthwise convolution, attention and MLP, then a linear map to standardised tokens.

    Args:
        patch_size: side of a patch in pixels, even.
        dim: width of the output tokens; small, so that they carry what the pretext needs and little else.
        width: width of the blocks.
        depth: number of blocks.
    """

    def __init__(self, patch_size: int, dim: int, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, width, patch_size // 2, stride=patch_size // 2),
        )
        self.place = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, dim)
        self.register_buffer("token_mean", torch.zeros(dim))
        self.register_buffer("token_std", torch.ones(dim))

    def forward(self, images: Tensor) -> Tensor:
        """Conditioned images (B, 3, h * patch_size, w * patch_size) to tokens (B, h * w, dim)."""
        x = self.stem(images)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.place(_centres(height, width, x))
        for block in self.blocks:
            x = block(x, height, width)
        return (self.head(self.norm(x)) - self.token_mean) / self.token_std


class Block(nn.Module):
    """Residual depthwise 5 x 5 convolution, multi-head attention over all tokens, and MLP."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.local = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (height, width))
        x = x + self.local(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def _centres(height: int, width: int, like: Tensor) -> Tensor:
    """Token centres (h * w, 2) as (y, x) in (-1, 1)."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) * (2 / height) - 1
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) * (2 / width) - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def load_specialists(names: Sequence[str] | None = None, folder: Path | str = WEIGHTS) -> list[Expert]:
    """The named specialists with their shipped weights, in the order asked for; all of `SPECIALISTS` by default.

    Args:
        names: names in `SPECIALISTS`.
        folder: where ``NAME.safetensors`` lies, if other weights than the shipped ones are wanted.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: an unknown name (the near match is named), or a weights file that is missing, corrupt or foreign.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of names, got the string {names!r}")
    return [_load(_find(name), Path(folder)) for name in (SPECIALISTS if names is None else names)]


def build_specialist(entry: Specialist) -> Expert:
    """An untrained specialist of the entry's shape."""
    return Expert(entry.name, SpecialistNet(entry.patch_size, entry.dim), entry.patch_size, entry.dim)


def _find(name: str) -> Specialist:
    if name in SPECIALISTS:
        return SPECIALISTS[name]
    raise unknown("specialist", name, SPECIALISTS)


def _load(entry: Specialist, folder: Path) -> Expert:
    safetensors = require("safetensors.torch", extra="train")
    path = folder / f"{entry.name}.safetensors"
    expert = build_specialist(entry)
    try:
        state = safetensors.load(path.read_bytes())
        expert.backbone.load_state_dict({name: value.float() for name, value in state.items()})
    except FileNotFoundError:
        raise ValueError(f"no weights for specialist {entry.name!r} at {path}") from None
    except Exception as error:  # safetensors' own error type, or a RuntimeError on names and shapes that do not fit
        raise ValueError(f"{path} does not hold the weights of specialist {entry.name!r}: {error}") from error
    return expert
