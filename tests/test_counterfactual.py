"""The counterfactual step against loops written out here, and what it must leave alone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiger_fast import functional
from tiger_fast.nn import (
    CounterfactualLoss,
    FirstOrderCounterfactual,
    LinearCounterfactual,
    TokenLosses,
)

B, T, M, N, D = 2, 3, 4, 6, 8


class Decoder(nn.Module):
    """Mixes neighbouring tokens and tasks, is not linear, and answers with a dict of tuples."""

    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.norm = nn.BatchNorm1d(D) if norm else nn.Identity()
        self.tasks = nn.Linear(T, T)

    def forward(self, tokens):
        x = self.norm(self.conv(tokens.flatten(0, 1).mT)).tanh().mT.unflatten(0, (-1, T))
        x = self.tasks(x.transpose(1, 3)).transpose(1, 3)
        return {"first": (x[..., 0],), "rest": x[..., 1:]}

    decode = forward


def squared(predictions, target):
    """(B, T, N), from the decoder's dict and a target dict."""
    first = (predictions["first"][0] - target["first"]).square()
    return first + (predictions["rest"] - target["rest"]).square().mean(-1)


def problem(dtype=torch.float32, seed=0):
    """experts (B, M, N, D), weights (B, T, N, M) that ask for gradients, target."""
    made = torch.Generator().manual_seed(seed)
    experts = torch.randn(B, M, N, D, generator=made, dtype=dtype)
    weights = (torch.randn(B, T, N, M, generator=made, dtype=dtype) * 0.5).softmax(-1)
    target = {
        "first": torch.randn(B, T, N, generator=made, dtype=dtype),
        "rest": torch.randn(B, T, N, D - 1, generator=made, dtype=dtype),
    }
    return experts, weights.requires_grad_(), target


def mixture(experts, weights):
    return torch.einsum("btnm,bmnd->btnd", weights, experts)


def without(weights, expert, task=None, renormalize=False):
    """Routing weights with an expert masked, for one task or for all."""
    masked = weights.clone()
    masked[..., expert] = 0
    if renormalize:
        masked = masked / masked.sum(-1, keepdim=True)
    if task is None:
        return masked
    return torch.stack([masked[:, t] if t == task else weights[:, t] for t in range(T)], dim=1)


def brute_force(decode, experts, weights, target, removal, renormalize=False):
    """Eq. 8, one expert, and for "task" one task, at a time."""
    weights = weights.detach()
    full = squared(decode(mixture(experts, weights)), target)
    delta = torch.zeros_like(weights)
    for k in range(M):
        for t in range(T):
            kept = without(weights, k, t if removal == "task" else None, renormalize)
            delta[:, t, :, k] = (squared(decode(mixture(experts, kept)), target) - full)[:, t]
    return delta


def divergence(delta, weights, tau=1.0, eps=1e-6):
    """Eqs. 9-13 written out, (..., M) -> (...)."""
    normal = (delta - delta.mean(-1, keepdim=True)) / (delta.std(-1, unbiased=False, keepdim=True) + eps)
    p = (normal / tau).softmax(-1)
    m = (p + weights) / 2
    return ((p * (p / m).log()).sum(-1) + (weights * (weights / m).log()).sum(-1)) / 2


# -- decode ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True, None])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("removal", ["mixture", "task"])
def test_differences_and_loss_are_the_brute_force_ones(removal, renormalize, batched):
    torch.manual_seed(1)
    decode = Decoder()
    experts, weights, target = problem()
    step = CounterfactualLoss(
        decode, squared, removal=removal, renormalize=renormalize, batched=batched, tau=0.7, eps=1e-3
    )
    loss, delta, valid = step(experts, weights, target)
    with torch.no_grad():
        expected = brute_force(decode, experts, weights, target, removal, renormalize)
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, divergence(expected, weights, 0.7, 1e-3).mean(), atol=1e-5, rtol=1e-4)
    assert valid is None and not delta.requires_grad


def test_removals_differ_where_tasks_interact():
    torch.manual_seed(1)
    decode = Decoder()
    experts, weights, target = problem()
    deltas = [
        CounterfactualLoss(decode, squared, removal=r)(experts, weights, target).delta for r in ("mixture", "task")
    ]
    assert (deltas[0] - deltas[1]).abs().max() > 0.05


