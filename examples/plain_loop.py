"""tiger_fast.Router in a plain PyTorch loop: frozen experts and a decoder of your own, two tasks.

python examples/plain_loop.py        # a few seconds on a CPU, nothing to download
"""

import torch
from torch import nn
from torch.nn.functional import pixel_unshuffle

from tiger_fast import CounterfactualLoss, Router
from tiger_fast.data import CachedSamples, Scenes
from tiger_fast.experts import load_specialists
from tiger_fast.nn import TokenLosses

EXPERTS, TASKS, GRID, DIM = ("geometry", "boundaries", "appearance"), ("depth", "edge"), (12, 16), 64


class Model(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.project = nn.ModuleList(nn.Sequential(nn.Linear(w, DIM), nn.LayerNorm(DIM)) for w in widths)
        self.query = nn.Conv2d(3, DIM, 8, stride=8)  # the pixels of a token, 8 x 8, say what is asked there
        self.task = nn.Parameter(torch.randn(len(TASKS), 32))  # or TaskInstructionEncoder([...])()
        self.router = Router(DIM, len(widths), task_dim=32, rank=8)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, 64)) for _ in TASKS)

    def forward(self, images, features):
        experts = torch.stack([project(f) for project, f in zip(self.project, features)], dim=1)  # (B, M, N, D)
        tokens, weights = self.router(self.query(images).flatten(2).mT, experts, self.task)
        return self.decode(tokens), weights, experts

    def decode(self, tokens):  # (B, T, N, D) to the pixels of every token, (B, T, N, 64)
        return torch.stack([head(tokens[:, t]) for t, head in enumerate(self.heads)], dim=1)


def losses(predictions, target):  # the mean over each token's labelled pixels, and whether it has any: (B, T, N)
    values, valid = target
    error = (predictions - values).abs() * valid
    return TokenLosses(error.sum(-1) / valid.sum(-1).clamp(min=1), valid.any(-1))


def targets(batch):  # depth in units of 10 m, 0 where unknown; edges, 255 where unknown
    pixels = torch.stack([pixel_unshuffle(batch[t], 8).flatten(2).mT for t in TASKS], dim=1)
    valid = torch.stack([pixels[:, 0] > 0, pixels[:, 1] <= 1], dim=1)
    return pixels * torch.tensor([0.1, 1.0]).view(2, 1, 1), valid


def main(steps=40):
    torch.manual_seed(0)
    experts = load_specialists(EXPERTS)  # any frozen modules will do: what counts is their tokens on one grid
    data = CachedSamples(Scenes(48), experts, GRID, workers=0)
    model = Model([expert.dim for expert in experts])
    counterfactual = CounterfactualLoss(model.decode, losses)  # takes any decoder, and any loss per token
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        batch = data.batch(torch.randint(len(data), (8,)))
        predictions, weights, mixed = model(batch["image"], batch["features"])
        full = losses(predictions, targets(batch))
        causal = counterfactual(mixed, weights, targets(batch), full=full)
        loss = full.values[full.valid].mean()
        optimiser.zero_grad()
        (loss + causal.loss).backward()
        optimiser.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss:.4f}  divergence of weights from causes {causal.loss:.4f}")
    for task, shares in zip(TASKS, weights.detach().mean((0, 2)).tolist()):
        print(f"{task:6s}" + "".join(f"  {name} {share:.2f}" for name, share in zip(EXPERTS, shares)))


if __name__ == "__main__":
    main()
