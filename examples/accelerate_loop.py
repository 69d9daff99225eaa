"""tiger_fast.Router under Hugging Face Accelerate: one script for one CPU, several GPUs or mixed precision.

python examples/accelerate_loop.py                              # a few seconds on a CPU
torchrun --nproc-per-node 2 examples/accelerate_loop.py         # the same in two processes
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from tiger_fast import CounterfactualLoss, Router
from tiger_fast.data import CachedSamples, Scenes
from tiger_fast.experts import load_specialists
from tiger_fast.nn import QueryEncoder, TokenLosses
from tiger_fast.nn.losses import DepthL1, NormalsL1, mean_over_valid, token_mean

EXPERTS, GRID, DIM = ("semantics", "geometry", "appearance"), (12, 16), 64
LOSSES = {"depth": (1, DepthL1()), "normals": (3, NormalsL1())}  # channels, and a loss per pixel


class Model(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.project = nn.ModuleList(nn.Sequential(nn.Linear(w, DIM), nn.LayerNorm(DIM)) for w in widths)
        self.query = QueryEncoder(DIM, patch_size=8)
        self.task = nn.Parameter(torch.randn(len(LOSSES), 32))
        self.router = Router(DIM, len(widths), task_dim=32, rank=8)
        heads = [nn.Sequential(nn.Conv2d(DIM, 64 * c, 1), nn.PixelShuffle(8)) for c, _ in LOSSES.values()]
        self.heads = nn.ModuleList(heads)

    def forward(self, images, features):
        experts = torch.stack([project(f) for project, f in zip(self.project, features)], dim=1)
        tokens, weights = self.router(self.query(images, GRID), experts, self.task)
        return self.decode(tokens), weights, experts

    def decode(self, tokens):  # (B, T, N, D) to maps (B, C, H, W)
        maps = tokens.mT.unflatten(3, GRID)
        return [head(maps[:, t]) for t, head in enumerate(self.heads)]


def pixel_losses(predictions, batch):
    return [loss(y, batch[task]) for (task, (_, loss)), y in zip(LOSSES.items(), predictions)]


def token_losses(predictions, batch):  # (B, T, N), with the tokens that have a labelled pixel
    values, valid = zip(*(token_mean(loss, GRID) for loss in pixel_losses(predictions, batch)))
    return TokenLosses(torch.stack(values, dim=1), torch.stack(valid, dim=1))


def main(epochs=6):
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    experts = load_specialists(EXPERTS)
    data = CachedSamples(Scenes(48), experts, GRID, workers=0)
    model = Model([expert.dim for expert in experts])
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    loader = DataLoader(data, batch_size=8, shuffle=True)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    # The removals are decoded without a graph, so outside whatever wraps the model for several processes.
    counterfactual = CounterfactualLoss(accelerator.unwrap_model(model).decode, token_losses)
    for epoch in range(epochs):
        for batch in loader:
            predictions, weights, mixed = model(batch["image"], batch["features"])
            loss = sum(mean_over_valid(pixels) for pixels in pixel_losses(predictions, batch))
            causal = counterfactual(mixed, weights, batch)
            optimiser.zero_grad()
            accelerator.backward(loss + causal.loss)
            optimiser.step()
        # Both figures are of this process; their means over processes are those of the whole batch.
        loss, divergence = accelerator.reduce(torch.stack([loss, causal.loss]).detach(), "mean").tolist()
        accelerator.print(f"epoch {epoch}  loss {loss:.4f}  divergence of weights from causes {divergence:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