@pytest.mark.parametrize("removal", ["mixture", "task"])
def test_the_steps_own_losses_are_reused(removal):
    torch.manual_seed(1)
    decode = Decoder()
    experts, weights, target = problem()
    calls = []

    def counted(tokens):
        calls.append(len(tokens))
        return decode(tokens)

    step = CounterfactualLoss(counted, squared, removal=removal)
    computed = step(list(experts.unbind(1)), weights, target)
    assert len(calls) == 1 + (M if removal == "mixture" else T * M)
    calls.clear()
    full = squared(decode(mixture(experts, weights)), target)
    given = step(experts, weights, target, full=full)
    assert len(calls) == (M if removal == "mixture" else T * M)
    torch.testing.assert_close(given.delta, computed.delta, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(given.loss, computed.loss, atol=1e-5, rtol=1e-4)


def test_only_the_weights_get_a_gradient():
    decode = Decoder()
    experts, weights, target = problem()
    experts.requires_grad_()
    seen = []

    def watched(predictions, wanted):
        losses = squared(predictions, wanted)
        seen.append(losses.requires_grad)
        return losses

    step = CounterfactualLoss(decode, watched)
    step(experts, weights, target).loss.backward()
    assert experts.grad is None and all(p.grad is None for p in decode.parameters())
    assert weights.grad.abs().sum() > 0
    assert seen == [False] * (M + 1), "decoded with a graph"
    assert not list(step.parameters()) and not step.state_dict(), "the decoder belongs to its owner"


def test_gradient_is_that_of_the_divergence_with_the_target_held_fixed():
    decode = Decoder().double()
    experts, weights, target = problem(torch.float64)
    loss, delta, _ = CounterfactualLoss(decode, squared)(experts, weights, target)
    (ours,) = torch.autograd.grad(loss, weights)
    (expected,) = torch.autograd.grad(divergence(delta, weights).mean(), weights)
    torch.testing.assert_close(ours, expected)


def test_descending_the_loss_brings_the_weights_to_the_causal_target():
    decode = Decoder()
    experts, _, target = problem()
    scores = torch.zeros(B, T, N, M, requires_grad=True)
    optimiser = torch.optim.Adam([scores], 0.05)
    step = CounterfactualLoss(decode, squared)
    losses = []
    for _ in range(60):
        loss = step(experts, scores.softmax(-1), target).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # The target moves with the weights, so not to zero.
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("way", ["module", "method"])
@pytest.mark.parametrize("removal", ["mixture", "task"])
def test_batchnorm_normalises_by_the_batch_and_its_statistics_stay(way, removal):
    torch.manual_seed(1)
    decode = Decoder(norm=True).train()
    with torch.no_grad():
        decode(torch.randn(B, T, N, D))
    before = copy.deepcopy(decode.state_dict())
    experts, weights, target = problem()
    step = CounterfactualLoss(decode if way == "module" else decode.decode, squared, removal=removal)
    delta = step(experts, weights, target).delta
    for name, value in decode.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert decode.norm.track_running_stats and decode.norm.training
    with torch.no_grad():
        expected = brute_force(decode, experts, weights, target, removal)
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)


def test_statistics_are_tracked_again_after_an_error():
    decode = Decoder(norm=True).train()
    experts, weights, target = problem()

    def failing(_, __):
        raise RuntimeError("somebody else's loss")

    with pytest.raises(RuntimeError, match="somebody else's"):
        CounterfactualLoss(decode, failing)(experts, weights, target)
    assert decode.norm.track_running_stats


