"""TIGER: frozen experts -> projection -> interaction -> routing -> task interaction -> decoder (TIGER sec. 3)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from tiger_fast import _checks as check
from tiger_fast._extras import unknown
from tiger_fast._ranges import phase
from tiger_fast.functional import Routed
from tiger_fast.models.checkpoint import read_checkpoint, write_checkpoint
from tiger_fast.models.presets import REMOVALS, ExpertSpec, TIGERSettings, preset
from tiger_fast.models.tasks import TASK_SETS, Task, library_task, select_tasks
from tiger_fast.nn import (
    CounterfactualLoss,
    ExpertInteraction,
    ExpertProjection,
    FirstOrderCounterfactual,
    LinearCounterfactual,
    QueryEncoder,
    Router,
    SharedDecoder,
    TaskInstructionEncoder,
    TaskInteraction,
    TokenLosses,
)
from tiger_fast.nn.counterfactual import FirstOrderRecord
from tiger_fast.nn.losses import LossMap, mean_over_valid, token_mean


class TIGEROutput(NamedTuple):
    """predictions: logits (B, C, H, W) by task; weights: the routing weights (B, T, N, M)."""

    predictions: dict[str, Tensor]
    weights: Tensor


class Objective(NamedTuple):
    """The terms of TIGER eq. 14.

    total: what to call backward on. tasks: each task's loss, unweighted, without gradient. counterfactual: L_cf without
    gradient, or None where the step was not taken, or is known only after backward ("first_order": see `record`).
    weights: (B, T, N, M), without gradient. delta: eq. 8, (B, T, N, M or sampled), or None; valid: the tokens that
    count, (B, T, N) bool. record: of the "first_order" mode, filled by backward.
    """

    total: Tensor
    tasks: dict[str, Tensor]
    counterfactual: Tensor | None
    weights: Tensor
    delta: Tensor | None
    valid: Tensor
    record: FirstOrderRecord | None


class TIGER(nn.Module):
    """Task-instruction-guided routing of frozen vision experts for dense multi-task prediction (TIGER sec. 3).

    Args:
        settings: the architecture.
        tasks: T tasks, in the order of the task dimension everywhere.
        experts: M frozen experts (modules as in tiger_fast.experts), or `ExpertSpec`s whose features are given to
            `forward`. Modules are moved with the model and kept in eval mode, but are not in its state_dict.
        embeddings: the instructions' sentence embeddings (T, E); None: encode them (or, where the settings use
            learnable embeddings, none are needed).

    Raises:
        ValueError: for no task or expert, a repeated name, or a task that the counterfactual mode cannot use.
    """

    def __init__(
        self,
        settings: TIGERSettings,
        tasks: Sequence[Task],
        experts: Sequence[nn.Module | ExpertSpec],
        *,
        embeddings: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.tasks = settings, list(tasks)
        self.expert_specs = [ExpertSpec(e.name, e.dim, e.patch_size) for e in experts]
        for kind, names in (("task", self.task_names), ("expert", self.expert_names)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{kind}s must be at least one, each with a name of its own, got {names}")
        if embeddings is not None and embeddings.shape[:1] != (len(self.tasks),):
            raise ValueError(f"embeddings must be ({len(self.tasks)}, E), one per task, got {tuple(embeddings.shape)}")
        self.experts = nn.ModuleList(e for e in experts if isinstance(e, nn.Module))
        self.experts.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_leave_experts_out)
        self.register_load_state_dict_pre_hook(_put_experts_back)
        # Losses with tensors of their own follow this model, and no other that has the same tasks, to its device.
        self.losses = nn.ModuleDict({t.name: deepcopy(t.loss) for t in self.tasks if isinstance(t.loss, nn.Module)})

        s = settings
        instructions = [task.instruction for task in self.tasks] if embeddings is None else embeddings
        self.instruction_encoder = TaskInstructionEncoder(instructions, learnable=not s.instructions)
        task_dim = self.instruction_encoder.dim
        self.projections = nn.ModuleList(ExpertProjection(e.dim, s.hidden, s.dim) for e in self.expert_specs)
        interaction = {"dim": s.dim, "num_heads": s.num_heads, "scope": s.scope, "attention": s.attention}
        self.expert_interaction = ExpertInteraction(**interaction) if s.expert_interaction else None
        self.query_encoder, self.router = None, None
        if s.routing == "learned":
            self.query_encoder = QueryEncoder(s.dim, s.patch_size, s.query_width)
            self.router = Router(s.dim, len(self.expert_specs), task_dim, s.rank, s.router_hidden)
        self.task_interaction = TaskInteraction(**interaction) if s.task_interaction else None
        self.decoder = SharedDecoder(
            s.dim,
            task_dim,
            [task.channels for task in self.tasks],
            s.patch_size,
            s.decoder,
            [task.head for task in self.tasks],
        )
        self._build_counterfactual()

    def _build_counterfactual(self) -> None:
        s, cf = self.settings, self.settings.counterfactual
        self.linear_heads = self.first_order = None
        if cf.weight and cf.mode == "linear":
            for task in self.tasks:
                if task.token_loss is None:
                    raise ValueError(
                        f'counterfactual mode "linear" needs token_loss and token_target of task {task.name!r}'
                    )
            channels = [task.channels for task in self.tasks]
            self.linear_heads = LinearCounterfactual(s.dim, channels, [task.token_loss for task in self.tasks])
        if cf.weight and cf.mode == "first_order":
            self.first_order = FirstOrderCounterfactual(tau=cf.tau, eps=cf.eps)

    def _counterfactual(self, removal: str, **options: Any) -> CounterfactualLoss:
        # Made for each call: kept in the model, which it would refer to, it would leave every model to the cyclic
        # garbage collector.
        cf = self.settings.counterfactual
        return CounterfactualLoss(self.decode, self.token_losses, tau=cf.tau, eps=cf.eps, removal=removal, **options)

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in order."""
        return [task.name for task in self.tasks]

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts, in order."""
        return [spec.name for spec in self.expert_specs]

    # -- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        tasks: Sequence[Task | str] | None = None,
        experts: Sequence[nn.Module | ExpertSpec | str] | None = None,
        embeddings: Tensor | None = None,
        **changes: Any,
    ) -> Self:
        """A model by name.

        Args:
            name: "tiger-tiny" (embedded data), "tiger-b" or "tiger-l" (the papers' sizes).
            tasks: tasks, or names among the preset's; None: all of the preset's.
            experts: experts or names among the preset's; None: all of the preset's.
            embeddings: see the class.
            changes: settings that differ from the preset's (`TIGERSettings.replace`).

        Raises:
            ValueError: for an unknown preset, task, expert or setting; names the near match.
        """
        chosen = preset(name)
        among = TASK_SETS[chosen.tasks]()
        given = among if tasks is None else [t if isinstance(t, Task) else select_tasks([t], among)[0] for t in tasks]
        settings = chosen.settings.replace(**changes)
        return cls(
            settings, given, _resolve_experts(chosen.experts if experts is None else experts), embeddings=embeddings
        )

    def save(self, path: str | Path) -> None:
        """Write settings and trainable weights to a .safetensors file, whole or not at all (no expert's weights)."""
        metadata = {
            "settings": self.settings.to_dict(),
            "tasks": [{key: getattr(task, key) for key in _SAVED_OF_TASKS} for task in self.tasks],
            "experts": [spec.__dict__ for spec in self.expert_specs],
        }
        write_checkpoint(path, "TIGER", metadata, self.state_dict())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        tasks: Sequence[Task] | None = None,
        experts: Sequence[nn.Module | ExpertSpec | str] | None = None,
    ) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.
            tasks: the tasks that it was made with; may be left out where all of them are the library's.
            experts: the experts, in the order that it was made with; None: the library's by name, where it has them,
                else specifications, and `forward` then takes features.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a file that is corrupt, foreign, or of other tasks or experts.
        """
        metadata, tensors = read_checkpoint(path, "TIGER")
        try:
            settings = TIGERSettings.from_dict(metadata["settings"])
            saved_tasks = [{key: saved[key] for key in _SAVED_OF_TASKS} for saved in metadata["tasks"]]
            specs = [ExpertSpec(**spec) for spec in metadata["experts"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has a header that this tiger_fast cannot read: {error!r}") from error
        chosen = [
            library_task(**saved) if tasks is None else select_tasks([saved["name"]], tasks)[0] for saved in saved_tasks
        ]
        resolved = _resolve_experts(specs if experts is None else experts, prefer_modules=experts is None)
        found = [ExpertSpec(e.name, e.dim, e.patch_size) for e in resolved]
        if found != specs:
            raise ValueError(f"{path} was made with experts {specs}, got {found}")
        embeddings = tensors.get("instruction_encoder.embeddings", tensors.get("instruction_encoder.prompt"))
        model = cls(settings, chosen, resolved, embeddings=embeddings)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the tasks and settings that it names: {error}") from error
        return model

    # -- the forward pass --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def extract(self, images: Tensor) -> list[Tensor]:
        """The frozen experts' tokens, M tensors (B, N, C_k), of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: if the model was made with specifications instead of experts.
        """
        if len(self.experts) != len(self.expert_specs):
            missing = [n for n in self.expert_names if n not in {e.name for e in self.experts}]
            raise ValueError(
                f"experts {missing} are specifications only: pass features= instead, or build with modules"
            )
        with phase("tiger.experts"):
            return [expert(images, self.settings.grid) for expert in self.experts]

    def forward(self, images: Tensor | None = None, *, features: Sequence[Tensor] | None = None) -> TIGEROutput:
        """Predict every task.

        Args:
            images: (B, 3, H, W) in [0, 1]; the experts' inputs where `features` is None, and the query encoder's.
            features: the experts' tokens, M tensors (B, N, C_k), for instance from a cache.
                Without images the query is the mean of the projected experts: train and use a model in one way.

        Returns:
            TIGEROutput; logits have the size `settings.image_size`.

        Raises:
            ValueError: if neither is given, or features do not fit the experts.
        """
        _, routed = self.route(images, features)
        return TIGEROutput(self.decode(routed.tokens), routed.weights)

    def route(
        self,
        images: Tensor | None = None,
        features: Sequence[Tensor] | None = None,
        *,
        absent: int | None = None,
    ) -> tuple[Tensor, Routed]:
        """Up to the mixture: what is mixed, (B, M, N, D), and what `Router` returns.

        With `absent` the expert of that index takes no part from the start: not in the interaction, not in the mixture.
        """
        features = self._features(images, features)
        present = [k for k in range(len(features)) if k != absent]
        if not present:
            raise ValueError("the only expert cannot be absent")
        with phase("tiger.adapters"):
            experts = torch.stack([self.projections[k](features[k]) for k in present], dim=1)
        if self.expert_interaction is not None:
            with phase("tiger.expert_interaction"):
                experts = self.expert_interaction(experts)
        with phase("tiger.router"):
            if self.router is None:
                return experts, self._mean(experts)
            if images is None:
                query = F.layer_norm(experts.mean(dim=1), experts.shape[-1:])
            else:
                query = self.query_encoder(images, self.settings.grid)
            # Under autocast a LayerNorm returns float32 and an interaction bfloat16: one type for the router.
            return experts, self.router.mix(query.to(experts.dtype), experts, self.instruction_encoder())

    def _mean(self, experts: Tensor) -> Routed:
        shape = (experts.shape[0], len(self.tasks), experts.shape[2], experts.shape[1])
        tokens = experts.mean(dim=1)[:, None].expand(-1, len(self.tasks), -1, -1)
        return Routed(tokens, experts.new_full(shape, 1 / experts.shape[1], dtype=torch.float32))

    def _features(self, images: Tensor | None, features: Sequence[Tensor] | None) -> list[Tensor]:
        if images is not None:
            shape = check.activation("images", images, "B 3 H W").shape
            if shape[1] != 3:
                raise ValueError(f"images must be (B, 3, H, W), got {tuple(shape)}")
        elif features is None:
            raise ValueError("forward needs images (B, 3, H, W) or features (M tensors (B, N, C_k))")
        if features is None:
            return self.extract(images)
        if len(features) != len(self.expert_specs):
            raise ValueError(f"features must be one per expert, {self.expert_names}, got {len(features)}")
        tokens = self.settings.grid[0] * self.settings.grid[1]
        first = check.tensor("features[0]", features[0] if images is None else images)
        for spec, feature in zip(self.expert_specs, features, strict=True):
            name = f"features of expert {spec.name!r}"
            check.shape(name, check.floating(name, feature), (first.shape[0], tokens, spec.dim))
            check.device(name, feature, first.device, "images or the first expert's")
        return list(features)

    def decode(self, tokens: Tensor) -> dict[str, Tensor]:
        """Routed tokens (B, T, N, D) to logits by task: task interaction, decoder, heads."""
        if self.task_interaction is not None:
            with phase("tiger.task_interaction"):
                tokens = self.task_interaction(tokens)
        with phase("tiger.decoder"):
            logits = self.decoder(tokens, self.instruction_encoder(), self.settings.grid)
        return dict(zip(self.task_names, logits, strict=True))

    # -- losses ------------------------------------------------------------------------------------------------------

    def loss_maps(self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, LossMap]:
        """Per-pixel losses of the tasks that have a target, logits resized to it where the sizes differ."""
        maps = {}
        for task in self.tasks:
            if task.name in targets:
                logits, target = predictions[task.name], targets[task.name]
                if logits.shape[-2:] != target.shape[-2:]:
                    logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
                loss = self.losses[task.name] if task.name in self.losses else task.loss
                with phase("tiger.losses"):
                    maps[task.name] = loss(logits, target)
        return maps

    def token_losses(self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> TokenLosses:
        """Per-pixel losses averaged over each token's valid pixels (TIGER sec. 3.5): (B, T, N) with a mask.

        Tokens without a valid pixel, and tasks without a target, do not count.
        """
        return self._per_token(self.loss_maps(predictions, self._own(targets)))

    def _per_token(self, maps: Mapping[str, LossMap]) -> TokenLosses:
        pooled = {name: token_mean(loss_map, self.settings.grid) for name, loss_map in maps.items()}
        values, valid = next(iter(pooled.values()))
        nothing = torch.zeros_like(values), torch.zeros_like(valid)
        columns = [pooled.get(name, nothing) for name in self.task_names]
        return TokenLosses(torch.stack([c[0] for c in columns], dim=1), torch.stack([c[1] for c in columns], dim=1))

    def objective(
        self,
        targets: Mapping[str, Tensor],
        images: Tensor | None = None,
        *,
        features: Sequence[Tensor] | None = None,
        step: int = 0,
    ) -> Objective:
        """The training objective (TIGER eq. 14): task losses with their lambda_j plus lambda_cf times L_cf.

        Args:
            targets: by task; a task without one is left out of this batch, and what is not a task's is ignored. In a
                process group all ranks must have the same tasks' targets.
            images, features: as in `forward`.
            step: number of the training step, for `counterfactual.every`.
        """
        cf = self.settings.counterfactual
        wanted = cf.weight > 0 and step % cf.every == 0
        targets = self._own(targets)
        experts, routed = self.route(images, features)
        tokens, record, extra = routed.tokens, None, None
        if wanted and self.first_order is not None:
            tokens, extra, record = self.first_order(tokens, experts, routed.weights)
        maps = self.loss_maps(self.decode(tokens), targets)
        losses = {name: mean_over_valid(loss_map) for name, loss_map in maps.items()}
        with torch.no_grad():
            full = self._per_token(maps)
        total = torch.stack([task.weight * losses[task.name] for task in self.tasks if task.name in losses]).sum()
        aligned = delta = None
        if record is not None:
            record.count(full.valid)
            total = total + cf.weight * extra
        elif self.linear_heads is not None:
            # The heads learn at every step: they are no worse informed when they are asked, and no step leaves
            # parameters without a gradient, which DistributedDataParallel would take for an error.
            with phase("tiger.counterfactual"):
                delta, counted, own = self.linear_heads(experts, routed.weights, self._token_targets(targets))
            total = total + own
            if wanted:
                aligned = self._counterfactual("mixture").align(delta, routed.weights, counted)
                total = total + cf.weight * aligned
        elif wanted and cf.removal == "input":
            delta = self._input_differences(targets, images, features, full)
            aligned = self._counterfactual("mixture").align(delta, routed.weights, full.valid)
            total = total + cf.weight * aligned
        elif wanted:
            step_of = self._counterfactual(cf.removal, renormalize=cf.renormalize, sampled=cf.sampled)
            aligned, delta, _ = step_of(experts, routed.weights, targets, full=full)
            total = total + cf.weight * aligned
        return Objective(
            total,
            {name: loss.detach() for name, loss in losses.items()},
            None if aligned is None else aligned.detach(),
            routed.weights.detach(),
            delta,
            full.valid,
            record,
        )

    def _own(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: targets[name] for name in self.task_names if name in targets}
        if not own:
            raise ValueError(f"targets has none of the model's tasks {self.task_names}, but {list(targets)}")
        return own

    def _token_targets(self, targets: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor] | None]:
        return [
            task.token_target(targets[task.name], self.settings.grid) if task.name in targets else None
            for task in self.tasks
        ]

    @torch.no_grad()
    def differences(
        self,
        targets: Mapping[str, Tensor],
        images: Tensor | None = None,
        *,
        features: Sequence[Tensor] | None = None,
        removal: str = "mixture",
    ) -> tuple[Tensor, Tensor]:
        """Counterfactual differences (TIGER eq. 8) of a batch, for evaluation.

        Args:
            targets, images, features: as in `objective`.
            removal: "mixture", "task" or "input", see `CounterfactualSettings`.

        Returns:
            delta (B, T, N, M) and valid (B, T, N) bool.
        """
        if removal not in REMOVALS:
            raise unknown("removal", removal, REMOVALS)
        targets = self._own(targets)
        features = self._features(images, features)
        experts, routed = self.route(images, features)
        full = self.token_losses(self.decode(routed.tokens), targets)
        if removal == "input":
            return self._input_differences(targets, images, features, full), full.valid
        return self._counterfactual(removal).differences(experts, routed.weights, targets, full=full)

    @torch.no_grad()
    def _input_differences(
        self,
        targets: Mapping[str, Tensor],
        images: Tensor | None,
        features: Sequence[Tensor] | None,
        full: TokenLosses,
    ) -> Tensor:
        features = self._features(images, features)
        without = []
        with phase("tiger.counterfactual"):
            for k in range(len(features)):
                _, routed = self.route(images, features, absent=k)
                without.append(self.token_losses(self.decode(routed.tokens), targets).values)
        return torch.stack([losses - full.values for losses in without], dim=-1)

    # -- housekeeping ------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode, for all but the frozen experts: theirs is evaluation, always."""
        super().train(mode)
        self.experts.eval()
        return self

    def trainable_parameters(self) -> dict[str, int]:
        """Number of trainable parameters of each part, and their sum under "total"."""
        counts = {
            name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in self.named_children()
        }
        counts = {name: count for name, count in counts.items() if count}
        return counts | {"total": sum(counts.values())}


# What tells a task of one's own from one of the library's.
_SAVED_OF_TASKS = ("name", "channels", "instruction", "weight")


def _leave_experts_out(module: TIGER, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    # Frozen experts are loaded from their own files: a checkpoint of a head stays small, and loading one into a model
    # with other copies of the same experts is no error. A function of the module's, not a closure: models pickle.
    for key in [key for key in state if key.startswith(f"{prefix}experts.")]:
        del state[key]


def _put_experts_back(module: TIGER, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key, value in module.experts.state_dict(prefix=f"{prefix}experts.").items():
        state.setdefault(key, value)


def _resolve_experts(
    experts: Sequence[nn.Module | ExpertSpec | str], *, prefer_modules: bool = False
) -> list[nn.Module | ExpertSpec]:
    # Names are the embedded specialists'; specifications become those too if asked to and if there are such.
    from tiger_fast.experts import SPECIALISTS, load_specialists

    resolved = []
    for expert in experts:
        known = isinstance(expert, ExpertSpec) and prefer_modules and expert.name in SPECIALISTS
        if isinstance(expert, str) or known:
            expert = load_specialists([expert if isinstance(expert, str) else expert.name])[0]
        resolved.append(expert)
    return resolved
