"""A task of your own beside the library's: where could a robot drive? Instruction, head, loss and metric.

python examples/own_task.py        # a few seconds on a CPU, nothing to download
"""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryJaccardIndex

from tiger_fast.data import CLASSES, HELDOUT_OFFSET, CachedSamples, Scenes
from tiger_fast.models import TIGER, Task
from tiger_fast.nn.losses import LossMap


def loss(logits, target):  # per pixel, and which pixels count
    values = binary_cross_entropy_with_logits(logits, target, reduction="none")
    return LossMap(values.squeeze(1), torch.ones_like(values, dtype=torch.bool).squeeze(1))


def head(width, channels, scale):  # from the decoder's last maps to pixels; without one, the decoder's default
    return nn.Sequential(nn.Upsample(scale_factor=scale), nn.Conv2d(width, channels, 3, padding=1))


floor = Task(
    name="floor",
    instruction="Find the free floor that a robot could drive on.",
    channels=1,
    loss=loss,
    weight=3.0,  # lambda of the objective
    metric=BinaryJaccardIndex,
    head=head,
)


def labelled(batch):  # the target stands in the batch under the task's name
    return batch | {"floor": (batch["semseg"] == CLASSES.index("floor")).float()[:, None]}


def main(steps=25):
    torch.manual_seed(0)
    model = TIGER.from_preset("tiger-tiny", tasks=["depth", "edge", floor])
    train, heldout = (
        CachedSamples(Scenes(count, offset), model.experts, model.settings.grid, workers=0)
        for count, offset in ((48, 0), (16, HELDOUT_OFFSET))
    )
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        batch = labelled(train.batch(torch.randint(len(train), (4,))))
        objective = model.objective(batch, batch["image"], features=batch["features"], step=step)
        optimiser.zero_grad()
        objective.total.backward()
        optimiser.step()
        if step % 6 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {objective.total:.4f}  floor {objective.tasks['floor']:.4f}")

    batch = labelled(heldout.batch(torch.arange(len(heldout))))
    with torch.no_grad():
        predictions, weights = model.eval()(batch["image"], features=batch["features"])
    metric = floor.metric()
    metric.update(predictions["floor"], batch["floor"].long())
    shares = weights[:, model.task_names.index("floor")].mean((0, 1)).tolist()
    print(f"floor on held-out scenes: IoU {metric.compute():.3f}; asks", end="")
    print("".join(f"  {name} {share:.2f}" for name, share in zip(model.expert_names, shares)))
    # model.save("own.safetensors") and TIGER.load("own.safetensors", tasks=[*scenes_tasks(), floor]) bring it back.


if __name__ == "__main__":
    main()