def test_batchnorm_in_eval_mode_is_used_as_it_is():
    decode = Decoder(norm=True)
    with torch.no_grad():
        decode(torch.randn(B, T, N, D) * 3)
    decode.eval()
    experts, weights, target = problem()
    delta = CounterfactualLoss(decode, squared, batched=True)(experts, weights, target).delta
    with torch.no_grad():
        torch.testing.assert_close(
            delta, brute_force(decode, experts, weights, target, "mixture"), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("batched", [False, True])
def test_tokens_that_do_not_count_change_nothing(batched):
    decode = Decoder()
    experts, weights, target = problem()
    valid = torch.rand(B, T, N, generator=torch.Generator().manual_seed(3)) > 0.4

    def masked(predictions, wanted):
        losses = squared(predictions, wanted["values"])
        return TokenLosses(losses.masked_fill(~wanted["valid"], torch.nan), wanted["valid"])

    step = CounterfactualLoss(decode, masked, batched=batched)
    result = step(experts, weights, {"values": target, "valid": valid})
    with torch.no_grad():
        expected = brute_force(decode, experts, weights, target, "mixture")
    torch.testing.assert_close(result.loss, divergence(expected, weights)[valid].mean(), atol=1e-5, rtol=1e-4)
    assert torch.equal(result.valid, valid)
    result.loss.backward()
    assert weights.grad.isfinite().all() and not weights.grad[~valid].any() and weights.grad[valid].all(-1).any()


def test_a_batch_where_nothing_counts_is_zero_with_zero_gradient():
    experts, weights, target = problem()
    nothing = torch.zeros(B, T, N, dtype=torch.bool)
    step = CounterfactualLoss(Decoder(), lambda y, t: TokenLosses(squared(y, t), nothing))
    loss = step(experts, weights, target).loss
    loss.backward()
    assert loss == 0 and not weights.grad.any()


def test_sampled_experts_are_compared_among_themselves():
    decode = Decoder()
    experts, weights, target = problem()
    with torch.no_grad():
        everything = brute_force(decode, experts, weights, target, "mixture")
    step = CounterfactualLoss(decode, squared, sampled=2)
    drawn = set()
    for seed in range(30):
        torch.manual_seed(seed)
        loss, delta, _ = step(experts, weights, target)
        assert delta.shape == (B, T, N, 2)
        pair = [
            [k for k in range(M) if torch.allclose(delta[..., i], everything[..., k], atol=1e-5)][0] for i in range(2)
        ]
        drawn.update(pair)
        among = weights[..., pair] / weights[..., pair].sum(-1, keepdim=True)
        torch.testing.assert_close(loss, divergence(everything[..., pair], among).mean(), atol=1e-4, rtol=1e-3)
    assert drawn == set(range(M))
    all_of_them = CounterfactualLoss(decode, squared, sampled=M)(experts, weights, target)
    torch.testing.assert_close(all_of_them.delta, everything, atol=1e-5, rtol=1e-4)


def test_targets_and_predictions_may_be_of_any_kind():
    experts, weights, target = problem()
    head = nn.Linear(D, 2)

    def loss(predictions, wanted):
        assert isinstance(predictions, list) and wanted[1] == "name" and len(wanted[0]) == len(predictions[0])
        return (predictions[0].sum(-1) - wanted[0]).abs()

    wanted = (target["first"], "name")
    results = [
        CounterfactualLoss(lambda f: [head(f)], loss, batched=batched)(experts, weights, wanted).delta
        for batched in (False, True)
    ]
    torch.testing.assert_close(results[0], results[1])


def test_runs_under_autocast():
    torch.manual_seed(1)
    decode = Decoder()
    experts, weights, target = problem()
    exact = CounterfactualLoss(decode, squared)(experts, weights, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, delta, _ = CounterfactualLoss(decode, squared)(experts, weights, target)
        # Casts of parameters made without a graph must not serve the training step that follows.
        squared(decode(mixture(experts, weights.detach())), target).mean().backward()
    assert loss.dtype == torch.float32 and (delta - exact.delta).abs().max() < 0.2
    assert decode.conv.weight.grad is not None and decode.conv.weight.grad.any()


def test_copies_decode_with_their_own_decoder():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()
            self.step = CounterfactualLoss(self.decode, squared)

        def decode(self, tokens):
            return self.decoder(tokens)

    model = Model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    experts, weights, target = problem()
    assert not twin.step(experts, weights, target).delta.any()
    assert model.step(experts, weights, target).delta.any()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="did you mean 'task'"):
        CounterfactualLoss(Decoder(), squared, removal="tasks")
    for sampled in (0, 1):
        with pytest.raises(ValueError, match="sampled"):
            CounterfactualLoss(Decoder(), squared, sampled=sampled)
    experts, weights, target = problem()
    with pytest.raises(ValueError, match="weights"):
        CounterfactualLoss(Decoder(), squared)(experts, weights[..., :3], target)
    with pytest.raises(ValueError, match="tau"):
        CounterfactualLoss(Decoder(), squared, tau=0.0)(experts, weights, target)


# -- linear ------------------------------------------------------------------------------------------------------------

CHANNELS, LOSSES = [5, 2, 3], ["cross_entropy", "l1", "mse"]


def linear_problem():
    torch.manual_seed(2)
    step = LinearCounterfactual(D, CHANNELS, LOSSES)
    experts, weights, _ = problem()
    targets = [torch.randint(5, (B, N)), torch.randn(B, N, 2), torch.randn(B, N, 3)]
    valid = [torch.rand(B, N) > 0.3 for _ in range(T)]
    return step, experts, weights, list(zip(targets, valid, strict=True))


def per_token(logits, targets):
    """(B, T, N) losses with the mask, of T logits."""
    ce = F.cross_entropy(logits[0].mT, targets[0][0], reduction="none")
    l1 = (logits[1] - targets[1][0]).abs().mean(-1)
    mse = (logits[2] - targets[2][0]).square().mean(-1)
    return TokenLosses(torch.stack([ce, l1, mse], 1), torch.stack([v for _, v in targets], 1))


def test_linear_is_decode_with_the_same_linear_decoder():
    step, experts, weights, targets = linear_problem()
    heads = list(zip(step.heads.weight.split(CHANNELS), step.heads.bias.split(CHANNELS), strict=True))

    def decode(tokens):
        return [F.linear(tokens[:, t], *heads[t]) for t in range(T)]

    delta, valid, own = step(experts, weights, targets)
    exact = CounterfactualLoss(decode, per_token)(experts, weights, targets)
    assert torch.equal(valid, exact.valid) and not delta.requires_grad
    torch.testing.assert_close(delta[valid], exact.delta[valid], atol=1e-5, rtol=1e-4)
    full = per_token(decode(mixture(experts, weights)), targets)
    expected = sum(full.values[:, t][full.valid[:, t]].mean() for t in range(T))
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_linear_heads_alone_learn_from_their_loss():
    step, experts, weights, targets = linear_problem()
    experts.requires_grad_()
    step(experts, weights, targets)[2].backward()
    assert experts.grad is None and weights.grad is None
    assert step.heads.weight.grad.any() and step.heads.bias.grad.any()


def test_linear_leaves_out_a_task_without_a_target():
    step, experts, weights, targets = linear_problem()
    whole = step(experts, weights, targets)
    delta, valid, own = step(experts, weights, [targets[0], None, targets[2]])
    assert not valid[:, 1].any() and not delta[:, 1].any()
    torch.testing.assert_close(delta[:, ::2], whole[0][:, ::2])
    assert own < whole[2]
    assert step(experts, weights, [None] * T)[2] == 0
    step(experts, weights, [None] * T)[2].backward()  # a graph all the same: no rank may be left waiting
    assert step.heads.weight.grad is not None


# -- first order -------------------------------------------------------------------------------------------------------


def first_order(decode, experts, weights, target, *, valid=None, scale=1.0, cf=1.0, loss=squared, **options):
    """A training step: (gradients of weights and experts, record)."""
    tap = FirstOrderCounterfactual(**options)
    tokens, extra, record = tap(mixture(experts, weights), experts, weights)
    losses = loss(decode(tokens), target)
    if valid is not None:
        record.count(valid)
        losses = losses[valid]
    gradients = torch.autograd.grad((losses.mean() + cf * extra) * scale, (weights, experts))
    return gradients, record, extra


def first_order_problem(dtype=torch.float64):
    torch.manual_seed(1)
    experts, weights, target = problem(dtype)
    return Decoder().to(dtype), experts.requires_grad_(), weights, target


@pytest.mark.parametrize("masked", [False, True])
def test_first_order_delta_and_gradient_are_the_explicit_ones(masked):
    decode, experts, weights, target = first_order_problem()
    valid = torch.rand(B, T, N) > 0.4 if masked else None
    (for_weights, for_experts), record, extra = first_order(
        decode, experts, weights, target, valid=valid, cf=0.3, tau=0.7, eps=1e-3
    )
    chosen = torch.ones(B, T, N, dtype=torch.bool) if valid is None else valid
    tokens = mixture(experts, weights)
    task_loss = squared(decode(tokens), target)[chosen].mean()
    slope, task_weights, task_experts = torch.autograd.grad(task_loss, (tokens, weights, experts))
    delta = -weights * torch.einsum("btnd,bmnd->btnm", slope, experts) * B * N
    torch.testing.assert_close(record.delta, delta)
    aligned = divergence(delta.detach(), weights, 0.7, 1e-3)[chosen].mean()
    torch.testing.assert_close(record.loss, aligned.detach())
    assert extra == 0
    torch.testing.assert_close(for_weights, task_weights + 0.3 * torch.autograd.grad(aligned, weights)[0])
    torch.testing.assert_close(for_experts, task_experts)  # the alignment moves the weights alone


def test_first_order_is_exact_where_decoder_and_loss_are_linear_in_the_tokens():
    _, experts, weights, _ = first_order_problem()
    head = torch.randn(T, D, dtype=torch.float64)

    def linear(tokens):
        return (tokens * head[:, None]).sum(-1)

    def loss(predictions, _):
        return predictions

    _, record, _ = first_order(linear, experts, weights, None, loss=loss)
    exact = CounterfactualLoss(linear, loss)(experts, weights, None).delta
    # The mean over B T N tokens is undone by B N: the same but for T, which eq. 9 divides out.
    torch.testing.assert_close(record.delta * T, exact)


def test_first_order_direction_does_not_depend_on_the_loss_scale():
    decode, experts, weights, target = first_order_problem(torch.float32)
    runs = [first_order(decode, experts, weights, target, scale=scale) for scale in (1.0, 1000.0, 65536.0)]
    for (gradients, record, _), scale in zip(runs, (1.0, 1000.0, 65536.0), strict=True):
        # eps of eq. 9 is 1e-6 beside deviations of about 1e-1.
        torch.testing.assert_close(gradients[0] / scale, runs[0][0][0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(record.loss, runs[0][1].loss, rtol=1e-4, atol=1e-6)


def test_first_order_gives_the_tokens_unchanged_and_keeps_the_type():
    for dtype in (torch.float32, torch.float64):
        decode, experts, weights, target = first_order_problem(dtype)
        tokens = mixture(experts, weights)
        out = FirstOrderCounterfactual()(tokens, experts, weights)
        assert torch.equal(out.tokens, tokens) and out.loss.dtype == dtype and out.record.loss is None
        _, record, _ = first_order(decode, experts, weights, target)
        assert record.delta.dtype == record.loss.dtype == dtype


def test_first_order_runs_in_bfloat16_beside_float32_weights():
    experts, weights, _ = problem()
    experts = experts.bfloat16()
    tap = FirstOrderCounterfactual()
    tokens, extra, record = tap(mixture(experts, weights.bfloat16()), experts, weights)
    (tokens.float().square().mean() + extra).backward()
    assert weights.grad.dtype == torch.float32 and weights.grad.isfinite().all() and record.delta.dtype == torch.float32


def test_first_order_without_a_backward_says_nothing():
    experts, weights, _ = problem()
    with torch.no_grad():
        out = FirstOrderCounterfactual()(mixture(experts, weights), experts, weights)
    assert out.record.loss is None and out.record.delta is None and out.loss == 0


def test_modes_save_with_weights_only():
    buffer = io.BytesIO()
    torch.save(LinearCounterfactual(D, CHANNELS, LOSSES).state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)) == {"heads.weight", "heads.bias"}


def test_losses_of_the_contract_agree_with_the_step_on_a_linear_head():
    # counterfactual_losses is eq. 8 for one linear head: the step with that head as its decoder must agree.
    experts, weights, _ = problem()
    head, labels = nn.Linear(D, 5), torch.randint(5, (B, N))
    full, left_out = functional.counterfactual_losses(
        experts, weights[:, 0].detach(), head.weight, head.bias, labels, loss="cross_entropy"
    )
    step = CounterfactualLoss(head, lambda y, t: F.cross_entropy(y[:, 0].mT, t, reduction="none")[:, None])
    delta = step(experts, weights[:, :1], labels).delta
    torch.testing.assert_close(delta[:, 0], (left_out - full[:, None]).mT, atol=1e-5, rtol=1e-4)


def test_losses_that_are_not_per_token_are_refused():
    experts, weights, target = problem()
    step = CounterfactualLoss(lambda tokens: tokens, lambda y, t: y.square().mean())
    with pytest.raises(ValueError, match="one per token"):
        step(experts, weights, target)
    with pytest.raises(ValueError, match="tau"):
        CounterfactualLoss(lambda tokens: tokens, lambda y, t: y, tau=0.0)
