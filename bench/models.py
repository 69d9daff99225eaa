"""What is measured of the models: the Router, the TIGER head, a training step in each of its modes, the counterfactual pass.

A head takes random tokens of frozen experts, which are no part of it: projections, interactions, routing, decoder. A training
step is the objective, the gradients and AdamW.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

import tiger_fast
from bench import timing
from bench.cases import BOTH, DIRECTIONS, FORWARD
from bench.presets import Settings, Sizes
from tiger_fast.models import TIGER, ExpertSpec, TIGERSettings
from tiger_fast.models.presets import CLIP_B, CLIP_L, DINOV2_B, DINOV2_L, MODES, OWLV2_L, SAM_B
from tiger_fast.models.tasks import Task, nyud_tasks, pascal_tasks, semantic_segmentation
from tiger_fast.nn import CounterfactualLoss

SENTENCE = 384  # width of the sentence embeddings; random ones cost the same and need no encoder
# Of outputs, and of the gradient as one vector relative to its largest entry. The gradient of a whole model in float32 moves
# by about 1e-4 with the order of sums, in 16 bits by a few percent.
TOLERANCES = {"float32": 2e-3, "bfloat16": 0.1, "float16": 5e-2}

# Subject -> its directions; a step's is the counterfactual mode, or "none".
SUBJECTS: dict[str, tuple[str, ...]] = {
    "router": DIRECTIONS,
    "head": DIRECTIONS,
    "step": ("none", *MODES),
    "counterfactual_pass": (BOTH,),
}

Outputs = tuple[list[Tensor], list[Tensor]]


class Model:
    """One of `SUBJECTS`, with its inputs.

    Args:
        subject, direction: which.
        sizes: see `Sizes`; C is the classes of the first task.
        settings: of the run.
    """

    def __init__(self, subject: str, direction: str, sizes: Sizes, settings: Settings) -> None:
        self.subject, self.direction, self.sizes, self.settings = subject, direction, sizes, settings
        torch.manual_seed(0)
        build = _router if subject == "router" else _counterfactual_pass if subject == "counterfactual_pass" else _head
        self.function, self.trained = build(self)
        self._cotangents: list[Tensor] | None = None
        # A learning rate of 0: all of AdamW's work, and every call, whoever makes it, finds the same parameters.
        self._optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True) if subject == "step" else None

    @property
    def device(self) -> str:
        """Where everything is."""
        return self.settings.device

    def randn(self, *shape: int) -> Tensor:
        """Inputs of that shape, in the type of the activations where nothing casts them."""
        return torch.randn(shape, device=self.device)

    def call(self, backend: str, function: Callable[[], Sequence[Tensor]] | None = None) -> Callable[[], Outputs]:
        """A call without arguments that returns outputs and fresh gradients of what is trained, as far as it is reached; a
        step's has the optimiser step, too.

        Args:
            backend: what the calls within it run on.
            function: in the model's own place (compiled).
        """
        function = function or self.function

        def both() -> Outputs:
            with tiger_fast.use_backend(backend):
                with self._autocast():
                    outputs = [t for t in function() if t.is_floating_point()]
                graded = [t for t in outputs if t.requires_grad]
                found = torch.autograd.grad(graded, self.trained, self._cotangents_for(graded), allow_unused=True)
            return [t.detach() for t in outputs], [gradient for gradient in found if gradient is not None]

        def forward() -> Outputs:
            with torch.no_grad(), tiger_fast.use_backend(backend), self._autocast():
                return list(function()), []

        def step() -> Outputs:
            with tiger_fast.use_backend(backend):
                with self._autocast():
                    (objective,) = function()
                objective.backward()
            gradients = [p.grad for p in self.trained if p.grad is not None]
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            return [objective.detach()], gradients

        return step if self._optimizer else forward if self.direction == FORWARD else both

    def _autocast(self) -> torch.autocast:
        dtype = self.settings.torch_dtype
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def _cotangents_for(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        if self._cotangents is None:
            draw = torch.Generator(self.device).manual_seed(1)
            self._cotangents = [
                torch.ones_like(t)
                if not t.dim()
                else torch.randn(t.shape, generator=draw, device=self.device).to(t.dtype)
                for t in outputs
            ]
        return self._cotangents

    # -- parts of a head -----------------------------------------------------------------------------------------------

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of N tokens: the preset's, or the squarest there are."""
        rows, columns = self.settings.preset.grid
        if rows * columns == self.sizes.N:
            return rows, columns
        rows = next(r for r in range(math.isqrt(self.sizes.N), 0, -1) if self.sizes.N % r == 0)
        return rows, self.sizes.N // rows

    @cached_property
    def tasks(self) -> list[Task]:
        """T tasks, the papers', again under other names where they are more."""
        papers = nyud_tasks() if self.sizes.T <= 4 else pascal_tasks()
        papers[0] = semantic_segmentation(self.sizes.C)
        many = [(i, papers[i % len(papers)]) for i in range(self.sizes.T)]
        return [task if i < len(papers) else replace(task, name=f"{task.name}_{i}") for i, task in many]

    @cached_property
    def specs(self) -> list[ExpertSpec]:
        """M experts, the papers', again under other names where they are more."""
        papers = [CLIP_B, DINOV2_B, SAM_B] if self.sizes.M <= 3 else [CLIP_L, DINOV2_L, SAM_B, OWLV2_L]
        return [replace(papers[i % len(papers)], name=f"{i}") for i in range(self.sizes.M)]

    def tiger(self, mode: str) -> TIGER:
        """The head with a counterfactual mode; "none" leaves the counterfactual step out."""
        preset, n = self.settings.preset, self.sizes
        architecture = TIGERSettings(
            grid=self.grid,
            patch_size=preset.patch_size,
            dim=n.D,
            hidden=preset.hidden,
            rank=n.R,
            router_hidden=n.D,
            num_heads=n.heads,
            decoder=preset.decoder,
            query_width=preset.query_width,
        ).replace(counterfactual={"weight": 0.0} if mode == "none" else {"mode": mode})
        with torch.device(self.device):
            return TIGER(architecture, self.tasks, self.specs, embeddings=torch.randn(n.T, SENTENCE))

    def images(self) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        return torch.rand(self.sizes.B, 3, *self.pixels, device=self.device)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of images and targets."""
        return self.grid[0] * self.settings.preset.patch_size, self.grid[1] * self.settings.preset.patch_size

    def features(self) -> list[Tensor]:
        """The experts' tokens."""
        return [self.randn(self.sizes.B, self.sizes.N, spec.dim) for spec in self.specs]

    def targets(self) -> dict[str, Tensor]:
        """Random targets by task."""
        batch, (height, width) = self.sizes.B, self.pixels

        def target(task: Task) -> Tensor:
            kind = task.name.partition("_")[0]
            if kind == "depth":
                return torch.rand(batch, 1, height, width, device=self.device) * 5 + 0.5
            if kind == "normals":
                return F.normalize(self.randn(batch, 3, height, width), dim=1)
            if kind == "edge":
                return torch.randint(2, (batch, 1, height, width), device=self.device).float()
            return torch.randint(task.channels, (batch, height, width), device=self.device)

        return {task.name: target(task) for task in self.tasks}


