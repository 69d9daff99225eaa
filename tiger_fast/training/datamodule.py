"""Scenes for the trainer, with the experts' tokens in memory, in an order that is a function of seed and step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tiger_fast._extras import require
from tiger_fast.data import HELDOUT_OFFSET, TRAIN_OFFSET, CachedSamples, Scenes

LightningDataModule = require("lightning", extra="train").LightningDataModule

Batch = dict[str, Any]


class TrainBatches:
    """Training batches without end: the batch of step s depends on the seed, s and the global batch size alone.

    A pass visits the samples in a random order of its own and leaves out what does not fill a global batch. In a
    process group of W ranks, the ranks' batches of one step, one after the other, are the batch that one process with
    W times the batch size has at that step. Iteration starts at `position`, which `state_dict` keeps, so that a
    resumed run goes on where it stopped, in the middle of a pass too.

    Args:
        samples: at least batch_size * world of them.
        batch_size: B of this rank.
        seed: of the order.
        rank, world: this process among how many.
    """

    def __init__(self, samples: CachedSamples, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if len(samples) < batch_size * world:
            raise ValueError(
                f"a batch of {batch_size} on each of {world} processes needs {batch_size * world} training scenes, "
                f"got {len(samples)}"
            )
        self.samples, self.batch_size, self.seed, self.rank, self.world = samples, batch_size, seed, rank, world
        self.position = 0
        self._pass: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Steps of one pass."""
        return len(self.samples) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            indices = self.indices(self.position)
            self.position += 1
            yield self.samples.batch(indices)

    def indices(self, step: int) -> Tensor:
        """This rank's samples at `step`, (B,) int64."""
        number, place = divmod(step, len(self))
        if self._pass is None or self._pass[0] != number:
            # Seeds of the generator that differ by one give unrelated permutations.
            generator = torch.Generator().manual_seed((self.seed << 32) + number)
            self._pass = number, torch.randperm(len(self.samples), generator=generator)
        start = (place * self.world + self.rank) * self.batch_size
        return self._pass[1][start : start + self.batch_size]

    def _order(self) -> dict[str, int]:
        return {"scenes": len(self.samples), "global batch": self.batch_size * self.world, "seed": self.seed}

    def state_dict(self) -> dict[str, int]:
        """The next step, and what the order depends on."""
        return {"position": self.position, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`; ValueError if it is of another order."""
        for name, value in self._order().items():
            if state[name] != value:
                raise ValueError(f"the checkpoint was made with {name} {state[name]}, this run has {name} {value}")
        self.position = state["position"]


class EvaluationBatches:
    """Every sample once, in order, as evenly as possible over the same number of batches on every rank.

    Equal numbers matter: losses add up counts over the ranks, and all of them have to come.
    """

    def __init__(self, samples: CachedSamples, batch_size: int, rank: int = 0, world: int = 1) -> None:
        steps = -(-len(samples) // (batch_size * world))
        if len(samples) < steps * world:
            raise ValueError(
                f"{len(samples)} validation scenes do not give each of {world} processes one at every step: "
                "take more scenes or a larger batch"
            )
        self.samples = samples
        self._parts = torch.arange(len(samples)).tensor_split(steps * world)[rank::world]

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        for indices in self._parts:
            yield self.samples.batch(indices) | {"index": indices}


class SceneData(LightningDataModule):
    """The embedded scenes at the model's image size, with its experts' tokens, rendered once and kept in memory.

    Args:
        train_size: training scenes.
        val_size: held-out scenes, for validation and prediction.
        batch_size: B of every process.
        val_batch_size: the same in validation; None: batch_size.
        seed: of the training order.
        workers: processes that render; the batches do not depend on their number.
    """

    def __init__(
        self,
        train_size: int = 2000,
        val_size: int = 200,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 2,
    ) -> None:
        super().__init__()
        sizes = {"train_size": train_size, "val_size": val_size, "batch_size": batch_size}
        if val_batch_size is not None:
            sizes["val_batch_size"] = val_batch_size
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed must be from 0 to 2^31 - 1, got {seed}")
        self.train_size, self.val_size, self.batch_size = train_size, val_size, batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.seed, self.workers = seed, workers
        self._cached: dict[Any, tuple[CachedSamples, list[torch.nn.Module]]] = {}
        self._batches: TrainBatches | None = None
        self._resumed: dict[str, int] | None = None

    def setup(self, stage: str) -> None:
        """A new fit begins at step 0, unless a checkpoint is loaded after this."""
        if stage == "fit":
            self._batches = self._resumed = None

    def train_dataloader(self) -> TrainBatches:
        """See `TrainBatches`."""
        samples = self._samples(self.train_size, TRAIN_OFFSET)
        batches = TrainBatches(samples, self.batch_size, self.seed, self.trainer.global_rank, self.trainer.world_size)
        if self._batches is not None:
            batches.position = self._batches.position
        elif self._resumed is not None:
            batches.load_state_dict(self._resumed)
        self._batches = batches
        return batches

    def val_dataloader(self) -> EvaluationBatches:
        """See `EvaluationBatches`."""
        samples = self._samples(self.val_size, HELDOUT_OFFSET)
        return EvaluationBatches(samples, self.val_batch_size, self.trainer.global_rank, self.trainer.world_size)

    def predict_dataloader(self) -> EvaluationBatches:
        """The held-out scenes."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, int]:
        """The place in the training order."""
        return {} if self._batches is None else self._batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a checkpoint."""
        self._resumed = state_dict

    def _samples(self, size: int, offset: int) -> CachedSamples:
        module = self.trainer.lightning_module
        model = module.model
        if len(model.experts) != len(model.expert_specs):
            raise ValueError(
                f"SceneData asks the model's experts for their tokens, and of {model.expert_names} some are "
                "specifications only: build the model with experts"
            )
        height, width = model.settings.image_size
        # The experts' identity, not only their names: two models may have experts of one name and other weights.
        key = (size, offset, height, width, tuple(model.settings.grid), tuple(id(e) for e in model.experts))
        if key not in self._cached:
            experts = [_asked_on(expert, module.device) for expert in model.experts]
            scenes = Scenes(size, offset, height, width)
            samples = CachedSamples(scenes, experts, model.settings.grid, self.workers)
            self._cached[key] = samples, list(model.experts)  # while they live, no other expert gets their identity
        return self._cached[key][0]


def _asked_on(expert: torch.nn.Module, device: torch.device) -> Any:
    def ask(images: Tensor, grid: tuple[int, int]) -> Tensor:
        return expert(images.to(device), grid).cpu()

    return ask
