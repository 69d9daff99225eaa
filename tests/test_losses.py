"""Per-pixel losses: hand-worked values, what invalid pixels may not touch, dtypes, and two ranks against one process."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tiger_fast.nn.losses import (
    BalancedCrossEntropy,
    CrossEntropy,
    DepthL1,
    LossMap,
    NormalsL1,
    WeightedBCE,
    mean_over_valid,
    sum_over_ranks,
    token_mean,
)

SIZE = (2, 4, 6)
LOSSES = {
    "semseg": (CrossEntropy(class_weight=[1.0, 0.5, 2.0]), 3),
    "saliency": (BalancedCrossEntropy(), 2),
    "depth": (DepthL1(), 1),
    "normals": (NormalsL1(), 3),
    "edge": (WeightedBCE(), 1),
}


def make_target(task: str, size=SIZE, seed=0, invalid=0.3, dtype=torch.float32) -> torch.Tensor:
    """A random target of the data's own form, with about that share of invalid pixels."""
    g = torch.Generator().manual_seed(seed)
    batch, height, width = size
    off = torch.rand(size, generator=g) < invalid
    if task in ("semseg", "saliency"):
        return torch.randint(LOSSES[task][1], size, generator=g).masked_fill(off, 255)
    if task == "depth":
        return torch.rand(batch, 1, height, width, generator=g).add(0.5).masked_fill(off[:, None], 0).to(dtype)
    if task == "normals":
        unit = F.normalize(torch.randn(batch, 3, height, width, generator=g, dtype=torch.float64), dim=1)
        return unit.masked_fill(off[:, None], 0).to(dtype)
    return (torch.rand(batch, 1, height, width, generator=g) < 0.3).to(dtype).masked_fill(off[:, None], 255)


def make_logits(task: str, size=SIZE, seed=1, dtype=torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size[0], LOSSES[task][1], *size[1:], generator=g, dtype=torch.float64).to(dtype)


def pixels(*columns) -> torch.Tensor:
    """Columns of channel values as logits (1,C,1,W)."""
    return torch.tensor(columns).T[None, :, None]


def close(actual, expected, **kwargs):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-6, **kwargs)


def test_cross_entropy_by_hand():
    # softmax of (ln 1, ln 3) is (1/4, 3/4): -ln 1/4 for class 0, -ln 3/4 for class 1; the last pixel is ignored.
    logits = pixels([0.0, math.log(3)], [0.0, math.log(3)], [5.0, 0.0])
    loss_map = CrossEntropy()(logits, torch.tensor([[[0, 1, 255]]]))
    close(loss_map.values, [[[math.log(4), math.log(4 / 3), 0.0]]])
    assert loss_map.valid.tolist() == [[[True, True, False]]]
    close(mean_over_valid(loss_map), (math.log(4) + math.log(4 / 3)) / 2)


def test_class_weights_multiply_and_the_mean_is_over_pixels():
    logits = pixels([0.0, math.log(3)], [0.0, math.log(3)])
    loss_map = CrossEntropy(class_weight=[2.0, 0.5])(logits, torch.tensor([[[0, 1]]]))
    close(loss_map.values, [[[2 * math.log(4), 0.5 * math.log(4 / 3)]]])
    close(mean_over_valid(loss_map), (2 * math.log(4) + 0.5 * math.log(4 / 3)) / 2)


@pytest.mark.parametrize("label", [-1, 2, 254])
def test_a_class_out_of_range_is_nan_in_its_pixel_only(label):
    for loss in (CrossEntropy(), CrossEntropy(class_weight=[1.0, 1.0]), BalancedCrossEntropy()):
        values = loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, label]]])).values
        assert values[0, 0, 0].isfinite()
        assert values[0, 0, 1].isnan()