Built = tuple[Callable[[], Sequence[Tensor]], list[Tensor]]


def _router(model: Model) -> Built:
    n, dtype = model.sizes, model.settings.torch_dtype
    with torch.device(model.device):
        router = tiger_fast.Router(n.D, n.M, SENTENCE, n.R)
    query, *experts = (model.randn(n.B, n.N, n.D).to(dtype).requires_grad_() for _ in range(1 + n.M))
    task = model.randn(n.T, SENTENCE)
    return lambda: router(query, experts, task), [query, *experts, *router.parameters()]


def _head(model: Model) -> Built:
    head = model.tiger("none" if model.subject == "head" else model.direction)
    images, features = model.images(), model.features()
    trained = [p for p in head.parameters() if p.requires_grad]
    if model.subject == "head":

        def outputs() -> list[Tensor]:
            predictions, weights = head(images, features=features)
            return [*predictions.values(), weights]

        return outputs, trained
    targets = model.targets()
    return lambda: [head.objective(targets, images, features=features).total], trained


def _counterfactual_pass(model: Model) -> Built:
    # What a step in mode "decode" does beyond one in mode "none": M decodes of what is left, and the alignment loss.
    head = model.tiger("decode")
    targets = model.targets()
    with torch.no_grad():
        experts, routed = head.route(model.images(), model.features())
        full = head.token_losses(head.decode(routed.tokens), targets)
    weights = routed.weights.requires_grad_()
    loss = CounterfactualLoss(head.decode, head.token_losses)
    return lambda: [loss(experts, weights, targets, full=full).loss], [weights]


def disagreement(ours: Outputs, theirs: Outputs) -> float:
    """The larger error of the outputs and of the gradient. The latter as one vector: some of its parts are 0 but for rounding
    (the bias of a key), and have no relative error."""
    if [g.shape for g in ours[1]] != [g.shape for g in theirs[1]]:
        return math.inf
    error = timing.error(ours[0], theirs[0])
    if not ours[1]:
        return error
    one, other = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours[1], theirs[1]))
    return max(error, timing.error(one, other))
