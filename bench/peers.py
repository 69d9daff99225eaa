"""Who else computes what an op computes: each a function of the op's tensors by name, or the reason why it is missing."""

import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.presets import PEERS, Settings
from tiger_fast import functional
from tiger_fast.reference import TOKEN_LOSSES, causal_target

Function = Callable[..., Any]

# What has to be importable, and what the user would install.
PACKAGES = {
    "flash-attn": ("flash_attn", "flash-attn"),
    "xformers": ("xformers", "xformers"),
    "liger": ("liger_kernel", "liger-kernel"),
    "quack": ("quack", "quack-kernels"),
}


def peers(case: Case, settings: Settings, *, compiles: bool) -> tuple[dict[str, Function], dict[str, str]]:
    """(functions by name, why by name for those that are missing), "eager", the reference backend, always first.

    With `compiles` torch.compile is among them.

    Compiled peers share torch.compile's caches: call `torch.compiler.reset()` between cases.
    """
    eager = case.function("reference")
    functions: dict[str, Function] = {"eager": eager}
    if case.op in ALGEBRA:
        functions["algebra"] = _with_keywords(ALGEBRA[case.op], case)
    for name, function in OTHERS.get(case.op, {}).items():
        functions[name] = _with_keywords(function, case)
    if compiles:
        functions |= compiled("compile", eager, settings)
        if "algebra" in functions:
            functions["algebra-compile"] = torch.compile(functions["algebra"], fullgraph=True)
    wanted = [name for name in PEERS if name in functions and takes_part(name, settings)]
    absent = {name: f"{PACKAGES[name][1]} is not installed" for name in wanted if not installed(name)}
    return {name: functions[name] for name in wanted if name not in absent}, absent


def compiled(name: str, function: Function, settings: Settings, *, fullgraph: bool = True) -> dict[str, Function]:
    """torch.compile of a function, and with max-autotune where the run has it.

    Without its CUDA graphs, which would copy every argument into buffers of their own: a call that is shorter than its
    launch is replayed from a graph here, whoever makes it.
    """
    found = {name: torch.compile(function, fullgraph=fullgraph)}
    if settings.device == "cuda" or settings.max_autotune:
        mode = "max-autotune-no-cudagraphs"
        found[f"{name}-max-autotune"] = torch.compile(function, fullgraph=fullgraph, mode=mode)
    return found


def takes_part(name: str, settings: Settings) -> bool:
    """Whether a peer is wanted; eager always is."""
    return name == "eager" or settings.peers is None or name in settings.peers


def installed(name: str) -> bool:
    """Whether the package that a peer needs is there."""
    return name not in PACKAGES or find_spec(PACKAGES[name][0]) is not None


def _with_keywords(function: Function, case: Case) -> Function:
    keywords = case.keywords
    return lambda **tensors: function(**tensors, **keywords)


# -- the kernels' algebra ----------------------------------------------------------------------------------------------


