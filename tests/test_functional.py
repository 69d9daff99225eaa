"""The functional contract, statement by statement: values against loops, gradcheck, special cases, types, strides,
sizes, limits."""

import math
import zlib

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    CASES,
    FUNCTIONS,
    LOSSES,
    PLAIN,
    THOROUGH,
    TOKEN_LOSSES,
    call,
    gradients,
    leaves,
    make,
    relative_error,
    replaced,
    tensors,
    transform,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiger_fast
from tiger_fast import functional

TINY = 2.0**-126
LOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative spacing


@pytest.fixture(autouse=True, scope="module", params=THOROUGH)
def backend(request):
    """Every test here runs once on each backend of this installation."""
    with tiger_fast.use_backend(request.param):
        yield request.param


def equal(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_gradients_pass_gradcheck_in_float64(name):
    small = {"T": 2, "M": 3, "N": 2, "D": 4, "R": 2, "C": 3, "G": 2}
    arguments, wanted = leaves(make(name, seed=3, **{k: v for k, v in small.items() if k not in CASES[name].sizes}))
    if CASES[name].function == "alignment_loss" and arguments.get("detach_target", True):
        # A finite difference sees delta all the same; that it gets no gradient is another test.
        arguments["delta"] = wanted.pop("delta").detach()

    def function(*values):
        return call(name, replaced(arguments, dict(zip(wanted, values, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(wanted.values()))


@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_only_what_is_asked_for_gets_a_gradient(name):
    arguments = make(name)
    _, full = gradients(name, arguments)
    for key, expected in full.items():
        leaf = tensors(arguments)[key].clone().requires_grad_()
        outputs = call(name, replaced(arguments, {key: leaf}))
        if expected is None:
            assert not any(o.requires_grad for o in outputs)
            continue
        for output in outputs:  # through one alone: the others' gradients are absent
            if output.requires_grad:
                (found,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
                assert found.shape == leaf.shape
    assert not any(o.requires_grad for o in call(name, arguments))


def test_a_detached_delta_gets_no_gradient():
    _, found = gradients("alignment_loss", make("alignment_loss"))
    assert found["delta"] is None and found["weights"] is not None
    _, found = gradients("alignment_loss attached", make("alignment_loss attached"))
    assert found["delta"].abs().max() > 0


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_repeat_bit_by_bit(name):
    arguments = make(name, torch.float32)
    before = {key: value.clone() for key, value in tensors(arguments).items()}
    first, second = gradients(name, arguments), gradients(name, arguments)
    for a, b in zip(first[0], second[0], strict=True):
        assert equal(a, b)
    for key, value in first[1].items():
        assert value is None and second[1][key] is None or equal(value, second[1][key])
    for key, value in tensors(arguments).items():
        assert equal(value, before[key]), f"{key} was written to"


# --- values against loops -------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + eps).sqrt() * weight + bias


def token_loss(kind: str, y: Tensor, t: Tensor) -> Tensor:
    if kind == "cross_entropy":
        return y.exp().sum().log() - y[t]
    if kind == "l1":
        return sum(abs(a - b) for a, b in zip(y, t, strict=True)) / len(y)
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(y, t, strict=True)) / len(y)
    if kind == "bce":
        return -sum(b * a.sigmoid().log() + (1 - b) * (1 - a.sigmoid()).log() for a, b in zip(y, t, strict=True)) / len(
            y
        )
    return 1 - (y @ t) / max(math.sqrt(y @ y) * math.sqrt(t @ t), 1e-8)


def loop_route(query, experts, base_weight, base_bias, u, v, scale, shift):
    (batch, tokens, width), tasks = query.shape, scale.shape[-2]
    out, weights = query.new_zeros(batch, tasks, tokens, width), query.new_zeros(batch, tasks, tokens, len(experts))
    for b in range(batch):
        for t in range(tasks):
            g = scale[b, t] if scale.dim() == 3 else scale[t]
            h = shift[b, t] if shift.dim() == 3 else shift[t]
            matrix = base_weight + u @ torch.diag(g) @ v.T
            for n in range(tokens):
                own = query[b, n] @ matrix + h + (0 if base_bias is None else base_bias)
                e = torch.stack([(own @ f[b, n] / math.sqrt(width)).exp() for f in experts])
                weights[b, t, n] = e / e.sum()
                out[b, t, n] = sum(a * f[b, n] for a, f in zip(weights[b, t, n], experts, strict=True))
    return out, weights


def loop_leave_one_out(experts, weights, renormalize):
    batch, tasks, tokens, members = weights.shape
    out = weights.new_zeros(batch, tasks, members, tokens, experts[0].shape[-1])
    for b in range(batch):
        for t in range(tasks):
            for n in range(tokens):
                for k in range(members):
                    others = [j for j in range(members) if j != k]
                    total = sum(weights[b, t, n, j] for j in others) if renormalize else 1
                    for j in others:
                        out[b, t, k, n] += weights[b, t, n, j] / total * experts[j][b, n]
    return (out,)


def loop_losses(experts, weights, head_weight, head_bias, target, loss, valid=None, ignore_index=255):
    batch, tokens, members = weights.shape
    full, without = weights.new_zeros(batch, tokens), weights.new_zeros(batch, members, tokens)
    for b in range(batch):
        for n in range(tokens):
            if valid is not None and not valid[b, n] or loss == "cross_entropy" and target[b, n] == ignore_index:
                continue
            for removed in range(-1, members):
                y = torch.zeros(len(head_weight), dtype=weights.dtype) if head_bias is None else head_bias.clone()
                for j in range(members):
                    y += 0 if j == removed else weights[b, n, j] * (head_weight @ experts[j][b, n])
                value = token_loss(loss, y, target[b, n])
                if removed < 0:
                    full[b, n] = value
                else:
                    without[b, removed, n] = value
    return full, without


def loop_losses_from_projections(projections, weights, **rest):
    identity = torch.eye(projections.shape[-1], dtype=weights.dtype)
    return loop_losses(projections.unbind(1), weights, identity, **rest)


def target_of(row: list[float], tau: float, eps: float) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    e = [math.exp((x - mean) / (deviation + eps) / tau) for x in row]
    return [x / sum(e) for x in e]


def loop_causal_target(delta, tau=1.0, eps=1e-6):
    rows = [target_of(row, tau, eps) for row in delta.flatten(0, -2).tolist()]
    return (delta.new_tensor(rows).reshape(delta.shape),)


def loop_alignment(delta, weights, mask=None, tau=1.0, eps=1e-6, detach_target=True):
    counted = (torch.ones if mask is None else torch.zeros)(delta.shape[:-1], dtype=torch.bool)
    counted = (counted if mask is None else counted | mask).flatten().tolist()
    total, rows = 0.0, zip(delta.flatten(0, -2).tolist(), weights.flatten(0, -2).tolist(), strict=True)
    for use, (d, w) in zip(counted, rows, strict=True):
        for p, q in zip(target_of(d, tau, eps), w, strict=True) if use else ():
            m = (p + q) / 2
            total += (p * math.log(p / m) + q * math.log(q / m)) / 2
    return (delta.new_tensor(total / max(sum(counted), 1)),)


def loop_attention(q, k, v, num_heads):
    batch, members, tokens, width = q.shape
    out, size = torch.zeros_like(q), width // num_heads
    for b in range(batch):
        for n in range(tokens):
            for head in range(num_heads):
                own = slice(head * size, (head + 1) * size)
                for g in range(members):
                    e = [(q[b, g, n, own] @ k[b, j, n, own] / math.sqrt(size)).exp() for j in range(members)]
                    out[b, g, n, own] = sum(e[j] * v[b, j, n, own] for j in range(members)) / sum(e)
    return (out,)


def loop_adapter(x, **p):
    width = len(p["linear_weight"])
    out = x.new_zeros(*x.shape[:-1], width)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).reshape(-1, x.dim() - 1).tolist():
        y = norm(x[tuple(index)], p["norm_in_weight"], p["norm_in_bias"])
        gate = p["gate_weight"] @ y + p["gate_bias"]
        gate = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
        mixed = p["linear_weight"] @ y + p["linear_bias"] + gate
        out[tuple(index)] = norm(mixed, p["norm_out_weight"], p["norm_out_bias"])
    return (out,)


def loop_aggregate(experts, confidence, refined_confidence, norm_weight, norm_bias):
    out, weights = torch.zeros_like(experts[0]), torch.zeros_like(confidence)
    for b in range(len(confidence)):
        e = (confidence[b] + refined_confidence[b]).exp()
        weights[b] = e / e.sum()
        for n in range(out.shape[1]):
            out[b, n] = norm(sum(w * f[b, n] for w, f in zip(weights[b], experts, strict=True)), norm_weight, norm_bias)
    return out, weights


def loop_confidence(confidence, task_loss, refined_confidence, refined_task_loss, eps):
    total = 0.0
    for c, loss in ((confidence, task_loss), (refined_confidence, refined_task_loss)):
        for x, y in zip(c.flatten().tolist(), loss.flatten().tolist(), strict=True):
            total += (x * y + math.log(1 / (x + eps))) / 2
    return (confidence.new_tensor(total / max(2 * confidence.numel(), 1)),)


def loop_improvement(confidence, refined_confidence, eps):
    pairs = list(zip(confidence.flatten().tolist(), refined_confidence.flatten().tolist(), strict=True))
    return (confidence.new_tensor(sum(math.log(a / (b + eps)) for a, b in pairs) / max(len(pairs), 1)),)


LOOPS = {
    "route": loop_route,
    "leave_one_out": loop_leave_one_out,
    "counterfactual_losses": loop_losses,
    "counterfactual_losses_from_projections": loop_losses_from_projections,
    "causal_target": loop_causal_target,
    "alignment_loss": loop_alignment,
    "group_attention": loop_attention,
    "group_attention_packed": lambda qkv, num_heads: loop_attention(*qkv.chunk(3, dim=-1), num_heads),
    "adapter": loop_adapter,
    "competency_aggregate": loop_aggregate,
    "confidence_loss": loop_confidence,
    "improvement_loss": loop_improvement,
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    sizes=st.fixed_dictionaries(
        {"B": st.integers(0, 2), "T": st.integers(1, 3), "M": st.integers(1, 5), "N": st.integers(0, 3)}
        | {"D": st.integers(1, 7), "R": st.integers(1, 4), "C": st.integers(1, 5), "G": st.integers(1, 4)}
    ),
    seed=st.integers(0, 1000),
)
def test_values_are_those_of_a_plain_loop(name, sizes, seed):
    case = CASES[name]
    sizes = {key: value for key, value in sizes.items() if key not in case.sizes}
    if "num_heads" in case.keywords:
        sizes.pop("D", None)
    arguments = make(name, seed=seed, **sizes)
    for value, expected in zip(call(name, arguments), LOOPS[case.function](**arguments), strict=True):
        # Not relative alone: a cross-entropy of one class is 0 up to rounding.
        assert value.shape == expected.shape
        assert torch.allclose(value, expected, rtol=1e-9, atol=1e-12)


def test_attention_is_that_of_torch_with_heads_as_blocks_of_channels():
    arguments = make("group_attention", torch.float64, B=2, G=3, N=7, D=12)
    q, k, v = (arguments[name].permute(0, 2, 1, 3).unflatten(-1, (4, 3)).transpose(2, 3) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)  # (B, N, heads, G, D / heads)
    expected = expected.transpose(2, 3).flatten(-2).permute(0, 2, 1, 3)
    assert relative_error(call("group_attention", arguments | {"num_heads": 4})[0], expected) < 1e-12


def test_packed_attention_is_unpacked_attention_and_packs_its_gradient():
    arguments = make("group_attention")
    packed = {"qkv": torch.cat([arguments[name] for name in "qkv"], dim=-1), "num_heads": 2}
    (out,), found = gradients("group_attention", arguments)
    (packed_out,), packed_found = gradients("group_attention_packed", packed)
    assert torch.equal(out, packed_out)
    assert relative_error(packed_found["qkv"], torch.cat([found[name] for name in "qkv"], dim=-1)) < 1e-12


@pytest.mark.parametrize(
    "name", ["route", "leave_one_out", "counterfactual_losses cross_entropy", "competency_aggregate"]
)
def test_experts_as_one_tensor_are_experts_as_a_list(name):
    arguments = make(name)
    stacked = arguments | {"experts": torch.stack(arguments["experts"], dim=1)}
    outputs, found = gradients(name, arguments)
    stacked_outputs, stacked_found = gradients(name, stacked)
    assert all(torch.equal(a, b) for a, b in zip(outputs, stacked_outputs, strict=True))
    expected = torch.stack([found[f"experts[{k}]"] for k in range(4)], dim=1)
    assert relative_error(stacked_found["experts"], expected) < 1e-12
    assert all(
        torch.equal(a, b) for a, b in zip(outputs, call(name, arguments | {"experts": tuple(arguments["experts"])}))
    )


# --- special cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("members", range(1, 17))
def test_ties_are_uniform_and_the_deviation_has_no_derivative_there(members, dtype):
    delta = (torch.rand(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    delta = delta.repeat(1, members).requires_grad_()
    p = functional.causal_target(delta, eps=0.5)
    assert (p - 1 / members).abs().max() < 1e-6
    cotangent = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (found,) = torch.autograd.grad(p, delta, cotangent)
    # With the deviation held at 0, p = softmax(centred / eps) at a uniform p.
    expected = (cotangent - cotangent.mean(-1, keepdim=True)) / members / 0.5
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.isfinite(found).all()


def test_ties_beside_rows_without_ties_stay_finite():
    delta = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 4.0]], requires_grad=True)
    (found,) = torch.autograd.grad(functional.causal_target(delta)[:, 0].sum(), delta)
    assert torch.isfinite(found).all() and found[1].abs().max() > 0


def test_divergence_gradient_is_half_the_log_ratio():
    delta = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = (3 * torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).softmax(-1)
    weights.requires_grad_()
    (found,) = torch.autograd.grad(functional.alignment_loss(delta, weights), weights)
    middle = (functional.causal_target(delta) + weights.detach()) / 2
    assert relative_error(found, (weights.detach() / middle).log() / 2 / 40) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [0.0, 1e-42, 2.0**-127, 2.0**-126, 1e-30])
@pytest.mark.parametrize("tau", [1.0, 1e-3], ids=["p > 0", "p = 0"])
def test_saturated_weights_have_a_finite_loss_and_the_stated_gradient(tau, small, dtype):
    delta = torch.tensor([[5.0, -5.0, -5.0]], dtype=dtype)
    weights = torch.tensor([[1.0, small, 0.0]], dtype=dtype, requires_grad=True)
    loss = functional.alignment_loss(delta, weights, tau=tau)
    (found,) = torch.autograd.grad(loss, weights)
    assert 0 <= loss < math.log(2)
    p, alpha = functional.causal_target(delta, tau=tau)[0].double(), weights.detach()[0].double()
    assert (p[1] == 0) == (tau < 1)
    expected = torch.where((p == 0) & (alpha == 0), 0, (alpha.clamp(min=TINY) / ((p + alpha) / 2)).log() / 2)
    expected = torch.where((p == 0) & (alpha == 0), 0, expected)
    # log 2^-126 is -87: a float32 difference of two such logarithms is good to about 1e-5.
    assert torch.allclose(found[0].double(), expected, atol=2e-5 if dtype == torch.float32 else 1e-12)


def test_the_smallest_subnormal_weight_is_finite():
    delta = torch.tensor([[5.0, -5.0]])
    weights = torch.tensor([[1.0, 2.0**-149]], requires_grad=True)
    loss = functional.alignment_loss(delta, weights, tau=1e-3)
    (found,) = torch.autograd.grad(loss, weights)
    assert abs(loss) < 1e-40
    # Half of log(2^-126 / 2^-150). A term of 1/2 may be lost: half of this weight is not a float32.
    assert found[0, 1].item() == pytest.approx(12 * math.log(2), abs=0.51)


def test_the_worst_disagreement_is_log_2():
    delta = torch.tensor([[9.0, -9.0]])
    weights = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = functional.alignment_loss(delta, weights, tau=1e-3)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert torch.isfinite(weights.grad).all()


def test_perfect_agreement_is_0():
    delta = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weights = functional.causal_target(delta).requires_grad_()
    loss = functional.alignment_loss(delta, weights)
    assert abs(loss.item()) < 1e-7
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-7


def test_target_ignores_a_common_offset_and_scale():
    delta = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = functional.causal_target(delta, eps=0)
    assert relative_error(functional.causal_target(100 + 7 * delta, eps=0), p) < 1e-10


@pytest.mark.parametrize("renormalize", [False, True])
def test_one_expert_leaves_zeros_with_zero_gradients(renormalize):
    arguments = make("leave_one_out", M=1) | {"renormalize": renormalize}
    (out,), found = gradients("leave_one_out", arguments)
    assert out.shape == (2, 3, 1, 5, 6) and not out.any()
    for name, value in found.items():
        assert value is not None and not value.any(), name


def test_renormalized_is_0_where_the_others_weigh_nothing():
    arguments = make("leave_one_out renormalized")
    arguments["weights"][:, :, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    (out,), found = gradients("leave_one_out", arguments)
    assert not out[:, :, 1, 0].any()
    assert out[:, :, 0, 0].any(), "the others have expert 1"
    assert relative_error(out[:, :, 0, 0], arguments["experts"][1][:, None, 0].expand(2, 3, 6)) < 1e-15
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("rest", [1e-4, 1e-8, 1e-20, 1e-36])
def test_left_out_is_accurate_where_one_weight_is_near_1(rest, renormalize):
    arguments = make("leave_one_out") | {"renormalize": renormalize}
    arguments["weights"] = torch.tensor([1 - rest, rest / 2, rest / 3, rest / 6], dtype=torch.float64).expand(
        2, 3, 5, 4
    )
    single = transform(lambda t: t.float(), arguments)
    expected = loop_leave_one_out(arguments["experts"], arguments["weights"], renormalize)[0]
    value = call("leave_one_out", single)[0]
    assert relative_error(value[:, :, 0], expected[:, :, 0]) < 1e-6


def test_an_expert_does_not_enter_the_mixture_that_leaves_it_out():
    for bad in (math.nan, math.inf):
        for renormalize in (False, True):
            arguments = make("leave_one_out") | {"renormalize": renormalize}
            clean = call("leave_one_out", arguments)[0]
            arguments["experts"][2] = torch.full_like(arguments["experts"][2], bad)
            out = call("leave_one_out", arguments)[0]
            assert torch.equal(out[:, :, 2], clean[:, :, 2])
            assert not torch.isfinite(out[:, :, :2]).any()


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_an_expert_does_not_enter_the_loss_that_leaves_it_out(loss):
    for function in ("counterfactual_losses", "counterfactual_losses_from_projections"):
        arguments = make(f"{function} {loss}")
        clean = call(function, arguments)
        if function == "counterfactual_losses":
            arguments["experts"][1][0, 3] = math.nan
        else:
            arguments["projections"][0, 1, 3] = math.nan
        full, without = call(function, arguments)
        assert torch.equal(without[:, 1], clean[1][:, 1])
        assert full.isnan().nonzero().tolist() == [[0, 3]]
        assert without.isnan().nonzero().tolist() == [[0, k, 3] for k in (0, 2, 3)]


def masked_case(function: str, loss: str, how: str) -> tuple[dict, Tensor]:
    """Arguments of which about half of the tokens do not count, and which those are."""
    arguments = make(f"{function} {loss}", N=6)
    out = torch.tensor([[True, False, False, True, False, True], [False, True, False, True, True, False]])
    if how == "valid":
        return arguments | {"valid": ~out}, out
    arguments["target"][out] = 255
    return arguments, out


@pytest.mark.parametrize(
    ("loss", "how"), [*((loss, "valid") for loss in TOKEN_LOSSES), ("cross_entropy", "ignore_index")]
)
@pytest.mark.parametrize("function", ["counterfactual_losses", "counterfactual_losses_from_projections"])
def test_tokens_that_do_not_count_have_no_loss_and_no_gradient(function, loss, how):
    arguments, out = masked_case(function, loss, how)
    outputs, found = gradients(function, arguments)
    assert not outputs[0][out].any() and not outputs[1].transpose(1, 2)[out].any()
    assert outputs[0][~out].all()
    for name, value in found.items():
        if name.startswith("experts") or name in ("weights", "target"):
            assert not value[out].any() and value[~out].any(), name
    if "projections" in found:
        assert not found["projections"].transpose(1, 2)[out].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", TOKEN_LOSSES)
@pytest.mark.parametrize("function", ["counterfactual_losses", "counterfactual_losses_from_projections"])
def test_nothing_that_stands_in_an_invalid_token_matters(function, loss, bad):
    arguments, out = masked_case(function, loss, "valid")
    clean = gradients(function, arguments)
    poison = {}
    for name, value in tensors(arguments).items():
        axes = value.transpose(1, 2) if name == "projections" else value
        if value.is_floating_point() and axes.shape[:2] == out.shape:
            hole = out.reshape(*out.shape, *[1] * (axes.dim() - 2))
            poison[name] = axes.masked_fill(hole, bad)
            poison[name] = poison[name].transpose(1, 2) if name == "projections" else poison[name]
        elif name == "target":
            poison[name] = value.masked_fill(out, 77)  # no such class
    assert len(poison) >= 3
    found = gradients(function, replaced(arguments, poison))
    for a, b in zip(clean[0], found[0], strict=True):
        assert torch.equal(a, b)
    for name, value in clean[1].items():
        assert torch.equal(value, found[1][name]), name


def test_nan_features_of_an_ignored_token_give_it_no_loss_and_no_gradient():
    arguments, out = masked_case("counterfactual_losses", "cross_entropy", "ignore_index")
    arguments["experts"] = [member.masked_fill(out[..., None], math.nan) for member in arguments["experts"]]
    outputs, found = gradients("counterfactual_losses", arguments)
    assert torch.isfinite(outputs[0]).all() and torch.isfinite(outputs[1]).all()
    assert not found["weights"][out].any() and not found["experts[0]"][out].any()
    assert torch.isfinite(found["head_bias"]).all()


@pytest.mark.parametrize("wrong", [-1, 4, 254, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_a_class_that_does_not_exist_is_nan_for_its_token_only(kind, wrong):
    arguments = make("counterfactual_losses cross_entropy")
    arguments["target"] = arguments["target"].to(kind)
    clean, clean_found = gradients("counterfactual_losses", arguments)
    arguments["target"][1, 2] = wrong
    outputs, found = gradients("counterfactual_losses", arguments)
    here = torch.zeros(2, 5, dtype=torch.bool)
    here[1, 2] = True
    assert outputs[0][here].isnan().all() and outputs[1].transpose(1, 2)[here].isnan().all()
    assert torch.equal(outputs[0][~here], clean[0][~here])
    assert torch.equal(outputs[1].transpose(1, 2)[~here], clean[1].transpose(1, 2)[~here])
    for name in ("weights", "experts[0]", "experts[3]"):
        assert found[name][here].isnan().all()
        assert torch.equal(found[name][~here], clean_found[name][~here])


@pytest.mark.parametrize("ignored", [-100, 0, 255, 2**40])
def test_any_class_can_be_the_ignored_one(ignored):
    for kind in (torch.int64, torch.int32):
        arguments = make("counterfactual_losses cross_entropy") | {"ignore_index": ignored}
        kept = arguments["target"].clone()
        if ignored < 2**31:
            arguments["target"][0, :3] = ignored
        arguments["target"] = arguments["target"].to(kind)
        full = call("counterfactual_losses", arguments)[0]
        assert torch.equal(full == 0, arguments["target"].long() == ignored)
        expected = call("counterfactual_losses", arguments | {"target": kept, "ignore_index": -7})[0]
        assert torch.equal(full[1][kept[1] != ignored], expected[1][kept[1] != ignored])


def test_int32_targets_are_int64_targets():
    arguments = make("counterfactual_losses ignore")
    narrow = arguments | {"target": arguments["target"].int()}
    for a, b in zip(call("counterfactual_losses", arguments), call("counterfactual_losses", narrow), strict=True):
        assert torch.equal(a, b)


def test_cosine_by_hand():
    # One expert of weight 1 and an identity head, so that y is the feature itself.
    y = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[4.0, 3.0], [0.0, 5.0], [1.0, 1.0], [-1.0, -1.0]]], dtype=torch.float64)
    weights = torch.ones(1, 4, 1, dtype=torch.float64)
    full, without = functional.counterfactual_losses(
        [y], weights, torch.eye(2, dtype=torch.float64), None, target, loss="cosine"
    )
    assert torch.allclose(full, torch.tensor([[1 - 24 / 25, 1.0, 1.0, 2.0]], dtype=torch.float64), atol=1e-12)
    assert torch.equal(without, torch.ones(1, 1, 4, dtype=torch.float64))  # y = 0
    (found,) = torch.autograd.grad(full.sum(), y)
    # d(1 - y.t / |y||t|) / dy = -(t - y (y.t) / |y|^2) / |y||t|, by hand at the first token.
    first = torch.tensor([-(4 - 3 * 24 / 25) / 25, -(3 - 4 * 24 / 25) / 25], dtype=torch.float64)
    assert torch.allclose(found[0, 0], first, atol=1e-12)
    assert torch.allclose(found[0, 1], torch.tensor([0.0, -1.0], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found[0, 2], torch.tensor([-1e8, -1e8], dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(found[0, 3], torch.zeros(2, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_large_logits_have_a_finite_loss(loss):
    arguments = make(f"counterfactual_losses {loss}", torch.float32)
    arguments["experts"] = [1e4 * member for member in arguments["experts"]]
    outputs, found = gradients("counterfactual_losses", arguments)
    assert all(torch.isfinite(value).all() for value in (*outputs, *found.values()))


def test_saturated_routing_is_finite_and_one_hot():
    arguments = make("route", torch.float32)
    arguments["query"] = 1e4 * arguments["query"]
    (tokens, weights), found = gradients("route", arguments)
    assert all(torch.isfinite(value).all() for value in (tokens, weights, *found.values()))
    assert weights.amax(-1).median() == 1


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (3, 5), (1, 3, 1), (2, 1, 5), (2, 3, 5)])
def test_masks_broadcast_and_count_rows(shape):
    arguments = make("alignment_loss")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask = mask | ~mask.any()  # at least one
    whole = mask.expand(2, 3, 5)
    out = functional.alignment_loss(arguments["delta"], arguments["weights"], mask=mask)
    expected = functional.alignment_loss(arguments["delta"][whole], arguments["weights"][whole])
    assert relative_error(out, expected) < 1e-12
    (_,), found = gradients("alignment_loss", arguments | {"mask": mask})
    assert not found["weights"][~whole].any() and found["weights"][whole].any()


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("detach", [True, False])
def test_no_counted_row_is_0_with_zero_gradient(detach, bad):
    arguments = make("alignment_loss")
    arguments |= {"mask": torch.zeros(3, 1, dtype=torch.bool), "detach_target": detach}
    arguments = replaced(arguments, {name: arguments[name] + bad for name in ("delta", "weights")})
    (out,), found = gradients("alignment_loss", arguments)
    assert out == 0
    assert not found["weights"].any()
    assert found["delta"] is None if detach else not found["delta"].any()


@pytest.mark.parametrize("detach", [True, False])
def test_rows_that_are_masked_out_may_hold_anything(detach):
    arguments = make("alignment_loss mask") | {"detach_target": detach}
    hole = ~arguments["mask"].expand(2, 3, 5)[..., None]
    assert hole.any() and not hole.all()
    clean = gradients("alignment_loss", arguments)
    poisoned = {name: arguments[name].masked_fill(hole, math.nan) for name in ("delta", "weights")}
    found = gradients("alignment_loss", arguments | poisoned)
    assert torch.equal(clean[0][0], found[0][0])
    assert torch.equal(clean[1]["weights"], found[1]["weights"])
    assert detach or torch.equal(clean[1]["delta"], found[1]["delta"])


# --- NaN stays in its token -----------------------------------------------------------------------------------------


def token_axes(name: str) -> dict[str, tuple[int, int]]:
    """Of each tensor argument, and of each output by its number, the axes of the sample and of the token.

    Found as the axes that grow with B and N."""

    def shapes(**sizes: int) -> dict[str, tuple[int, ...]]:
        arguments = make(name, **sizes)
        named = tensors(arguments) | dict(zip("0123", call(name, arguments), strict=False))
        return {key: tuple(value.shape) for key, value in named.items()}

    before, batch, tokens = shapes(), shapes(B=11), shapes(N=13)
    found = {}
    for key, shape in before.items():
        axes = [
            next((i for i, (a, b) in enumerate(zip(shape, other[key], strict=True)) if a != b), None)
            for other in (batch, tokens)
        ]
        if None not in axes:
            found[key] = tuple(axes)
    return found


def elsewhere(value: Tensor, axes: tuple[int, int], sample: int, token: int) -> Tensor:
    """`value` with its entries of one token set to 0."""
    value = value.clone()
    value.movedim(axes, (0, 1))[sample, token] = 0
    return value


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", CASES)
def test_nan_and_inf_stay_in_their_token(name, bad):
    axes = token_axes(name)
    arguments = make(name, torch.float32)
    clean = gradients(name, arguments)
    for key in [key for key in axes if key in clean[1]]:
        poisoned = tensors(arguments)[key].clone()
        poisoned.movedim(axes[key], (0, 1))[1, 2] = bad
        outputs, found = gradients(name, replaced(arguments, {key: poisoned}))
        for i, (a, b) in enumerate(zip(clean[0], outputs, strict=True)):
            if str(i) in axes:
                where = axes[str(i)]
                assert torch.allclose(elsewhere(a, where, 1, 2), elsewhere(b, where, 1, 2), 1e-5, 1e-6), (key, i)
        for other, gradient in clean[1].items():
            if other in axes and gradient is not None:
                a, b = (elsewhere(g, axes[other], 1, 2) for g in (gradient, found[other]))
                assert torch.allclose(a, b, 1e-4, 1e-5), (key, other)


def test_a_bad_confidence_stays_in_its_sample():
    arguments = make("competency_aggregate")
    clean = call("competency_aggregate", arguments)
    arguments["confidence"][1, 0] = math.nan
    for a, b in zip(clean, call("competency_aggregate", arguments), strict=True):
        assert torch.equal(a[0], b[0]) and b[1].isnan().all()


# --- types ----------------------------------------------------------------------------------------------------------


def output_types(function: str, dtype: torch.dtype) -> list[torch.dtype]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if function in LOSSES:
        return [wide, wide]
    return [dtype, wide]


@pytest.mark.parametrize("companions", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_outputs_and_gradients_have_the_stated_types(name, dtype, companions):
    function = CASES[name].function
    arguments = make(name, dtype, dtype if companions == "same" else torch.float32)
    outputs, found = gradients(name, arguments)
    if companions == "float32" and not ACTIVATIONS[function]:
        dtype = torch.float32
    assert [o.dtype for o in outputs] == output_types(function, dtype)[: len(outputs)]
    for key, value in found.items():
        if value is not None:
            assert value.dtype == tensors(arguments)[key].dtype and value.shape == tensors(arguments)[key].shape
    if function == "alignment_loss":
        assert found["delta"] is None


@pytest.mark.parametrize("companions", ["same", "float32"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "D" not in case.sizes])
def test_low_precision_is_as_accurate_as_its_type(name, dtype, companions):
    arguments = make(name, dtype, dtype if companions == "same" else torch.float32)
    # The reference is the same function of the same rounded numbers in float64.
    exact = transform(lambda t: t.double() if t.is_floating_point() else t, arguments)
    (outputs, found), (expected, expected_found) = gradients(name, arguments), gradients(name, exact)
    for value, reference in zip(outputs, expected, strict=True):
        assert relative_error(value, reference) < 8 * LOW[dtype]
    for key, value in found.items():
        reference = expected_found[key]
        if value is not None and reference.abs().max() > 1e-6:
            assert relative_error(value, reference) < 24 * LOW[dtype], key


def test_losses_take_float32_beside_another_type():
    arguments = make("confidence_loss", torch.float32)
    wide = arguments | {"refined_task_loss": arguments["refined_task_loss"].double()}
    assert call("confidence_loss", wide)[0].dtype == torch.float64
    arguments = make("alignment_loss", torch.float64)
    assert call("alignment_loss", arguments | {"delta": arguments["delta"].float()})[0].dtype == torch.float64
    arguments = make("improvement_loss", torch.float32)
    wide = arguments | {"refined_confidence": arguments["refined_confidence"].double()}
    assert call("improvement_loss", wide)[0].dtype == torch.float64


def test_the_bias_is_added_in_float32():
    # base = -1 and c = 1 + 2^-10, which bfloat16 would round to 1: the logit is their difference times the feature.
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    features = [one * 1024, one * 0]
    none = torch.zeros(1, 1)
    weights = functional.route(
        one, features, torch.tensor([[-1.0]]), torch.tensor([1 + 2.0**-10]), none, none, none, none
    ).weights
    assert weights[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)


def test_float16_logits_do_not_overflow():
    width = 1024
    ones = torch.full((1, 1, width), 16.0, dtype=torch.float16)  # 16 * 16 * 1024 is past 65504; over sqrt(D) it is not
    zeros = torch.zeros(width, 1)
    weights = functional.route(
        ones, [ones, ones / 2], torch.eye(width), None, zeros, zeros, torch.zeros(1, 1), torch.zeros(1, width)
    ).weights
    assert weights.flatten().tolist() == [1.0, 0.0]
    q = ones[:, None].expand(1, 2, 1, width)
    assert torch.equal(functional.group_attention(q, q, q, 1), q)


# --- strides, sizes, limits -----------------------------------------------------------------------------------------


def transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.dim() > 1 else torch.stack([value, value], dim=1)[:, 0]


def sliced(value: Tensor) -> Tensor:
    wide = torch.cat([torch.full_like(value, 3), value, torch.full_like(value, 3)], dim=-1) if value.dim() else value
    return wide[..., value.shape[-1] : 2 * value.shape[-1]] if value.dim() else wide


def reversed_axes(value: Tensor) -> Tensor:
    order = tuple(reversed(range(value.dim())))
    return value.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("layout", [transposed, sliced, reversed_axes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CASES)
def test_strides_change_nothing_and_outputs_are_dense_and_fresh(name, layout):
    arguments = make(name)
    strided = transform(layout, arguments)
    expected, expected_found = gradients(name, arguments)
    outputs, found = gradients(name, strided)
    for value, reference in zip(outputs, expected, strict=True):
        assert value.is_contiguous()
        assert relative_error(value, reference) < 1e-12
    for key, reference in expected_found.items():
        assert reference is None and found[key] is None or relative_error(found[key], reference) < 1e-11
    owners = [t.untyped_storage().data_ptr() for t in (*tensors(strided).values(), *outputs)]
    assert not set(owners[-len(outputs) :]) & set(owners[: -len(outputs)]), "an output aliases an input"
    assert len(set(owners[-len(outputs) :])) == len(outputs), "outputs alias each other"


@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_expanded_arguments_are_read_as_they_are(name):
    arguments = make(name, B=1)
    grown = {key for key, value in tensors(make(name, B=3)).items() if value.shape != tensors(arguments)[key].shape}
    expanded = {k: t.expand(3, *t.shape[1:]) for k, t in tensors(arguments).items() if k in grown}
    copied = {key: value.contiguous() for key, value in expanded.items()}
    a, b = (gradients(name, replaced(arguments, values)) for values in (expanded, copied))
    assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(a[0], b[0], strict=True))
    assert all(value is None or torch.allclose(value, b[1][key], rtol=1e-9, atol=1e-12) for key, value in a[1].items())


@pytest.mark.parametrize(
    "sizes", [{"M": 1}, {"M": 1, "N": 1, "B": 1}, {"T": 1, "G": 1, "B": 1}, {"B": 1, "N": 1, "G": 1}]
)
@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_outputs_of_trivial_sizes_are_fresh_too(name, sizes):
    arguments = make(name, **sizes)
    given_ = {t.untyped_storage().data_ptr() for t in tensors(arguments).values()}
    outputs = call(name, arguments)
    owners = [o.untyped_storage().data_ptr() for o in outputs]
    assert all(o.is_contiguous() for o in outputs)
    assert not given_ & set(owners) and len(set(owners)) == len(owners)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"N": 0}, {"B": 0, "N": 0}], ids=["no sample", "no token", "neither"])
@pytest.mark.parametrize("name", CASES)
def test_empty_batches_and_token_sets_run_forward_and_backward(name, sizes):
    arguments = make(name, torch.float32, **sizes)
    whole = call(name, make(name, torch.float32, B=3, N=2))
    outputs, found = gradients(name, arguments)
    for value, full in zip(outputs, whole, strict=True):
        assert value.dim() == full.dim() and value.is_contiguous()
        assert value.numel() == 0 or not value.any() or sizes == {"N": 0}
    for key, value in found.items():
        argument = tensors(arguments)[key]
        if value is not None:
            assert value.shape == argument.shape and torch.isfinite(value).all()
            per_sample = "confidence" in key or "task_loss" in key
            assert not value.any() or (sizes == {"N": 0} and per_sample), key


@pytest.mark.parametrize("sizes", [{"M": 16, "T": 2}, {"T": 32}, {"R": 256}, {"G": 32}, {"D": 1}, {"D": 129, "C": 33}])
@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_sizes_up_to_the_limits_are_accepted(name, sizes):
    arguments = make(name, torch.float32, B=1, N=2, **sizes)
    if "num_heads" in arguments:
        arguments["num_heads"] = 1
    outputs, found = gradients(name, arguments)
    assert all(torch.isfinite(value).all() for value in (*outputs, *(v for v in found.values() if v is not None)))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (7, 4), (2, 3, 5, 4)])
