"""The decoder that all tasks share, conditioned on the task, with a head per task (TIGER sec. 3.1)."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# (width of the decoder's last stage, channels of the task, upscale to pixels) -> a module from
# (B, width, h, w) to (B, channels, h * upscale, w * upscale).
HeadFactory = Callable[[int, int, int], nn.Module]


def pixel_shuffle_head(width: int, channels: int, upscale: int) -> nn.Module:
    """The default head: a 1x1 convolution that predicts the pixels of a cell, laid out by PixelShuffle."""
    return nn.Sequential(nn.Conv2d(width, channels * upscale**2, 1), nn.PixelShuffle(upscale))


class _Block(nn.Module):
    """3x3 convolution, GroupNorm, scale and shift by the task, GELU; a residual where the widths agree."""

    def __init__(self, inputs: int, outputs: int, task_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(_groups(outputs), outputs)
        self.film = nn.Linear(task_dim, 2 * outputs)
        # Scale 1 and shift 0 at first: conditioning on the task is learned.
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        scale, shift = self.film(task)[..., None, None].chunk(2, dim=-3)
        y = self.norm(self.conv(x)).unflatten(0, (-1, task.shape[-2]))
        y = F.gelu(y * (1 + scale) + shift).flatten(0, 1)
        return x + y if x.shape == y.shape else y


def _groups(channels: int) -> int:
    # 8 or more channels a group keeps the statistics stable on small grids.
    return next(
        groups for groups in (16, 8, 4, 2, 1) if channels % groups == 0 and channels // groups >= 8 or groups == 1
    )


class SharedDecoder(nn.Module):
    """Routed tokens to per-pixel logits: shared stages, each after the first at twice the size, then task heads.

    GroupNorm throughout, so that the counterfactual decodes leave no trace in running statistics.

    Args:
        dim: D, the width of the tokens.
        task_dim: E, the width of the task representation that conditions the blocks.
        channels: C of each task.
        patch_size: pixels per token side in the output; a multiple of 2^(stages - 1).
        stages: (width, blocks) of each stage.
        heads: a factory for each task; None: `pixel_shuffle_head`.

    Raises:
        ValueError: for a patch size that the stages do not divide, or lists of different lengths.
    """

    def __init__(
        self,
        dim: int,
        task_dim: int,
        channels: Sequence[int],
        patch_size: int,
        stages: Sequence[tuple[int, int]],
        heads: Sequence[HeadFactory | None] | None = None,
    ) -> None:
        super().__init__()
        doublings = len(stages) - 1
        if doublings < 0 or patch_size % 2**doublings:
            raise ValueError(
                f"patch_size {patch_size} is not a multiple of 2^{doublings}, what {len(stages)} stages need"
            )
        heads = heads or [None] * len(channels)
        if len(heads) != len(channels):
            raise ValueError(f"heads must be one per task, {len(channels)}, got {len(heads)}")
        self.stages = nn.ModuleList()
        width = dim
        for stage_width, blocks in stages:
            stage = nn.ModuleList(
                _Block(width if i == 0 else stage_width, stage_width, task_dim) for i in range(blocks)
            )
            self.stages.append(stage)
            width = stage_width
        upscale = patch_size // 2**doublings
        self.heads = nn.ModuleList(
            (factory or pixel_shuffle_head)(width, count, upscale)
            for factory, count in zip(heads, channels, strict=True)
        )

    def forward(self, tokens: Tensor, task: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Decode every task.

        Args:
            tokens: (B, T, N, D).
            task: (T, E).
            grid: (rows, columns), rows * columns = N.

        Returns:
            T logits (B, C_t, rows * patch_size, columns * patch_size).

        Raises:
            ValueError: if tokens, task and heads are not of as many tasks, or the grid is not of N tokens.
        """
        tasks = len(self.heads)
        if tokens.dim() != 4 or tokens.shape[1] != tasks or task.shape[-2:-1] != (tasks,):
            shapes = f"{tuple(tokens.shape)} and {tuple(task.shape)}"
            raise ValueError(f"tokens must be (B, {tasks}, N, D) and task ({tasks}, E), got {shapes}")
        if grid[0] * grid[1] != tokens.shape[2]:
            raise ValueError(f"grid {tuple(grid)} is not of the {tokens.shape[2]} tokens")
        x = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        for level, stage in enumerate(self.stages):
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            for block in stage:
                x = block(x, task)
        maps = x.unflatten(0, (-1, tasks))
        return [head(maps[:, index]) for index, head in enumerate(self.heads)]