def test_balanced_cross_entropy_by_hand():
    # Valid: 3 negatives, 1 positive, so a positive weighs 3/4 and a negative 1/4; every pixel's cross-entropy is ln 2.
    loss_map = BalancedCrossEntropy()(torch.zeros(1, 2, 1, 5), torch.tensor([[[0, 0, 1, 0, 255]]]))
    close(loss_map.values, [[[x * math.log(2) for x in (0.25, 0.25, 0.75, 0.25, 0.0)]]])


def test_depth_l1_by_hand():
    target = torch.tensor([2.0, 0.0, 5.0, -1.0, math.nan, math.inf])[None, None, None]
    loss_map = DepthL1()(torch.tensor([1.5, 9.0, 7.0, 1.0, 1.0, 1.0])[None, None, None], target)
    close(loss_map.values, [[[0.5, 0.0, 2.0, 0.0, 0.0, 0.0]]])
    assert loss_map.valid.tolist() == [[[True, False, True, False, False, False]]]
    close(mean_over_valid(loss_map), 1.25)


def test_normals_l1_by_hand():
    # (3, 0, 4) normalises to (.6, 0, .8); from (0, 0, 1) that is .6 + .2. Zero target: invalid. (0, -2, 0) from (0, 1, 0): 2.
    logits = pixels([3.0, 0.0, 4.0], [1.0, 1.0, 1.0], [0.0, -2.0, 0.0])
    target = pixels([0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    loss_map = NormalsL1()(logits, target)
    close(loss_map.values, [[[0.8, 0.0, 2.0]]])
    close(mean_over_valid(loss_map), 1.4)


def test_a_normal_of_length_zero_has_a_finite_gradient():
    logits = torch.zeros(1, 3, 1, 1, requires_grad=True)
    mean_over_valid(NormalsL1()(logits, pixels([0.0, 0.0, 1.0]))).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2, 0, 0] < 0


def test_weighted_bce_by_hand():
    # sigmoid(ln 3) = 3/4. y = 1: .95 ln(4/3); y = 0: .05 ln 4; y = 1/2: half of each.
    logits = torch.full((1, 1, 1, 4), math.log(3))
    loss_map = WeightedBCE()(logits, torch.tensor([1.0, 0.0, 0.5, 255.0])[None, None, None])
    positive, negative = 0.95 * math.log(4 / 3), 0.05 * math.log(4)
    close(loss_map.values, [[[positive, negative, (positive + negative) / 2, 0.0]]])
    close(WeightedBCE(0.8)(logits[..., :1], torch.ones(1, 1, 1, 1)).values, [[[0.8 * math.log(4 / 3)]]])


def test_weighted_bce_does_not_overflow():
    loss_map = WeightedBCE()(torch.tensor([1e4, -1e4])[None, None, None], torch.tensor([0.0, 1.0])[None, None, None])
    close(loss_map.values, [[[0.05 * 1e4, 0.95 * 1e4]]])


@pytest.mark.parametrize("task", LOSSES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_stands_at_an_invalid_pixel_reaches_neither_value_nor_gradient(task, poison):
    loss, _ = LOSSES[task]
    target = make_target(task)
    clean = make_logits(task).requires_grad_()
    valid = loss(clean, target).valid
    assert valid.any()
    assert not valid.all()
    dirty = clean.detach().masked_fill(~valid[:, None], poison).requires_grad_()
    for logits in (clean, dirty):
        loss_map = loss(logits, target)
        assert (loss_map.values[~valid] == 0).all()
        (mean_over_valid(loss_map) + token_mean(loss_map, (2, 3))[0].sum()).backward()
    assert torch.equal(clean.grad, dirty.grad)
    assert (dirty.grad.masked_select(~valid[:, None]) == 0).all()


@pytest.mark.parametrize("task", LOSSES)
def test_no_valid_pixel_is_zero_with_zero_gradient(task):
    logits = make_logits(task).requires_grad_()
    loss_map = LOSSES[task][0](logits, make_target(task, invalid=2.0))
    mean = mean_over_valid(loss_map)
    mean.backward()
    assert mean == 0
    assert not loss_map.valid.any()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("task", LOSSES)
def test_gradcheck(task):
    loss, _ = LOSSES[task]
    target = make_target(task, dtype=torch.float64)
    logits = make_logits(task, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target).values, logits)


@pytest.mark.parametrize("task", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_low_precision_logits_are_computed_in_float32(task, dtype):
    loss, _ = LOSSES[task]
    logits = make_logits(task).to(dtype).requires_grad_()
    loss_map = loss(logits, make_target(task))
    wide = torch.promote_types(dtype, torch.float32)
    assert loss_map.values.dtype == wide
    assert torch.equal(loss_map.values, loss(logits.to(wide), make_target(task)).values)
    mean_over_valid(loss_map).backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("task", LOSSES)
def test_autocast_changes_nothing(task):
    loss, _ = LOSSES[task]
    logits, target = make_logits(task), make_target(task)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mean_over_valid(loss(logits, target))
    assert torch.equal(inside, mean_over_valid(loss(logits, target)))


@pytest.mark.parametrize("task", LOSSES)
def test_no_host_sync(task):
    # A meta tensor has no values: whatever would read one on the host raises.
    loss = copy.deepcopy(LOSSES[task][0]).to("meta")
    loss_map = loss(make_logits(task).to("meta"), make_target(task).to("meta"))
    assert mean_over_valid(loss_map).shape == ()
    assert token_mean(loss_map, (2, 3))[0].shape == (2, 6)


def test_compiles_whole_with_dynamic_batch():
    def step(logits, targets):
        maps = [loss(logits[task], targets[task]) for task, (loss, _) in LOSSES.items()]
        return sum(mean_over_valid(m) + token_mean(m, (2, 3))[0].sum() for m in maps)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for batch in (2, 3):
        size = (batch, *SIZE[1:])
        targets, grads = {task: make_target(task, size) for task in LOSSES}, []
        for run in (step, compiled):
            logits = {task: make_logits(task, size).requires_grad_() for task in LOSSES}
            for x in (*logits.values(), *targets.values()):
                torch._dynamo.mark_dynamic(x, 0)
            run(logits, targets).backward()
            grads.append({task: x.grad for task, x in logits.items()})
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(0, 4, 6), (2, 0, 6)])
@pytest.mark.parametrize("task", LOSSES)
def test_nothing_at_all_is_zero(task, size):
    loss_map = LOSSES[task][0](make_logits(task, size), make_target(task, size))
    assert loss_map.values.shape == size
    assert mean_over_valid(loss_map) == 0


