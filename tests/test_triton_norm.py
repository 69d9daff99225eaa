"""Triton kernels of the alignment loss, the competency aggregate and the adapter, in Triton's interpreter: the paths that
sizes choose, edges of tiles, scratch that holds anything, and what is wanted of the backward."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tiger_fast.ops import triton as backend

if not backend.INTERPRETED:
    pytest.skip("Triton's kernels run on CPU tensors with TRITON_INTERPRET=1 only", allow_module_level=True)

import triton.language as tl
from helpers import ACTIVATIONS, call, cotangents, gradients, leaves, make, relative_error, transform

from tiger_fast.kernels import alignment, config
from tiger_fast.kernels.launch import joined, recording

NORMS = ("adapter", "competency_aggregate")
LOSSES = ("alignment_loss", "alignment_loss mask", "alignment_loss attached mask", "causal_target sharp")


def close(name: str, arguments: dict, bound: float = 2e-5) -> dict:
    """Compares outputs and gradients with the reference in float64; returns the gradients."""
    outputs, found = gradients(name, arguments, backend="triton")
    double = transform(lambda t: t.double() if t.is_floating_point() else t, arguments)
    expected, slopes = gradients(name, double, backend="reference")
    for value, reference in zip(outputs, expected, strict=True):
        assert value.is_contiguous() and relative_error(value, reference) < bound
    for key, value in found.items():
        if slopes[key] is None:
            assert value is None
        else:
            assert (value - slopes[key]).abs().max() <= bound * max(1, slopes[key].abs().max()), key
    return found


@pytest.fixture
def configured(monkeypatch):
    """Makes one configuration the choice for kernels whose names begin so, and splits sums for one multiprocessor."""

    def choose(start: str, **values: int) -> None:
        for name in [n for n in config._HEURISTICS if n.startswith(start)]:
            monkeypatch.setitem(
                config._HEURISTICS, name, lambda *_, **__: replace(config.Config(1, 16, 1, resident=2), **values)
            )
        config.reload()

    monkeypatch.setattr(config, "MULTIPROCESSORS", 1)
    yield choose
    monkeypatch.undo()
    config.reload()


@pytest.fixture
def garbage(monkeypatch):
    """What a kernel leaves unwritten is NaN, and integers are whatever `garbage` was last given."""
    held = [0]
    new_empty = torch.Tensor.new_empty

    def filled(self, *arguments, **keywords):
        made = new_empty(self, *arguments, **keywords)
        return (
            made.fill_(math.nan)
            if made.is_floating_point()
            else made.fill_(held[0] if made.dtype == torch.int64 else 0)
        )

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    return held


# --- rows -----------------------------------------------------------------------------------------------------------


def decoded(numbers: tuple) -> tuple:
    return tuple(tuple((n - 3) // 2 for n in each) for each in numbers)


def test_dimensions_are_joined_where_all_strides_allow():
    dense = torch.empty(2, 3, 5, 4)
    turned = torch.empty(2, 3, 4, 5).transpose(2, 3)
    mask = torch.empty(2, 1, 5).expand(2, 3, 5)
    assert decoded(joined((2, 3, 5), dense)) == ((30,), (4,))
    assert decoded(joined((2, 3, 5), dense, turned)) == ((6, 5), (20, 4), (20, 1))
    assert decoded(joined((2, 3, 5), dense, mask)) == ((2, 3, 5), (60, 20, 4), (5, 0, 1))
    assert decoded(joined((2, 3, 5), mask[:, :1].expand(2, 3, 5))) == ((2, 3, 5), (5, 0, 1))
    assert decoded(joined((1, 1), torch.empty(1, 1, 4))) == ((1,), (1,))
    assert decoded(joined((0, 3), torch.empty(0, 3, 4))) == ((1,), (1,))
    assert decoded(joined((), torch.empty(4))) == ((1,), (1,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [{"B": 2, "T": 3, "N": 5}, {"B": 7, "T": 1, "N": 2}, {"B": 1, "T": 2, "N": 40}])
def test_rows_in_any_order(name, sizes, configured):
    configured(name.partition(" ")[0], rows=16, width=4)
    arguments = make(name, torch.float32, **sizes)
    turned = transform(
        lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))), arguments
    )
    first, second = close(name, arguments), close(name, turned)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_a_mask_is_not_expanded_and_a_transposed_delta_is_not_copied():
    arguments = make("alignment_loss mask", torch.float32)
    delta = arguments["delta"].transpose(2, 3).contiguous().transpose(2, 3)
    with recording() as launches:
        alignment.alignment_loss(delta, arguments["weights"], 1.0, 1e-6, arguments["mask"], True)
    (launch,) = launches
    pointers = {a.data_ptr() for a in launch.arguments if isinstance(a, torch.Tensor)}
    assert {delta.data_ptr(), arguments["mask"].data_ptr()} <= pointers


@pytest.mark.parametrize("members", [1, 2, 3, 5, 16])
def test_any_number_of_experts(members):
    close("alignment_loss attached mask", make("alignment_loss attached mask", torch.float32, M=members))
    close("causal_target", make("causal_target", torch.float32, M=members))


def test_delta_and_weights_of_different_types():
    arguments = make("alignment_loss attached", torch.float32)
    for delta, weights in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        mixed = arguments | {"delta": arguments["delta"].to(delta), "weights": arguments["weights"].to(weights)}
        _, found = gradients("alignment_loss attached", mixed, backend="triton")
        assert (found["delta"].dtype, found["weights"].dtype) == (delta, weights)
        close("alignment_loss attached", mixed, bound=1e-2)


# --- one launch for a mean ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4, 64])
def test_the_last_program_adds_up_what_all_have_left(most, configured, monkeypatch, garbage):
    configured("alignment", rows=8, width=4)
    monkeypatch.setattr(alignment, "_PROGRAMS", tl.constexpr(most))
    arguments = make("alignment_loss mask", torch.float32, N=9)
    close("alignment_loss mask", arguments)
    (expected,) = call("alignment_loss mask", arguments, backend="triton")
    for garbage[0] in (-1, 12345, 2**62 + 7):
        assert torch.equal(call("alignment_loss mask", arguments, backend="triton")[0], expected)


def test_a_ticket_is_wiped(monkeypatch):
    made = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: made.append(new_empty(*a, **k)) or made[-1])
    arguments = make("alignment_loss", torch.float32)
    call("alignment_loss", arguments, backend="triton")
    counts = [t for t in made if t.dtype == torch.int64 and t.numel()]
    assert counts and all(t[-1] == 0 for t in counts)


@pytest.mark.parametrize("detach", [True, False])
def test_no_row_counts(detach):
    arguments = make("alignment_loss", torch.float32) | {"detach_target": detach}
    (loss,), found = gradients(
        "alignment_loss", arguments | {"mask": torch.zeros(3, 1, dtype=torch.bool)}, backend="triton"
    )
    assert loss == 0 and not any(g.any() for g in found.values() if g is not None)
    (loss,), found = gradients("alignment_loss", make("alignment_loss", torch.float32, B=0), backend="triton")
    assert loss == 0 and found["weights"].shape[0] == 0


def test_masked_rows_may_hold_anything_and_others_keep_their_nan():
    arguments = make("alignment_loss attached mask", torch.float32)
    hole = ~arguments["mask"].expand(2, 3, 5)[..., None]
    poisoned = arguments | {key: arguments[key].masked_fill(hole, math.nan) for key in ("delta", "weights")}
    (clean, first), (dirty, second) = (
        gradients("alignment_loss attached mask", a, backend="triton") for a in (arguments, poisoned)
    )
    assert torch.equal(clean[0], dirty[0])
    assert all(torch.equal(first[key], second[key]) for key in first)
    arguments["delta"][0, 1, 2, 3] = math.nan
    _, found = gradients("causal_target", {"delta": arguments["delta"]}, backend="triton")
    assert found["delta"].isnan().any(-1).sum() == 1


@pytest.mark.filterwarnings("ignore:overflow encountered in reduce:RuntimeWarning")  # numpy's, of the square of 3e38
@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [0.0, 0.0, 1e-30], [3e38, 0.0, 1.0]])
def test_tied_and_extreme_differences(values):
    delta = torch.tensor([values], requires_grad=True)
    p = call("causal_target", {"delta": delta}, backend="triton")[0]
    p[0, 0].backward()
    if len(set(values)) == 1:
        assert torch.allclose(p, torch.full((1, 3), 1 / 3)) and not p.isnan().any()
    weights = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    sharp = {"delta": torch.tensor([values]), "weights": weights, "tau": 1e-3}
    loss = call("alignment_loss", sharp, backend="triton")[0]
    expected = call("alignment_loss", sharp, backend="reference")[0]
    assert torch.allclose(loss, expected, rtol=1e-5, equal_nan=True)


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("held", "width"), [(0, 16), (0, 64), (1, 16), (2, 16), (2, 64)])
def test_rows_held_and_gone_through(name, held, width, configured, garbage):
    # Three tiles a row or a part of one; more tiles of rows than programs, the last one of each sample cut off.
    configured(name, held=held, width=width, rows=2)
    close(name, make(name, torch.float32, N=3, D=40, C=37), bound=5e-5)


def test_the_variance_of_rows_gone_through_is_centred(configured):
    configured("competency_aggregate", held=0, width=64)
    arguments = make("competency_aggregate", torch.float32, B=1, N=1, M=2, D=500)
    # An offset that a difference of squares would not survive.
    arguments["experts"] = [expert + 300 for expert in arguments["experts"]]
    close("competency_aggregate", arguments, bound=5e-4)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("empty", [{"B": 0}, {"N": 0}])
def test_empty_batches(name, empty, garbage):
    outputs, found = gradients(name, make(name, torch.float32, **empty), backend="triton")
    reference, slopes = gradients(name, make(name, torch.float32, **empty), backend="reference")
    assert all(torch.allclose(a, b) for a, b in zip(outputs, reference, strict=True))
    for key, value in found.items():
        assert value.shape == slopes[key].shape and (value.numel() == 0 or torch.allclose(value, slopes[key]))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("held", [0, 1])
def test_what_is_not_wanted_changes_no_bit_of_the_rest(name, held, configured):
    configured(name, held=held, rows=2)
    arguments = make(name, torch.float32, B=1, N=3, D=12, C=10)
    _, full = gradients(name, arguments, backend="triton")
    for key in list(full)[:: 2 - held]:
        prepared, wanted = leaves(arguments)
        for other, value in wanted.items():
            value.requires_grad_(other == key)
        outputs = [o for o in call(name, prepared, backend="triton") if o.requires_grad]
        (found,) = torch.autograd.grad(outputs, [wanted[key]], cotangents(tuple(outputs)))
        assert torch.equal(found, full[key]), key


def test_gradients_of_the_weights_alone():
    arguments, wanted = leaves(make("competency_aggregate", torch.float32))
    _, weights = call("competency_aggregate", arguments, backend="triton")
    _, expected = call("competency_aggregate", arguments, backend="reference")
    confidences = [wanted["confidence"], wanted["refined_confidence"]]
    (cotangent,) = cotangents((weights,))
    found = torch.autograd.grad(weights, confidences, cotangent.T.contiguous().T)
    assert all(
        torch.allclose(a, b, atol=1e-7)
        for a, b in zip(found, torch.autograd.grad(expected, confidences, cotangent), strict=True)
    )


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("held", [0, 1])
def test_nan_stays_in_its_token(name, held, configured):
    configured(name, held=held, rows=4)
    arguments = make(name, torch.float32, D=20, C=18)
    key = ACTIVATIONS[name][0]
    held = arguments[key][1] if key == "experts" else arguments[key]
    held[0, 2, 3] = math.inf
    outputs, found = gradients(name, arguments, backend="triton")
    bad = ~outputs[0].isfinite().all(-1)
    assert bad[0, 2] and bad.sum() == 1
    slope = found["x" if name == "adapter" else "experts[1]"]
    assert (~slope.isfinite().all(-1)).sum() <= 1


@pytest.mark.parametrize("name", NORMS)
def test_any_strides(name, configured):
    configured(name, held=1, rows=4)
    arguments = make(name, torch.float32, B=2, N=3, D=12, C=10)

    def turned(value):
        return value.transpose(0, 1).contiguous().transpose(0, 1) if value.dim() == 3 else value

    first = close(name, arguments)
    second = close(name, transform(turned, arguments))
    assert all(torch.equal(first[key], second[key]) for key in first)
    every_other = transform(lambda t: torch.stack((t, t), -1)[..., 0], arguments)
    third = close(name, every_other)
    assert all(torch.equal(first[key], third[key]) for key in first)


def test_experts_of_different_strides(configured):
    configured("competency_aggregate", held=2, rows=2)
    arguments = make("competency_aggregate", torch.float32, D=20)
    mixed = [e if k % 2 else e.transpose(0, 1).contiguous().transpose(0, 1) for k, e in enumerate(arguments["experts"])]
    first, second = (
        close("competency_aggregate", arguments),
        close("competency_aggregate", arguments | {"experts": mixed}),
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", sorted(config.ARCHITECTURES))
def test_configurations_are_legal_for_every_width(arch, itemsize):
    limits = config.ARCHITECTURES[arch]
    for D in (1, 15, 16, 17, 40, 255, 256, 768, 1000, 1024, 3000, 4096, 8192, 10000, 100000):
        for M in (1, 4, 16):
            chosen = [config.competency_aggregate_backward(limits, itemsize, D=D, M=M)]
            chosen += [config.competency_aggregate(limits, itemsize, D=D, M=M)]
            chosen += [f(limits, itemsize, D=D) for f in (config._adapter_forward, config.adapter_in_backward)]
            chosen += [config.adapter_out_backward(limits, itemsize, D=D)]
            for c in chosen:
                assert c.rows.bit_count() == c.width.bit_count() == c.num_warps.bit_count() == 1
                assert c.rows * c.width * itemsize == 16 * c.num_warps * limits.warp  # 16 bytes a thread
                assert c.resident >= 1 and (c.held > 0 or D > 1024), "short rows stay in registers"