def test_any_leading_dimensions_are_rows(shape):
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(zlib.crc32(b"rows")))
    p = functional.causal_target(values)
    assert p.shape == shape
    rows = values.reshape(-1, 4)
    assert torch.allclose(p.reshape(-1, 4), functional.causal_target(rows), rtol=1e-12)
    loss = functional.alignment_loss(values, values.softmax(-1))
    assert loss.shape == () and torch.allclose(loss, functional.alignment_loss(rows, rows.softmax(-1)))
    arguments = make("adapter")
    out = call("adapter", arguments | {"x": values})[0]
    assert out.shape == (*shape[:-1], 6)


def test_results_are_named():
    routed = functional.route(**make("route"))
    assert routed._fields == ("tokens", "weights")
    assert torch.allclose(routed.weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    assert functional.counterfactual_losses(**make("counterfactual_losses l1"))._fields == ("full", "without")
    assert functional.competency_aggregate(**make("competency_aggregate"))._fields == ("features", "weights")
    assert set(FUNCTIONS) == set(functional.__all__)


def test_shapes_are_inferred_on_the_meta_device():
    for name in CASES:
        arguments = make(name, torch.float32)
        expected = call(name, arguments)
        inferred = call(name, transform(lambda t: t.to("meta"), arguments))
        assert [(o.shape, o.dtype) for o in inferred] == [(o.shape, o.dtype) for o in expected], name
        assert all(o.is_meta for o in inferred)