def test_token_mean_by_hand():
    # A 2x4 map on a 1x2 grid. Left token: valid 1, 2, 3 of 1 2 / 3 (9): mean 2. Right token: none valid.
    values = torch.tensor([[[1.0, 2.0, 5.0, 6.0], [3.0, 9.0, 7.0, 8.0]]])
    valid = torch.tensor([[[True, True, False, False], [True, False, False, False]]])
    means, has_valid = token_mean(LossMap(values, valid), (1, 2))
    assert means.tolist() == [[2.0, 0.0]]
    assert has_valid.tolist() == [[True, False]]


def test_tokens_are_row_major():
    values = torch.arange(6.0).view(1, 2, 3).repeat_interleave(2, 1).repeat_interleave(4, 2)
    means, _ = token_mean(LossMap(values, torch.ones_like(values, dtype=torch.bool)), (2, 3))
    assert means.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]


@pytest.mark.parametrize("grid", [(3, 3), (2, 4), (0, 3), (-2, 3)])
def test_a_grid_that_does_not_divide_is_refused(grid):
    with pytest.raises(ValueError, match="4x6"):
        token_mean(LossMap(torch.zeros(SIZE), torch.ones(SIZE, dtype=torch.bool)), grid)


@pytest.mark.parametrize("task", LOSSES)
def test_wrong_shapes_and_dtypes_are_refused(task):
    loss, channels = LOSSES[task]
    logits, target = make_logits(task), make_target(task)
    with pytest.raises(ValueError, match="target must be"):
        loss(logits, target[..., :-1])
    with pytest.raises(ValueError, match="target must be"):
        loss(logits, target[:1])
    with pytest.raises(ValueError, match="logits must be"):
        loss(logits[0], target)
    with pytest.raises(ValueError, match="classes" if task == "semseg" else "logits must be"):
        loss(torch.zeros(2, channels + 1, 4, 6), target)
    with pytest.raises(TypeError, match="target must be"):
        loss(logits, target.to(torch.int32))
    with pytest.raises(TypeError, match="target must be"):
        loss(logits, target.tolist())
    with pytest.raises(TypeError, match="logits must be"):
        loss(logits.long(), target)
    with pytest.raises(ValueError, match="meta"):
        loss(logits, target.to("meta"))