def route(
    query: Tensor,
    experts: list[Tensor],
    base_weight: Tensor,
    base_bias: Tensor,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> functional.Routed:
    """`route`, scale and shift shared: no per-task query of width D."""
    features = torch.stack(experts, dim=1)  # (B, M, N, D)
    base, z = query @ base_weight, query @ u
    projected = features @ torch.cat((v, (base_bias + shift).T), dim=1)  # (B, M, N, R + T)
    low, constant = projected.split((v.shape[1], shift.shape[0]), dim=-1)
    own = (base[:, None] * features).sum(dim=-1, keepdim=True)  # (B, M, N, 1)
    logits = (own + (z[:, None] * low) @ scale.T + constant) / math.sqrt(query.shape[-1])  # (B, M, N, T)
    weights = logits.permute(0, 3, 2, 1).float().softmax(dim=-1).contiguous()
    tokens = torch.einsum("btnm,bmnd->btnd", weights.to(query.dtype), features)
    return functional.Routed(tokens.contiguous(), weights)


def leave_one_out(experts: list[Tensor], weights: Tensor, renormalize: bool = False) -> Tensor:
    """`leave_one_out` as one product with the others' weights: every expert is read once for all k."""
    features = torch.stack(experts, dim=1)
    present = 1 - torch.eye(len(experts), dtype=weights.dtype, device=weights.device)
    others = weights[..., None, :] * present  # (B, T, N, k, j)
    if renormalize:
        total = others.sum(dim=-1, keepdim=True)
        others = torch.where(total == 0, 0, others / torch.where(total == 0, 1, total))
    return torch.einsum("btnkj,bjnd->btknd", others.to(features.dtype), features).contiguous()


def counterfactual_losses(
    experts: list[Tensor], weights: Tensor, head_weight: Tensor, head_bias: Tensor, target: Tensor, loss: str
) -> functional.CounterfactualLosses:
    """`counterfactual_losses` where every token counts: left-out logits are the full ones less the expert's own."""
    projections = torch.stack(experts, dim=1) @ head_weight.T
    return counterfactual_losses_from_projections(projections, weights, head_bias, target, loss)


def counterfactual_losses_from_projections(
    projections: Tensor, weights: Tensor, head_bias: Tensor, target: Tensor, loss: str
) -> functional.CounterfactualLosses:
    """The same from projections (B, M, N, C)."""
    weighted = weights.transpose(1, 2)[..., None] * projections.float()
    full = weighted.sum(dim=1, keepdim=True) + head_bias.float()
    losses = TOKEN_LOSSES[loss](torch.cat((full, full - weighted), dim=1), target[:, None])
    return functional.CounterfactualLosses(losses[:, 0].clone(), losses[:, 1:].clone())


def adapter(
    x: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    norm: Function = F.layer_norm,
) -> Tensor:
    """`adapter` with both branches in one product."""
    y = norm(x, x.shape[-1:], norm_in_weight, norm_in_bias)
    both = F.linear(y, torch.cat((linear_weight, gate_weight)), torch.cat((linear_bias, gate_bias)))
    linear, gate = both.chunk(2, dim=-1)
    return norm(linear + F.gelu(gate), linear.shape[-1:], norm_out_weight, norm_out_bias)


ALGEBRA: dict[str, Function] = {
    "route": route,
    "leave_one_out": leave_one_out,
    "counterfactual_losses": counterfactual_losses,
    "counterfactual_losses_from_projections": counterfactual_losses_from_projections,
    "adapter": adapter,
}

# -- libraries ---------------------------------------------------------------------------------------------------------


def _attention(attend: Function) -> Function:
    # Tokens and heads together are a library's heads, members its sequence: a view, no copy. `attend` takes and returns
    # (B, G, N heads, D / heads).
    def function(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        batch, members, tokens, width = q.shape
        split = (batch, members, tokens * num_heads, width // num_heads)
        return attend(q.view(split), k.view(split), v.view(split)).reshape(q.shape).contiguous()

    return function


def _packed(function: Function) -> Function:
    def call(qkv: Tensor, num_heads: int) -> Tensor:
        return function(*(third.contiguous() for third in qkv.chunk(3, dim=-1)), num_heads)

    return call


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("flash_attn").flash_attn_func(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("xformers.ops").memory_efficient_attention(q, k, v)


def _liger(delta: Tensor, weights: Tensor) -> Tensor:
    """`alignment_loss` with Liger-Kernel's Jensen-Shannon divergence, which takes logarithms; the target (eqs. 9-10) and
    they are plain PyTorch."""
    jsd = import_module("liger_kernel.transformers.functional").liger_jsd
    members = weights.shape[-1]
    target = causal_target(delta.detach(), 1.0, 1e-6)
    return jsd(weights.reshape(-1, members).log(), target.reshape(-1, members).log())


def _quack_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor) -> Tensor:
    # Forward only, of rows, with float32 parameters; without a backward of its own, gradients are refused by autograd.
    norm = import_module("quack.rmsnorm").layernorm_fwd
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise NotImplementedError("quack's layernorm has no backward")
    return norm(x.reshape(-1, x.shape[-1]), weight.float(), bias.float(), eps=1e-5).reshape(x.shape)


def _quack_adapter(**tensors: Tensor) -> Tensor:
    return adapter(**tensors, norm=_quack_norm)


def _quack_aggregate(
    experts: list[Tensor], confidence: Tensor, refined_confidence: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> functional.Aggregated:
    weights = (confidence + refined_confidence).softmax(dim=-1)
    mixed = torch.einsum("bm,bmnd->bnd", weights.to(experts[0].dtype), torch.stack(experts, dim=1))
    return functional.Aggregated(_quack_norm(mixed, mixed.shape[-1:], norm_weight, norm_bias), weights)


_ATTENTION = {"sdpa": _attention(_sdpa), "flash-attn": _attention(_flash), "xformers": _attention(_xformers)}
OTHERS: dict[str, dict[str, Function]] = {
    "group_attention": _ATTENTION,
    "group_attention_packed": {name: _packed(function) for name, function in _ATTENTION.items()},
    "alignment_loss": {"liger": _liger},
    "adapter": {"quack": _quack_adapter},
    "competency_aggregate": {"quack": _quack_aggregate},
}
