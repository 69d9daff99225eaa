"""The counterfactual step: what happens to each token's loss when an expert is left out (TIGER sec. 3.5)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from tiger_fast import _checks as check
from tiger_fast import functional
from tiger_fast._extras import unknown
from tiger_fast._ranges import phase
from tiger_fast.nn.losses import mean_over_ranks

REMOVALS = ("mixture", "task")


class TokenLosses(NamedTuple):
    """Losses per token: values (B, T, N) in float32, and valid (B, T, N) bool, or None if every token counts."""

    values: Tensor
    valid: Tensor | None


class Counterfactual(NamedTuple):
    """loss: the alignment loss, eq. 13, a scalar; delta: eq. 8, (B, T, N, M); valid: (B, T, N) bool or None."""

    loss: Tensor
    delta: Tensor
    valid: Tensor | None


class CounterfactualLoss(nn.Module):
    """Aligns routing weights with each expert's causal contribution (TIGER eqs. 8-13), for any decoder and router.

    Expert k is taken out of the mixture, what is left is decoded under no_grad, and the rise of each token's loss
    is expert k's contribution there. Only the routing weights get a gradient. BatchNorm layers of the decoder keep
    their running statistics.

    In a process group the mean is over the tokens of all ranks, so that every rank has to make the call; with
    `sampled`, all of them with torch's CPU generator in the same state.

    Args:
        decode: tokens (B, T, N, D) -> predictions of any kind. An nn.Module, or a method of one, has its BatchNorm
            layers protected. Dropout draws afresh at every decode, which is noise in the differences: leave it out,
            or decode in eval mode.
        loss: (predictions, target) -> per-token losses (B, T, N), or `TokenLosses` with the tokens that count.
        tau: temperature of eq. 10.
        eps: of eq. 9.
        removal: "mixture" takes an expert out of all tasks' mixtures at once, M decodes; "task" out of one task's at a
            time, T M.
        renormalize: the others' weights add up to 1 again. The paper masks: False.
        sampled: number of experts, drawn at random at each call, that are taken out; the routing weights are then
            compared within those. None, or M and more: all.
        batched: with removal "mixture", decode all removals as one batch, the target repeated along dimension 0; None:
            only on a GPU (the loop needs M times less memory), and only where no BatchNorm of the decoder would
            normalise by that larger batch.
        backend: forced for the kernels; None chooses by device.

    Raises:
        ValueError: for an unknown removal, tau <= 0, eps < 0, or sampled < 2 (one expert has nothing to be compared
            with).
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Any],
        loss: Callable[[Any, Any], Tensor | TokenLosses],
        *,
        tau: float = 1.0,
        eps: float = 1e-6,
        removal: str = "mixture",
        renormalize: bool = False,
        sampled: int | None = None,
        batched: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if removal not in REMOVALS:
            raise unknown("removal", removal, REMOVALS)
        check.temperature(tau, eps)
        if sampled is not None and sampled < 2:
            raise ValueError(f"sampled must be at least 2, got {sampled}")
        # Kept out of the module tree: the decoder belongs to somebody else's state_dict.
        self._decode, self._loss = (decode,), (loss,)
        self.tau, self.eps, self.removal, self.renormalize = tau, eps, removal, renormalize
        self.sampled, self.batched, self.backend = sampled, batched, backend

    def forward(
        self,
        experts: Sequence[Tensor] | Tensor,
        weights: Tensor,
        target: Any,
        *,
        full: Tensor | TokenLosses | None = None,
    ) -> Counterfactual:
        """The alignment loss of one batch.

        Args:
            experts: what was mixed, M tensors (B, N, D), or (B, M, N, D).
            weights: the routing weights (B, T, N, M); they get the gradient.
            target: handed to `loss`.
            full: the losses of the full mixture if the training step has them already; else they are decoded here.

        Returns:
            Counterfactual. With `sampled`, delta is of the drawn experts only.
        """
        members = len(experts) if not isinstance(experts, Tensor) else experts.shape[1]
        chosen = list(range(members))
        if self.sampled is not None and self.sampled < members:
            chosen = sorted(torch.randperm(members)[: self.sampled].tolist())
        delta, valid = self.differences(experts, weights, target, full=full, chosen=chosen)
        if len(chosen) < members:
            weights = torch.stack([weights[..., k] for k in chosen], dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return Counterfactual(self.align(delta, weights, valid), delta, valid)

    def align(self, delta: Tensor, weights: Tensor, valid: Tensor | None = None) -> Tensor:
        """Eqs. 9-13 for differences from anywhere: mean over the tokens that count, over all processes."""
        loss = functional.alignment_loss(delta, weights, tau=self.tau, eps=self.eps, mask=valid, backend=self.backend)
        count = loss.new_full((), delta[..., 0].numel()) if valid is None else valid.sum()
        return mean_over_ranks(loss * count, count)

    @torch.no_grad()
    def differences(
        self,
        experts: Sequence[Tensor] | Tensor,
        weights: Tensor,
        target: Any,
        *,
        full: Tensor | TokenLosses | None = None,
        chosen: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Eq. 8 without the alignment: (delta (B, T, N, len(chosen)), valid (B, T, N) or None)."""
        with phase("tiger.counterfactual"), _statistics_kept(self._decode[0]) as by_batch:
            mixtures = functional.leave_one_out(
                experts, weights, renormalize=self.renormalize, backend=self.backend
            )  # (B, T, M, N, D)
            chosen = range(mixtures.shape[2]) if chosen is None else chosen
            present = None
            if full is None or self.removal == "task":
                present = self._mixture(experts, weights)
            full = self._token_losses(present, target) if full is None else _as_token_losses(full)
            if full.values.shape != weights.shape[:3]:
                raise ValueError(
                    f"loss must give {tuple(weights.shape[:3])}, one per token, got {tuple(full.values.shape)}"
                )
            if self.removal == "mixture":
                batched = mixtures.is_cuda and not by_batch if self.batched is None else self.batched
                without = self._without_for_all(mixtures, chosen, target, batched)
            else:
                without = self._without_for_each(mixtures, present, chosen, target)
            return torch.stack([losses - full.values for losses in without], dim=-1), full.valid

    def _token_losses(self, tokens: Tensor, target: Any) -> TokenLosses:
        return _as_token_losses(self._loss[0](self._decode[0](tokens), target))

    @staticmethod
    def _mixture(experts: Sequence[Tensor] | Tensor, weights: Tensor) -> Tensor:
        stacked = experts if isinstance(experts, Tensor) else torch.stack(tuple(experts), dim=1)
        return torch.einsum("btnm,bmnd->btnd", weights.to(stacked.dtype), stacked)

    def _without_for_all(self, mixtures: Tensor, chosen: Sequence[int], target: Any, batched: bool) -> list[Tensor]:
        if not batched:
            return [self._token_losses(mixtures[:, :, k], target).values for k in chosen]
        tokens = torch.cat([mixtures[:, :, k] for k in chosen])
        repeated = tree_map_only(Tensor, lambda t: torch.cat([t] * len(chosen)), target)
        return list(self._token_losses(tokens, repeated).values.chunk(len(chosen)))

    def _without_for_each(self, mixtures: Tensor, present: Tensor, chosen: Sequence[int], target: Any) -> list[Tensor]:
        without = []
        for k in chosen:
            losses = []
            for task in range(present.shape[1]):
                tokens = present.clone()
                tokens[:, task] = mixtures[:, task, k]
                losses.append(self._token_losses(tokens, target).values[:, task])
            without.append(torch.stack(losses, dim=1))
        return without


def _as_token_losses(losses: Tensor | TokenLosses) -> TokenLosses:
    return losses if isinstance(losses, TokenLosses) else TokenLosses(losses, None)


@contextmanager
def _statistics_kept(decode: Callable) -> Iterator[bool]:
    # A BatchNorm that does not track normalises by the batch, as in training, and updates nothing. Yields whether one
    # of them normalises by the batch, so that a token's loss depends on what else is in it.
    owner = decode if isinstance(decode, nn.Module) else getattr(decode, "__self__", None)
    layers = owner.modules() if isinstance(owner, nn.Module) else ()
    by_batch = [m for m in layers if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)]
    tracking = [m for m in by_batch if m.track_running_stats]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield bool(by_batch)
    finally:
        for layer in tracking:
            layer.track_running_stats = True


class LinearCounterfactual(nn.Module):
    """Counterfactual differences of linear token heads, without decoding anything (TIGER eq. 8, mode "linear").

    A head per task is trained beside the model on detached features, so that it measures and does not steer; all
    heads share one product with the experts.

    Args:
        dim: D.
        channels: C of each task's head.
        losses: each task's loss, a name of `functional.counterfactual_losses`.
        backend: forced for the kernel; None chooses by device.
    """

    def __init__(self, dim: int, channels: Sequence[int], losses: Sequence[str], *, backend: str | None = None) -> None:
        super().__init__()
        self.channels, self.losses, self.backend = list(channels), list(losses), backend
        self.heads = nn.Linear(dim, sum(self.channels))

    def forward(
        self, experts: Tensor, weights: Tensor, targets: Sequence[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differences, and the heads' own loss.

        Args:
            experts: (B, M, N, D).
            weights: (B, T, N, M).
            targets: for each task (token target, valid (B, N) bool), or None if it has no target in this batch.

        Returns:
            delta (B, T, N, M) and valid (B, T, N), both without gradient, and the mean loss of the heads, a scalar
            whose gradient reaches the heads alone.
        """
        # Without the bias, which is whole in every left-out logit while the others' weights do not add up to 1.
        projections = F.linear(experts.detach(), self.heads.weight)
        weights = weights.detach()
        delta, valid, own = [], [], []
        parts = zip(projections.split(self.channels, dim=-1), self.losses, targets, strict=True)
        for task, (projection, loss, pair) in enumerate(parts):
            if pair is None:
                delta.append(torch.zeros_like(weights[:, task]))
                valid.append(torch.zeros_like(weights[:, task, :, 0], dtype=torch.bool))
                continue
            target, counted = pair
            bias = self.heads.bias.split(self.channels)[task]
            full, without = functional.counterfactual_losses_from_projections(
                projection, weights[:, task], bias, target, loss=loss, valid=counted, backend=self.backend
            )
            delta.append((without - full[:, None]).detach().transpose(1, 2))
            valid.append(counted)
            own.append(mean_over_ranks(full.sum(), counted.sum()))
        total = torch.stack(own).sum() if own else projections.sum() * 0
        return torch.stack(delta, dim=1), torch.stack(valid, dim=1), total


class FirstOrderRecord:
    """What a first-order tap is told between forward and backward, and what it has to say afterwards.

    valid: (B, T, N) bool or None, and share, this process's part in the mean over all of them, are set with `count`.
    After backward: loss, the alignment loss of this process, and delta, (B, T, N, M).
    """

    def __init__(self) -> None:
        self.valid: Tensor | None = None
        self.share: Tensor | float = 1.0
        self.loss: Tensor | None = None
        self.delta: Tensor | None = None

    def count(self, valid: Tensor) -> None:
        """Restrict the alignment loss to the tokens that count; their number is shared among processes now."""
        count = valid.sum().float()
        self.valid, self.share = valid, mean_over_ranks(count, count)


class FirstOrder(NamedTuple):
    """tokens: to be decoded; loss: a scalar with value 0 and the alignment loss's gradient; record."""

    tokens: Tensor
    loss: Tensor
    record: FirstOrderRecord


class FirstOrderCounterfactual(nn.Module):
    """Differences to first order, Delta_k = -alpha_k <dL/df, F_k>, as a by-product of the backward pass.

    L is the total that backward is called on, all tasks with their weights, not the task's own loss of eq. 8.
    Nothing is decoded again: the gradient of the task losses that passes through the routed tokens anyway is
    turned, on its way, into the gradient of the alignment loss with respect to the routing weights.

    Args:
        tau: temperature of eq. 10.
        eps: of eq. 9.
        backend: forced for the kernel; None chooses by device.
    """

    def __init__(self, *, tau: float = 1.0, eps: float = 1e-6, backend: str | None = None) -> None:
        super().__init__()
        self.tau, self.eps, self.backend = tau, eps, backend

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> FirstOrder:
        """Tap the routed tokens.

        Args:
            tokens: the routed tokens (B, T, N, D).
            experts: what was mixed, (B, M, N, D).
            weights: (B, T, N, M).

        Returns:
            FirstOrder. Decode its tokens in place of those given, tell its record which tokens count, and add its
            loss, times lambda_cf, to task losses that are means over tokens.
        """
        record = FirstOrderRecord()
        return FirstOrder(*_Tap.apply(tokens, weights, experts.detach(), record, self), record)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weights, experts, record, owner):
        ctx.save_for_backward(weights, experts)
        ctx.record, ctx.owner = record, owner
        return tokens.view_as(tokens), weights.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, tokens_gradient, scalar_gradient):
        weights, experts = ctx.saved_tensors
        record, owner = ctx.record, ctx.owner
        with phase("tiger.counterfactual"):
            slopes = torch.einsum("btnd,bmnd->btnm", tokens_gradient.to(experts.dtype), experts).to(weights.dtype)
            # The losses are means over the batch's tokens: times their number, so that delta is a token's own rise and
            # eps of eq. 9 stays small beside it. A loss scale cancels in eq. 9 as far as eps allows.
            delta = -weights * slopes * weights[:, 0, :, 0].numel()
            with torch.enable_grad():
                leaf = weights.detach().requires_grad_()
                loss = functional.alignment_loss(
                    delta, leaf, tau=owner.tau, eps=owner.eps, mask=record.valid, backend=owner.backend
                )
                (gradient,) = torch.autograd.grad(loss, leaf)
        record.loss, record.delta = loss.detach(), delta
        return tokens_gradient, gradient * (scalar_gradient * record.share), None, None, None
