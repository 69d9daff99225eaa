"""Sizes at which the Triton kernels take their less usual paths: few tokens, so that little but these is compiled. The GPU
tests compare their values, run them again and again, and under NVIDIA's checkers; test_triton_launch.py tests, without a GPU,
that the heuristics still choose the paths."""

from collections.abc import Callable
from dataclasses import dataclass, field

FEW = {"B": 2, "N": 40}


@dataclass(frozen=True)
class Path:
    """A case of helpers.py and its sizes (beside FEW), and what the constants of the kernels that it launches have to say,
    by the kernel's name, in the forward or the backward."""

    name: str
    sizes: dict[str, int]
    takes: dict[str, Callable[[dict], bool]] = field(default_factory=dict)


def _grouped(c: dict) -> bool:
    return c["GROUP"] < 16


def _of_32(c: dict) -> bool:
    return c["BLOCK_G"] == 32


def _in_steps(c: dict) -> bool:
    return c["BLOCK_D"] < c["HEAD"]


def _in_tiles(c: dict) -> bool:
    return c["BLOCK_C"] < c["C"]


def _not_held(c: dict) -> bool:
    # The one of a call's two norms whose rows are this long.
    return c["D"] != 12288 or c["HELD"] == 0


def _held_without_tiles(c: dict) -> bool:
    return c["HELD"] == 1


def _any(c: dict) -> bool:
    return True


_MANY = {"M": 16, "T": 20, "D": 64}
_PRODUCTS = ("_forward_by_products", "_backward_by_products")
_CLASSES = ("from_projections", "gradients")

PATHS = {
    "attention by products": Path("group_attention", {"G": 9, "D": 64}, dict.fromkeys(_PRODUCTS, _any)),
    "attention by products of 32": Path("group_attention_packed", {"G": 32, "D": 64}, dict.fromkeys(_PRODUCTS, _of_32)),
    "attention in steps of a head": Path("group_attention", {"G": 2, "D": 600}, dict.fromkeys(_PRODUCTS, _in_steps)),
    "route in groups of experts, weights parked": Path(
        "route", _MANY | {"R": 32}, dict.fromkeys(("_forward", "_gradients", "_factor_gradients"), _grouped)
    ),
    "route of many tasks": Path("route", {"T": 20, "D": 64, "R": 32}, {"_gradients": lambda c: c["BLOCK_T"] == 32}),
    "route of many experts": Path("route", {"M": 16, "D": 64, "R": 32}, {"_forward": lambda c: 2 < c["GROUP"] < 16}),
    "route of the largest rank": Path(
        "route", {"D": 64, "R": 256}, {"_forward": lambda c: c["BLOCK_R"] == 256, "_gradients": lambda c: c["W"] == 512}
    ),
    "route after the library's product": Path("route", {"D": 264, "R": 16}, {"_forward": lambda c: not c["ONE_PASS"]}),
    "leave_one_out in groups": Path("leave_one_out", _MANY, dict.fromkeys(("_forward", "_backward"), _grouped)),
    "leave_one_out in groups, renormalized": Path(
        "leave_one_out renormalized", _MANY, dict.fromkeys(("_forward", "_backward"), _grouped)
    ),
    "leave_one_out renormalized": Path(
        "leave_one_out renormalized", {"D": 64}, {"_backward": lambda c: c["RENORMALIZE"] and c["GROUP"] >= 4}
    ),
    "adapter, rows too long for registers": Path(
        "adapter", {"C": 12288, "D": 40}, dict.fromkeys(("_in_forward", "_in_backward"), _not_held)
    ),
    "adapter to rows too long for registers": Path(
        "adapter", {"C": 40, "D": 12288}, dict.fromkeys(("_out_forward", "_out_backward"), _not_held)
    ),
    "competency_aggregate, rows too long for registers": Path(
        "competency_aggregate", {"D": 12288}, dict.fromkeys(("_forward", "_backward"), _not_held)
    ),
    "competency_aggregate, experts' tiles too many to hold": Path(
        "competency_aggregate", {"M": 16, "D": 768}, {"_backward": _held_without_tiles}
    ),
    "counterfactual_losses by the library": Path(
        "counterfactual_losses cross_entropy valid", {"M": 16, "C": 40, "D": 64}, {"from_projections": _any}
    ),
    "counterfactual_losses, classes in tiles": Path(
        "counterfactual_losses cosine valid", {"C": 300, "D": 64}, dict.fromkeys(_CLASSES, _in_tiles)
    ),
    "counterfactual_losses of sixteen experts in one kernel": Path(
        "counterfactual_losses mse", {"M": 16, "C": 9, "D": 64}, {"from_experts": _any}
    ),
    "projections, classes in tiles": Path(
        "counterfactual_losses_from_projections cross_entropy valid", {"C": 300}, dict.fromkeys(_CLASSES, _in_tiles)
    ),
    "projections of sixteen experts, classes in tiles": Path(
        "counterfactual_losses_from_projections cosine valid",
        {"M": 16, "C": 300},
        dict.fromkeys(_CLASSES, _in_tiles),
    ),
    "alignment_loss through its target, with a mask": Path(
        "alignment_loss attached mask",
        {},
        {"_alignment_loss_backward": lambda c: c["NEEDS"] == 3 and c["MASKED"]},
    ),
    # More tiles than the 1024 programs that share a ticket.
    "alignment_loss, several tiles a program": Path(
        "alignment_loss mask",
        {"B": 4, "T": 5, "N": 20000},
        {"_alignment_loss": lambda c: 4 * 5 * 20000 > 1024 * c["BLOCK_R"]},
    ),
}
