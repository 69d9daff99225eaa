"""Metrics against values worked out by hand, and what holds for all of them: pieces, merging, reset, NaN, resizing."""

import copy
import importlib
import math
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchmetrics", reason='metrics need the extra: pip install "tiger_fast[train]"')

from tiger_fast.metrics import BoundaryF, DepthRMSE, NormalsAngularError, SaliencyMaxF, SegmentationIoU

NAN = math.nan


def score(metric, *batches) -> float:
    for logits, target in batches:
        metric.update(logits, target)
    return metric.compute().item()


def one_hot(labels, classes: int) -> torch.Tensor:
    """Labels (B,H,W) as logits that predict them."""
    return F.one_hot(torch.as_tensor(labels), classes).movedim(-1, 1) * 10.0


def vectors(*columns) -> torch.Tensor:
    """Columns of channel values as a map (1,C,1,W)."""
    return torch.tensor(columns, dtype=torch.float32).T[None, :, None]


def row(*values) -> torch.Tensor:
    """One row of values as a map (1,1,1,W)."""
    return torch.tensor(values, dtype=torch.float32)[None, None, None]


def salient(*probabilities) -> torch.Tensor:
    """Logits (1,2,1,W) whose softmax gives class 1 these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([(1 - p).log(), p.log()])[None, :, None]


def boundary_logits(probabilities: torch.Tensor) -> torch.Tensor:
    """Logits (1,1,H,W) whose sigmoid gives these probabilities (H,W)."""
    return torch.logit(probabilities.double())[None, None]


# Semantic segmentation

TRUE, PREDICTED = [[[0, 0, 1, 1, 2, 255]]], [[[0, 1, 1, 1, 0, 2]]]
# Class 0: tp 1, fp 1 (the 2 taken for 0), fn 1 -> 1/3. Class 1: tp 2, fp 1, fn 0 -> 2/3. Class 2: tp 0, fn 1 -> 0 (its false
# alarm falls on an ignored pixel). Class 3 occurs nowhere.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1 / 3 + 2 / 3 + 0 + 0) / 4),
        ({"absent": "skip"}, (1 / 3 + 2 / 3 + 0) / 3),
        ({"include_background": False}, (2 / 3 + 0 + 0) / 3),
        ({"absent": "skip", "include_background": False}, (2 / 3 + 0) / 2),
    ],
)
def test_iou_by_hand(options, expected):
    metric = SegmentationIoU(4, **options)
    assert score(metric, (one_hot(PREDICTED, 4), torch.tensor(TRUE))) == pytest.approx(expected)


def test_iou_with_another_ignore_index():
    # Label 0 ignored, so pixels 3, 4, 5 remain: class 1 tp 2 -> 1; class 2 fn 1 -> 0; class 0 fp 1 -> 0.
    target = torch.tensor([[[0, 0, 1, 1, 2, 0]]])
    assert score(SegmentationIoU(3, ignore_index=0), (one_hot(PREDICTED, 3), target)) == pytest.approx(1 / 3)


def test_iou_counts_a_class_that_is_only_predicted_as_present():
    # Class 0: tp 1, fn 1 -> 1/2; class 1: fp 1 -> 0 and not absent; class 2 absent.
    metric = SegmentationIoU(3, absent="skip")
    assert score(metric, (one_hot([[[0, 1]]], 3), torch.tensor([[[0, 0]]]))) == pytest.approx((1 / 2 + 0) / 2)


def test_iou_is_of_the_data_set_and_not_a_mean_over_images():
    # Image 1: class 0 tp 1, fn 1. Image 2: class 0 tp 2. Together 3 / 4 for class 0; class 1: fp 1 -> 0.
    metric = SegmentationIoU(2)
    pieces = [(one_hot([[p]], 2), torch.tensor([[[0, 0]]])) for p in ([0, 1], [0, 0])]
    assert score(metric, *pieces) == pytest.approx((3 / 4 + 0) / 2)


def test_iou_of_nan_is_a_miss_and_no_false_alarm():
    # Pixel 2 (class 0) is NaN: class 0 tp 1, fn 1 -> 1/2. Class 1: tp 1, no fp -> 1.
    logits = one_hot([[[0, 0, 1]]], 2)
    logits[0, 1, 0, 1] = NAN
    assert score(SegmentationIoU(2), (logits, torch.tensor([[[0, 0, 1]]]))) == pytest.approx((1 / 2 + 1) / 2)


# Depth


def test_rmse_by_hand():
    # Errors 1, -2 and (a prediction of -3 counts as 0) -1; 0, 80 and 90 are not valid: sqrt((1 + 4 + 1) / 3).
    pair = row(3.0, 2.0, -3.0, 5.0, 5.0, 5.0), row(2.0, 4.0, 1.0, 0.0, 80.0, 90.0)
    assert score(DepthRMSE(), pair) == pytest.approx(math.sqrt(2))


def test_rmse_max_depth():
    # Below 4 only the first and the third remain: sqrt((1 + 1) / 2).
    assert score(DepthRMSE(max_depth=4.0), (row(3.0, 2.0, 0.0), row(2.0, 4.0, 1.0))) == pytest.approx(1.0)


def test_rmse_pools_pixels_and_not_images():
    # One valid pixel with error 3, three with error 1: sqrt((9 + 3) / 4), not a mean of 3 and 1.
    pieces = (row(4.0, 1.0, 1.0), row(1.0, 0.0, 0.0)), (row(2.0, 2.0, 2.0), row(1.0, 1.0, 1.0))
    assert score(DepthRMSE(), *pieces) == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_rmse_of_a_non_finite_prediction_is_the_worst_within_range(bad):
    # Target 2 of 10: 10 was 8 off. Target 7 of 10: 0 was 7 off. sqrt((64 + 49 + 0) / 3).
    pair = row(bad, bad, 5.0), row(2.0, 7.0, 5.0)
    assert score(DepthRMSE(max_depth=10.0), pair) == pytest.approx(math.sqrt(113 / 3))


def test_rmse_sums_survive_a_large_data_set():
    # In float32 a sum of 2^24 does not grow by 1 any more.
    metric = DepthRMSE()
    metric.update(torch.full((1, 1, 64, 64), 65.0), torch.ones(1, 1, 64, 64))  # 4096 x 64^2 = 2^24
    for _ in range(8):
        metric.update(row(2.0), row(1.0))
    assert metric.squared_error.item() == 2**24 + 8


# Normals


def test_angular_error_by_hand():
    # 0, 90, 180 and 45 degrees; the last target is the zero vector: (0 + 90 + 180 + 45) / 4.
    logits = vectors([0, 0, 5], [3, 0, 0], [0, 0, -2], [1, 1, 0], [1, 1, 1])
    target = vectors([0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0])
    assert score(NormalsAngularError(), (logits, target)) == pytest.approx(78.75, abs=1e-4)


def test_a_small_angle_is_not_lost_to_rounding():
    # 1e-4 rad: its cosine is 1 - 5e-9, which is 1 in float32.
    pair = vectors([1e-4, 0, 1]), vectors([0, 0, 1])
    assert score(NormalsAngularError(), pair) == pytest.approx(math.degrees(1e-4), rel=1e-3)


def test_angular_error_of_targets_that_are_not_quite_unit():
    # 8-bit targets are off unit length by up to a percent; that must not read as an angle.
    assert score(NormalsAngularError(), (vectors([0, 0, 1]), vectors([0, 0, 0.99]))) == pytest.approx(0, abs=1e-4)


def test_angular_error_of_nan_inf_and_zero_predictions():
    # NaN and inf: 180 each; zero: 90; perfect: 0.
    logits = vectors([NAN, 0, 1], [math.inf, 0, 1], [0, 0, 0], [0, 0, 1])
    target = vectors(*[[0, 0, 1]] * 4)
    assert score(NormalsAngularError(), (logits, target)) == pytest.approx(450 / 4, abs=1e-4)


# Saliency


def test_max_f_by_hand():
    # Scores .9 (salient), .6 (not), .4 (salient), .02 (salient), and an ignored one.
    #   up to .40:  3 predicted, 2 hits: P 2/3, R 2/3 -> F = 1.3 * 4/9 / (.3 * 2/3 + 2/3) = 2/3
    #   .45 - .60:  2 predicted, 1 hit:  P 1/2, R 1/3 -> F = 1.3 / 6 / (.15 + 1/3) = .448
    #   .65 - .90:  1 predicted, 1 hit:  P 1, R 1/3   -> F = 1.3 / 3 / (.3 + 1/3) = .684   <- the maximum
    pair = salient(0.9, 0.6, 0.41, 0.02, 0.99), torch.tensor([[[1, 0, 1, 1, 255]]])
    assert score(SaliencyMaxF(), pair) == pytest.approx((1.3 / 3) / (0.3 + 1 / 3))
    # beta2 = 1: 2/3, .4, and 2 * 1/3 / (4/3) = 1/2.
    assert score(SaliencyMaxF(beta2=1.0), pair) == pytest.approx(2 / 3)


def test_a_score_at_the_threshold_is_predicted():
    # Both pixels score exactly 1/2. At .50 both are predicted: P 1/2, R 1 -> 1.3 / 2 / (.15 + 1) = .565. Above: nothing.
    metric = SaliencyMaxF()
    assert score(metric, (torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 0]]]))) == pytest.approx(0.65 / 1.15)
    assert metric.histogram.tolist() == [[0] * 10 + [1] + [0] * 9] * 2


def test_the_doubled_sigmoid_is_another_figure():
    # Salient .12, not salient .08. Softmax: at .10 they part, F = 1. Sigmoid of those: .530 and .520, on the same side of
    # every threshold (.50 | .55): P 1/2, R 1 -> .65 / 1.15.
    pair = salient(0.12, 0.08), torch.tensor([[[1, 0]]])
    assert score(SaliencyMaxF(), pair) == pytest.approx(1.0)
    assert score(SaliencyMaxF(scores="sigmoid_of_softmax"), pair) == pytest.approx(0.65 / 1.15)
    # .30 -> .574 and .10 -> .525 do part at .55.
    pair = salient(0.30, 0.10), torch.tensor([[[1, 0]]])
    assert score(SaliencyMaxF(scores="sigmoid_of_softmax"), pair) == pytest.approx(1.0)


def test_max_f_without_salient_pixels_or_hits_is_zero():
    assert score(SaliencyMaxF(), (salient(0.9, 0.01), torch.tensor([[[0, 0]]]))) == 0
    assert score(SaliencyMaxF(), (salient(0.01, 0.01), torch.tensor([[[0, 0]]]))) == 0
    assert score(SaliencyMaxF(), (salient(0.9, 0.01), torch.tensor([[[0, 1]]]))) == 0


def test_max_f_of_nan_is_wrong_at_every_threshold():
    # Salient: NaN (missed), .99. Not: NaN (false alarm), .01. Everywhere P 1/2, R 1/2 -> F = 1/2.
    pair = salient(NAN, 0.99, NAN, 0.01), torch.tensor([[[1, 1, 0, 0]]])
    assert score(SaliencyMaxF(), pair) == pytest.approx(0.5)


# Boundaries


def edges(height: int, width: int, *columns: int, value: float = 1.0, other: float = 0.0) -> torch.Tensor:
    """A map (H,W) with vertical lines in these columns."""
    result = torch.full((height, width), other)
    result[:, list(columns)] = value
    return result


def test_boundary_f_by_hand():
    # True line in column 2; predicted: column 4 (2 px off, score .8) and column 7 (.6). 5 rows.
    #   up to .60: 10 predicted, 5 within 2 px: P 1/2; all 5 true found: R 1 -> F = 2/3
    #   .61 - .80: 5 predicted, 5 matched: P 1, R 1 -> F = 1
    target = edges(5, 12, 2)[None, None]
    prediction = edges(5, 12, 4, value=0.805, other=0.001)
    prediction[:, 7] = 0.605
    pair = boundary_logits(prediction), target
    assert score(BoundaryF(), pair) == pytest.approx(1.0)
    assert score(BoundaryF(thresholds=[0.5]), pair) == pytest.approx(2 / 3)
    # A tolerance of 1 px: nothing matches.
    assert score(BoundaryF(tolerance_px=1.0), pair) == 0


@pytest.mark.parametrize(
    ("offset", "tolerance", "expected"),
    [((1, 1), 1.4, 0), ((1, 1), 1.5, 1), ((2, 0), 2.0, 1), ((2, 1), 2.0, 0), ((0, 0), 0.0, 1), ((0, 1), 0.0, 0)],
)
def test_the_tolerance_is_euclidean(offset, tolerance, expected):
    # (1, 1) is 1.414 away, (2, 1) is 2.236.
    target, prediction = torch.zeros(1, 1, 9, 9), torch.full((9, 9), 0.001)
    target[0, 0, 4, 4] = 1
    prediction[4 + offset[0], 4 + offset[1]] = 0.9
    assert score(BoundaryF(tolerance_px=tolerance), (boundary_logits(prediction), target)) == expected


def test_boundary_precision_and_recall_differ():
    # True: columns 0 and 9. Predicted: columns 0, 1 and 4. Tolerance 1: P 2/3, R 1/2 -> F = 2 * 1/3 / (7/6) = 4/7.
    pair = boundary_logits(edges(3, 10, 0, 1, 4, value=0.9, other=0.001)), edges(3, 10, 0, 9)[None, None]
    assert score(BoundaryF(tolerance_px=1.0), pair) == pytest.approx(4 / 7)


def test_a_line_widened_to_the_tolerance_costs_nothing_and_a_wider_one_does():
    target = edges(3, 20, 10)[None, None]
    wide = boundary_logits(edges(3, 20, 8, 9, 10, 11, 12, value=0.9, other=0.001))
    wider = boundary_logits(edges(3, 20, 7, 8, 9, 10, 11, 12, 13, value=0.9, other=0.001))
    assert score(BoundaryF(), (wide, target)) == 1
    # P 5/7, R 1 -> F = 10/12.
    assert score(BoundaryF(), (wider, target)) == pytest.approx(10 / 12)


def test_ignored_boundary_pixels_neither_count_nor_match():
    # Predicted: column 3, right beside an ignored true line, and column 4, on it. Only column 3 counts: a false alarm.
    target, prediction = edges(3, 8, 4, value=255.0)[None, None], edges(3, 8, 3, 4, value=0.9, other=0.001)
    metric = BoundaryF()
    assert score(metric, (boundary_logits(prediction), target)) == 0
    assert metric.predicted.sum() == 3 * 7
    # A prediction on an ignored pixel finds no true boundary beside it: R 0.
    target[..., 3] = 1
    prediction[:, 3] = 0.001
    assert score(BoundaryF(), (boundary_logits(prediction), target)) == 0


def test_boundary_f_pools_counts_and_not_images():
    # Image 1: 4 predicted, all matched, 4 of 4 found. Image 2: 8 predicted, none matched, 0 of 4 found.
    # P 4/12, R 4/8 -> F = 2 * 1/6 / (5/6) = 2/5.
    first = boundary_logits(edges(4, 12, 1, value=0.9, other=0.001)), edges(4, 12, 1)[None, None]
    second = boundary_logits(edges(4, 12, 0, 1, value=0.9, other=0.001)), edges(4, 12, 8)[None, None]
    assert score(BoundaryF(), first, second) == pytest.approx(2 / 5)


def test_lines_of_one_image_do_not_match_in_another():
    logits = torch.cat([boundary_logits(edges(3, 6, c, value=0.9, other=0.001)) for c in (1, 4)])
    target = torch.stack([edges(3, 6, c)[None] for c in (4, 1)])
    assert score(BoundaryF(), (logits, target)) == 0


def test_boundary_f_of_nan_is_a_false_alarm_and_finds_nothing():
    # True: column 2, found by column 2. NaN beside it (column 3): P 1/2, R 1 -> 2/3. NaN alone: 0.
    prediction = edges(3, 8, 2, value=0.9, other=0.001)
    prediction[:, 3] = NAN
    pair = boundary_logits(prediction), edges(3, 8, 2)[None, None]
    assert score(BoundaryF(), pair) == pytest.approx(2 / 3)
    assert score(BoundaryF(), (boundary_logits(prediction * NAN), pair[1])) == 0


# All of them

METRICS = {
    "semseg": (lambda: SegmentationIoU(4), 4),
    "depth": (DepthRMSE, 1),
    "normals": (NormalsAngularError, 3),
    "saliency": (SaliencyMaxF, 2),
    "edge": (BoundaryF, 1),
}
NAMES = {"semseg": "mIoU", "depth": "RMSE", "normals": "mErr", "saliency": "maxF", "edge": "F"}


def make_batch(task: str, batch=4, size=(8, 10), invalid=0.2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    channels = METRICS[task][1]
    logits = torch.randn(batch, channels, *size, generator=g)
    off = torch.rand(batch, *size, generator=g) < invalid
    if task in ("semseg", "saliency"):
        return logits, torch.randint(channels, (batch, *size), generator=g).masked_fill(off, 255)
    if task == "normals":
        return logits, F.normalize(torch.randn(batch, 3, *size, generator=g), dim=1).masked_fill(off[:, None], 0)
    target = torch.rand(batch, 1, *size, generator=g)
    if task == "depth":
        return logits, (target + 0.1).masked_fill(off[:, None], 0)
    return logits, (target < 0.1).float().masked_fill(off[:, None], 255)


def perfect_and_worst(task: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target = make_batch(task)[1]
    if task == "semseg":
        good = one_hot(target % 255, 4)
        return good, good.roll(1, 1), target
    if task == "saliency":
        good = one_hot(target % 255, 2)
        return good, good.flip(1), target
    if task == "edge":
        target[..., 5:] = 0
        target[..., :2, :2] = 1
        good = (target == 1) * 20.0 - 10
        far = torch.full_like(good, -10.0)
        far[..., 8:] = 10
        return good, far, target
    return (target, -target, target) if task == "normals" else (target, target * NAN, target)


@pytest.mark.parametrize("task", METRICS)
def test_name_and_direction(task):
    metric = METRICS[task][0]()
    assert metric.name == NAMES[task]
    assert metric.higher_is_better == (task in ("semseg", "saliency", "edge"))


@pytest.mark.parametrize("task", METRICS)
def test_perfect_and_worst_predictions(task):
    good, bad, target = perfect_and_worst(task)
    make = METRICS[task][0]
    if task in ("semseg", "saliency", "edge"):
        assert score(make(), (good, target)) == pytest.approx(1.0)
        # All wrong. Saliency at threshold .05 predicts the whole of the other class: no hits at all.
        assert score(make(), (bad, target)) == 0
    else:
        assert score(make(), (good, target)) == pytest.approx(0.0, abs=1e-4)
        valid = target[target > 0]
        worst = 180.0 if task == "normals" else (80 - valid).square().mean().sqrt().item()
        assert score(make(), (bad, target)) == pytest.approx(worst, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("task", METRICS)
def test_pieces_merging_and_reset_give_the_whole(task):
    make = METRICS[task][0]
    logits, target = make_batch(task)
    whole = score(make(), (logits, target))
    assert math.isfinite(whole)
    pieces = [(logits[s], target[s]) for s in (slice(0, 1), slice(1, 1), slice(1, 4))]
    assert score(make(), *pieces) == pytest.approx(whole, rel=1e-6)

    first, second = make(), make()
    first.update(*pieces[0])
    second.update(*pieces[2])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole, rel=1e-6)

    first.reset()
    assert math.isnan(first.compute().item())
    assert score(first, (logits, target)) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("task", METRICS)
def test_forward_gives_the_batch_and_accumulates(task):
    make = METRICS[task][0]
    logits, target = make_batch(task)
    metric = make()
    for s in (slice(0, 1), slice(1, 4)):
        assert metric(logits[s], target[s]).item() == pytest.approx(score(make(), (logits[s], target[s])))
    assert metric.compute().item() == pytest.approx(score(make(), (logits, target)), rel=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("task", METRICS)
def test_nothing_valid_is_nan_and_adds_nothing(task):
    make = METRICS[task][0]
    assert math.isnan(make().compute().item())
    logits, nothing = make_batch(task, invalid=2.0)
    assert math.isnan(score(make(), (logits, nothing)))
    pair = make_batch(task)
    assert score(make(), pair, (logits, nothing)) == score(make(), pair)


@pytest.mark.parametrize("task", METRICS)
def test_predictions_at_invalid_pixels_change_nothing(task):
    logits, target = make_batch(task)
    clean = score(METRICS[task][0](), (logits, target))
    off = target if target.dim() == 4 else target[:, None]
    off = (off == (0 if task in ("depth", "normals") else 255)).all(1, keepdim=True)
    for poison in (1e3, NAN):
        assert score(METRICS[task][0](), (logits.masked_fill(off, poison), target)) == clean


@pytest.mark.parametrize("task", METRICS)
def test_nan_predictions_never_improve_the_figure(task):
    good, _, target = perfect_and_worst(task)
    metric = METRICS[task][0]()
    clean, broken = score(metric, (good, target)), good.clone()
    broken[0] = NAN
    metric.reset()
    dirty = score(metric, (broken, target))
    assert math.isfinite(dirty)
    assert dirty < clean - 1e-3 if metric.higher_is_better else dirty > clean + 1e-3


@pytest.mark.parametrize("task", METRICS)
def test_smaller_logits_are_resized_to_the_target(task):
    _, target = make_batch(task)
    small = make_batch(task, size=(4, 5))[0]
    large = F.interpolate(small, size=(8, 10), mode="bilinear", align_corners=False)
    make = METRICS[task][0]
    assert score(make(), (small, target)) == score(make(), (large, target))


def test_resizing_does_not_align_corners():
    # 2 -> 4 columns: centres at -.25 (clamped to 0), .25, .75, 1.25 of (1, 3): 1, 1.5, 2.5, 3.
    assert score(DepthRMSE(), (row(1.0, 3.0), row(1.0, 1.5, 2.5, 3.0))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_logits(task, dtype):
    logits, target = make_batch(task)
    make = METRICS[task][0]
    low = logits.to(dtype)
    assert score(make(), (low, target)) == pytest.approx(score(make(), (low.float(), target)), rel=1e-5)


@pytest.mark.parametrize("task", METRICS)
def test_survives_pickling_and_copying(task):
    metric, pair = METRICS[task][0](), make_batch(task)
    metric.update(*pair)
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert twin.compute() == metric.compute()


@pytest.mark.parametrize("task", METRICS)
def test_wrong_shapes_and_dtypes_are_refused_and_leave_no_trace(task):
    metric = METRICS[task][0]()
    logits, target = make_batch(task)
    with pytest.raises(ValueError, match="logits must be"):
        metric.update(torch.zeros(4, 7, 8, 10), target)
    with pytest.raises(ValueError, match="logits must be"):
        metric.update(logits[0], target)
    with pytest.raises(ValueError, match="target must be"):
        metric.update(logits, target[:2])
    with pytest.raises(ValueError, match="target must be"):
        metric.update(logits, target[0])
    with pytest.raises(TypeError, match="target must be"):
        metric.update(logits, target.int())
    with pytest.raises(TypeError, match="logits must be"):
        metric.update(logits.long(), target)
    with pytest.raises(ValueError, match="meta"):
        metric.update(logits, target.to("meta"))
    if task not in ("depth", "normals"):
        with pytest.raises(ValueError, match=r"target must hold .* 77"):
            metric.update(logits, target.clone().fill_(77))
    assert math.isnan(metric.compute().item())


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="did you mean 'skip'"):
        SegmentationIoU(3, absent="skp")
    with pytest.raises(ValueError, match="num_classes"):
        SegmentationIoU(1, include_background=False)
    with pytest.raises(ValueError, match="max_depth"):
        DepthRMSE(0)
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        SaliencyMaxF(scores="sotmax")
    with pytest.raises(ValueError, match="beta2"):
        SaliencyMaxF(beta2=0)
    with pytest.raises(ValueError, match="tolerance_px"):
        BoundaryF(-1.0)
    for thresholds in ([], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0]):
        with pytest.raises(ValueError, match="thresholds"):
            BoundaryF(thresholds=thresholds)


def test_without_torchmetrics_the_import_names_the_extra(monkeypatch):
    for module in [m for m in sys.modules if m.startswith("tiger_fast.metrics")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r'pip install "tiger_fast\[train\]"'):
        importlib.import_module("tiger_fast.metrics")
