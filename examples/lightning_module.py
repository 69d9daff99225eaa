"""tiger_fast.Router inside a LightningModule of your own: semantics and saliency from three frozen experts.

python examples/lightning_module.py        # a few seconds on a CPU, nothing to download
"""

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from tiger_fast import CounterfactualLoss, Router
from tiger_fast.data import NUM_CLASSES, CachedSamples, Scenes
from tiger_fast.experts import load_specialists
from tiger_fast.nn import QueryEncoder, TokenLosses

EXPERTS, TASKS, GRID, DIM = ("semantics", "boundaries", "appearance"), ("semseg", "saliency"), (12, 16), 64


class RoutedExperts(lightning.LightningModule):
    """Frozen experts' tokens -> projection -> Router -> a classifier of every token for each task."""

    def __init__(self, widths, channels=(NUM_CLASSES, 2), lambda_cf=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.project = nn.ModuleList(nn.Sequential(nn.Linear(w, DIM), nn.LayerNorm(DIM)) for w in widths)
        self.query = QueryEncoder(DIM, patch_size=8)
        self.task = nn.Parameter(torch.randn(len(channels), 32))
        self.router = Router(DIM, len(widths), task_dim=32, rank=8)
        self.heads = nn.ModuleList(nn.Linear(DIM, c) for c in channels)
        self.counterfactual = CounterfactualLoss(self.decode, self.losses)  # has no parameters of its own

    def forward(self, images, features):
        experts = torch.stack([project(f) for project, f in zip(self.project, features)], dim=1)
        tokens, weights = self.router(self.query(images, GRID), experts, self.task)
        return self.decode(tokens), weights, experts

    def decode(self, tokens):
        return [head(tokens[:, t]) for t, head in enumerate(self.heads)]

    def losses(self, logits, targets):  # (B, T, N); 255 is a token without a label
        values = [F.cross_entropy(y.mT, t, ignore_index=255, reduction="none") for y, t in zip(logits, targets)]
        return TokenLosses(torch.stack(values, dim=1), torch.stack(targets, dim=1) != 255)

    def training_step(self, batch, _):
        targets = [batch[task][:, 4::8, 4::8].flatten(1) for task in TASKS]  # the label in the middle of each token
        logits, weights, experts = self(batch["image"], batch["features"])
        full = self.losses(logits, targets)
        loss = full.values[full.valid].mean()
        causal = self.counterfactual(experts, weights, targets, full=full)
        self.log_dict({"loss": loss, "divergence": causal.loss})
        if self.global_step % 10 == 0:
            print(f"step {self.global_step:3d}  loss {loss:.4f}  divergence of weights from causes {causal.loss:.4f}")
        return loss + self.hparams.lambda_cf * causal.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main(epochs=6):
    lightning.seed_everything(0)
    experts = load_specialists(EXPERTS)
    data = CachedSamples(Scenes(48), experts, GRID, workers=0)  # asks the frozen experts once
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = RoutedExperts([expert.dim for expert in experts])
    trainer.fit(model, DataLoader(data, batch_size=8, shuffle=True, drop_last=True))
    print(f"after {trainer.global_step} steps  loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