def test_bad_settings_are_refused():
    for weight in ([[1.0]], [1.0, -1.0], [math.nan]):
        with pytest.raises(ValueError, match="class_weight"):
            CrossEntropy(class_weight=weight)
    with pytest.raises(ValueError, match="positive_weight"):
        WeightedBCE(1.5)
    with pytest.raises(TypeError, match="loss_map"):
        mean_over_valid(LossMap(torch.zeros(2), torch.zeros(2)))
    with pytest.raises(ValueError, match="loss_map"):
        mean_over_valid(LossMap(torch.zeros(2), torch.zeros(3, dtype=torch.bool)))


def test_class_weight_is_no_state_but_moves_along():
    loss = CrossEntropy(class_weight=torch.ones(3))
    assert not loss.state_dict()
    assert loss.to("meta").class_weight.device.type == "meta"


def test_without_a_process_group_nothing_is_communicated(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_: pytest.fail("all_reduce was called"))
    mean_over_valid(BalancedCrossEntropy()(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)))


# Two ranks against one process. Rank 0 holds images 0 and 1, rank 1 image 2.
SHARDS = (slice(0, 2), slice(2, 3))
BATCH = (3, 4, 6)


def whole_batch(task: str, second_rank_empty: bool) -> torch.Tensor:
    """Targets of three images with 10 %, 10 % and 70 % (or 100 %) invalid pixels."""
    first = make_target(task, BATCH, invalid=0.1, dtype=torch.float64)
    last = make_target(task, BATCH, invalid=2.0 if second_rank_empty else 0.7, dtype=torch.float64)
    return torch.cat([first[:2], last[2:]])


def make_model(task: str) -> nn.Module:
    torch.manual_seed(7)
    return nn.Conv2d(3, LOSSES[task][1], 3, padding=1).double()


def images() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(BATCH[0], 3, *BATCH[1:], generator=g, dtype=torch.float64)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for task, (loss, _) in LOSSES.items():
        for empty in (False, True):
            model = DistributedDataParallel(make_model(task))
            value = mean_over_valid(loss(model(images()[SHARDS[rank]]), whole_batch(task, empty)[SHARDS[rank]]))
            value.backward()
            results[task, empty] = (value.detach(), [p.grad for p in model.parameters()])
    counts = torch.tensor([rank + 1])
    results["counts"] = (counts, sum_over_ranks(counts))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still talks to it can abort the other
    dist.destroy_process_group()


def test_two_ranks_give_the_gradients_of_the_whole_batch(tmp_path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    # The caller's counts are not written to.
    assert [r["counts"][0].item() for r in ranks] == [1, 2]
    assert [r["counts"][1].item() for r in ranks] == [3, 3]
    for task, (loss, _) in LOSSES.items():
        for empty in (False, True):
            model = make_model(task)
            value = mean_over_valid(loss(model(images()), whole_batch(task, empty)))
            value.backward()
            values, grads = zip(*(r[task, empty] for r in ranks), strict=True)
            torch.testing.assert_close(sum(values) / 2, value.detach(), rtol=1e-12, atol=1e-12)
            if empty:
                assert values[1] == 0
            for expected, *got in zip([p.grad for p in model.parameters()], *grads, strict=True):
                for grad in got:
                    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
