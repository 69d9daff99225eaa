"""tiger_fast.Router: the contract's result, its initialisation, and life in other people's trainers."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiger_fast
from tiger_fast import Router, functional

B, T, M, N, D, E, R = 2, 3, 4, 6, 16, 10, 5


def inputs(batch=B, tokens=N, dim=D, members=M, tasks=T, dtype=torch.float32, seed=0):
    """Unit-variance query, experts (B, M, N, D) and task representations."""
    made = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, tokens, dim, generator=made).to(dtype)
    experts = torch.randn(batch, members, tokens, dim, generator=made).to(dtype)
    return query, experts, torch.randn(tasks, E, generator=made).to(dtype)


def make(dim=D, members=M, rank=R, seed=0, **options):
    torch.manual_seed(seed)
    return Router(dim, members, E, rank, **options)


def move(router):
    """Parameters away from where initialisation left them, so that every term of eqs. 4-7 counts."""
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return router


def test_signature_is_the_published_one():
    parameters = inspect.signature(Router).parameters
    assert list(parameters)[:5] == ["dim", "num_experts", "task_dim", "rank", "hidden"]
    assert (parameters["rank"].default, parameters["hidden"].default) == (32, None)
    router = Router(16, 4, 10, 5, 7)
    assert router.g[0].out_features == router.h[0].out_features == 7
    assert Router(16, 4, 10).g[0].out_features == 16 and Router(16, 4, 10).u.shape == (16, 32)


def test_equals_the_equations_written_out():
    router = move(make()).double()
    query, experts, task = inputs(dtype=torch.float64)
    tokens, weights = router(query, experts, task)
    for t in range(T):
        w_q = router.base_weight + router.u @ torch.diag(router.g(task)[t]) @ router.v.T  # eq. 4
        q = query @ w_q + router.base_bias + router.h(task)[t]  # eq. 5
        alpha = (torch.einsum("bnd,bmnd->bnm", q, experts) / math.sqrt(D)).softmax(-1)  # eq. 6
        torch.testing.assert_close(weights[:, t], alpha)
        torch.testing.assert_close(tokens[:, t], torch.einsum("bnm,bmnd->bnd", alpha, experts))  # eq. 7


def test_returns_the_contracts_tuple_from_a_list_or_one_tensor_and_tasks_per_sample():
    router = move(make())
    query, experts, task = inputs()
    routed = router(query, experts, task)
    assert type(routed) is functional.Routed
    assert routed.tokens.shape == (B, T, N, D) and routed.weights.shape == (B, T, N, M)
    expected = functional.route(
        query,
        experts,
        router.base_weight,
        router.base_bias,
        router.u,
        router.v,
        router.g(task),
        router.h(task),
    )
    for other in (expected, router(query, list(experts.unbind(1)), task), router(query, experts, task.expand(B, T, E))):
        torch.testing.assert_close(routed, other)
    changed = task.repeat(B, 1, 1)
    changed[1] += 1
    per_sample = router(query, experts, changed)
    torch.testing.assert_close(per_sample.weights[0], routed.weights[0])
    assert not torch.allclose(per_sample.weights[1], routed.weights[1])


def test_backend_does_not_enter_the_state_dict():
    default, reference = move(make()), make(seed=1, backend="reference")
    assert list(default.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(default.state_dict())
    torch.testing.assert_close(default(*inputs()), reference(*inputs()))
    same_seed = make(backend="reference").state_dict()
    assert all(torch.equal(value, same_seed[name]) for name, value in make().state_dict().items())


@pytest.mark.parametrize(("dim", "rank"), [(64, 8), (192, 32), (768, 32)])
@pytest.mark.parametrize("members", [2, 4])
def test_weights_start_near_uniform_but_not_tied(dim, rank, members):
    router = make(dim, members, rank, hidden=32)
    query, experts, task = inputs(dim=dim, members=members, tokens=64)
    weights = router(query, experts, task).weights
    entropy = -(weights * weights.log()).sum(-1).mean() / math.log(members)
    assert entropy > 0.97
    spread = weights.std(-1).mean()
    # Logits of standard deviation .14 give weights of about .14 / M around 1 / M.
    assert 0.04 < spread * members < 0.4
    assert (weights.argmax(-1).flatten().bincount(minlength=members) > 0).all(), "an expert that never leads is tied"
    between_tasks = (weights[:, 0] - weights[:, 1]).abs().mean()
    assert between_tasks > 1e-4, "tasks start tied"


def test_low_rank_term_is_alive_for_every_task():
    router = make(64, M, 8)
    _, _, task = inputs()
    for scale in router.g(task):
        update = router.u @ torch.diag(scale) @ router.v.T
        assert 0.3 < update.norm() / router.base_weight.norm() < 3, "one of the two terms of eq. 4 is negligible"


def test_gradient_reaches_every_parameter_at_once_but_hs_first_layer():
    router = make()
    query, experts, task = inputs()
    target = torch.randn(B, T, N, D)
    F.mse_loss(router(query, experts, task).tokens, target).backward()
    silent = [name for name, p in router.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    # h starts at 0 by its last layer's weights; its first layer learns from the second step on.
    assert silent == ["h.0.weight", "h.0.bias"]
    torch.optim.SGD(router.parameters(), 0.1).step()
    router.zero_grad()
    F.mse_loss(router(query, experts, task).tokens, target).backward()
    assert all(p.grad.abs().max() > 0 for p in router.parameters())


def test_route_maps_is_forward_on_flattened_maps():
    router = move(make())
    query = torch.randn(B, D, 2, 3)
    experts = [torch.randn(B, D, 2, 3) for _ in range(M)]
    task = torch.randn(T, E)
    maps = router.route_maps(query, experts, task)
    assert maps.tokens.shape == (B, T, D, 2, 3) and maps.weights.shape == (B, T, M, 2, 3)
    flat = router(query.flatten(2).mT, [e.flatten(2).mT for e in experts], task)
    torch.testing.assert_close(maps.tokens.flatten(3).mT, flat.tokens)
    torch.testing.assert_close(maps.weights.flatten(3).mT, flat.weights)


def test_compiles_whole_with_dynamic_batch_and_tokens():
    router = move(make())
    torch.compiler.reset()
    compiled = torch.compile(router, fullgraph=True, dynamic=True, backend="aot_eager")
    counter = torch._dynamo.utils.counters
    counter.clear()
    for batch, tokens in ((2, 6), (3, 11), (5, 4)):
        query, experts, task = inputs(batch, tokens)
        torch.testing.assert_close(compiled(query, experts, task), router(query, experts, task))
        compiled(query, experts, task).tokens.sum().backward()
    assert counter["stats"]["unique_graphs"] == 1, "another batch or token count compiled again"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_casts_float32_and_leaves_double(dtype):
    router = move(make())
    query, experts, task = inputs()
    exact = router(query, experts, task)
    if dtype == torch.float64:
        router, query, experts, task = router.double(), query.double(), experts.double(), task.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, weights = router(query, experts, task)
    assert tokens.dtype == dtype and weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-5 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(weights.float(), exact.weights, atol=tolerance, rtol=tolerance)
    (tokens.float().sum() + weights[..., 0].sum()).backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves_to_another_type_whole(dtype):
    router = make().to(dtype)
    tokens, weights = router(*inputs(dtype=dtype))
    assert tokens.dtype == dtype
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_survives_copy_pickle_and_torch_save():
    router = move(make())
    expected = router(*inputs())
    buffer = io.BytesIO()
    torch.save(router.state_dict(), buffer)
    buffer.seek(0)
    loaded = make(seed=5)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router)), loaded):
        torch.testing.assert_close(twin(*inputs()), expected)


def test_mixes_fewer_experts_when_one_is_absent():
    router = move(make())
    query, experts, task = inputs()
    fewer = router.mix(query, experts[:, 1:], task)
    full = router(query, experts, task).weights[..., 1:]
    torch.testing.assert_close(fewer.weights, full / full.sum(-1, keepdim=True))


def test_a_plain_training_loop_learns_the_useful_expert():
    router, head = make(), nn.Linear(D, 1)
    _, _, task = inputs()
    # An expert is known by its mean; nothing else tells which one carries the target. New data at every step: what is
    # learned is whom to ask, not the answers.
    means = torch.randn(4, 1, D)
    optimiser = torch.optim.Adam([*router.parameters(), *head.parameters()], 1e-2)
    for _ in range(150):
        query, experts = torch.randn(8, 32, D), torch.randn(8, 4, 32, D) + means
        tokens, weights = router(query, experts, task[:1])
        loss = F.mse_loss(head(tokens[:, 0]), (experts - means)[:, 2, :, :1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5 and weights.mean((0, 1, 2)).argmax() == 2


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 4, 10), "dim"), ((16, 0, 10), "num_experts"), ((16, 17, 10), "num_experts"), ((16, 4, 0), "task_dim"),
     ((16, 4, 10, 0), "rank"), ((16, 4, 10, 257), "rank"), ((16, 4, 10, 4, 0), "hidden")],
)  # fmt: skip
def test_sizes_outside_the_limits_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        Router(*arguments)


def test_wrong_inputs_are_named():
    router = make()
    query, experts, task = inputs()
    for error, match, call in (
        (ValueError, "mixes 4, got 3", (query, experts[:, :3], task)),
        (ValueError, "mixes 4, got 5", (query, [*experts.unbind(1), experts[:, 0]], task)),
        (ValueError, r"task must be \(T, 10\)", (query, experts, task[:, :9])),
        (ValueError, r"task must be \(T, 10\)", (query, experts, task[0])),
        (ValueError, "query", (query[0], experts, task)),
        (ValueError, r"experts\[0\]", (query, experts[:, :, :5], task)),
        (TypeError, "float64", (query, experts.double(), task)),
        (TypeError, "task must be a tensor", (query, experts, [0.0])),
        (TypeError, "experts", (query, 3, task)),
    ):
        with pytest.raises(error, match=match):
            router(*call)
    with pytest.raises(ValueError, match="map"):
        router.route_maps(query, list(experts.unbind(1)), task)
    with pytest.raises(ValueError, match=r"experts\[1\]"):
        router.route_maps(torch.zeros(1, D, 2, 2), [torch.zeros(1, D, 2, 2), torch.zeros(1, D, 2, 3)] * 2, task)
    with pytest.raises(ValueError, match="backend"):
        make(backend="nonsense")(query, experts, task)


def test_is_what_the_package_exports():
    assert tiger_fast.Router is Router and issubclass(Router, nn.Module)


def test_task_of_another_type_or_an_unknown_backend_is_named():
    router = Router(8, 2, 4)
    query, experts = torch.randn(1, 3, 8), [torch.randn(1, 3, 8)] * 2
    for wrong in (torch.randn(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.int64)):
        with pytest.raises(TypeError, match="task must be"):
            router(query, experts, wrong)
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        Router(8, 2, 4, backend="refrence")
    with pytest.raises(TypeError, match="sequence of maps"):
        router.route_maps(torch.randn(1, 8, 2, 2), torch.randn(1, 2, 8, 2, 2), torch.randn(2, 4))
