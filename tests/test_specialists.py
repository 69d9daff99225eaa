"""Specialists: the experts' interface, the registry and its errors, the shipped weights, and that each is special."""

import pytest
import torch

from tiger_fast.data import HELDOUT_OFFSET, Scenes
from tiger_fast.experts import SPECIALISTS, Expert, load_specialists
from tiger_fast.experts import specialists as module
from tiger_fast.training import specialists as training

safetensors = pytest.importorskip("safetensors.torch", reason="the weights are safetensors files")

GRID = (12, 16)


@pytest.fixture(scope="module")
def experts() -> dict[str, Expert]:
    return {expert.name: expert for expert in load_specialists()}


@pytest.fixture(scope="module")
def batch() -> training.Batch:
    return training.load_batch(HELDOUT_OFFSET, 96)


@pytest.fixture(scope="module")
def tokens(experts, batch) -> dict[str, torch.Tensor]:
    return {name: training.encode(expert, batch["image"]) for name, expert in experts.items()}


def test_registry_has_the_four_pretexts_at_different_shapes():
    assert list(SPECIALISTS) == ["semantics", "geometry", "boundaries", "appearance"]
    assert SPECIALISTS.keys() == training.PRETEXTS.keys()
    assert len({entry.patch_size for entry in SPECIALISTS.values()}) == 4
    assert len({entry.dim for entry in SPECIALISTS.values()}) == 4


@pytest.mark.parametrize("name", list(SPECIALISTS))
@pytest.mark.parametrize(("size", "grid"), [((96, 128), (12, 16)), ((70, 41), (5, 7)), ((8, 8), (1, 1))])
def test_tokens_follow_the_grid(experts, name, size, grid):
    expert = experts[name]
    result = expert(torch.rand(2, 3, *size), grid=grid)
    assert result.shape == (2, grid[0] * grid[1], expert.dim)
    assert expert.dim == SPECIALISTS[name].dim
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()


def test_input_is_resized_to_grid_times_patch(experts):
    for expert in experts.values():
        conditioned = expert.condition(torch.rand(1, 3, 50, 60), (5, 7))
        assert conditioned.shape == (1, 3, 5 * expert.patch_size, 7 * expert.patch_size)


def test_input_is_conditioned_with_the_experts_own_statistics():
    expert = Expert("own", torch.nn.Identity(), 2, 3, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    conditioned = expert(torch.full((1, 3, 2, 2), 0.6), (1, 1))
    assert torch.allclose(conditioned[0, :, 0, 0], torch.tensor([1.0, 0.4, 0.15]))


def test_tokens_are_row_major():
    """Without its blocks a specialist is local: a patch painted into one token's place moves that token alone."""
    torch.manual_seed(0)
    expert = Expert("local", module.SpecialistNet(patch_size=8, dim=5, depth=0), 8, 5)
    image = torch.full((1, 3, 96, 128), 0.5)
    other = image.clone()
    other[:, :, 8 * 3 + 3 : 8 * 3 + 5, 8 * 10 + 3 : 8 * 10 + 5] = 1.0
    moved = (expert(other, GRID) - expert(image, GRID)).abs().amax(dim=2)[0]
    assert moved.nonzero().flatten().tolist() == [3 * 16 + 10]


def test_experts_are_frozen(experts):
    for expert in experts.values():
        assert not any(parameter.requires_grad for parameter in expert.parameters())
        expert.train()
        assert not any(part.training for part in expert.modules())
        images = torch.rand(1, 3, 96, 128, requires_grad=True)
        assert not expert(images, GRID).requires_grad


def test_a_frozen_expert_inside_a_training_model_stays_in_evaluation_mode():
    expert = Expert("noisy", torch.nn.Dropout(0.5), 2, 3)
    torch.nn.Sequential(expert).train()
    images = torch.rand(1, 3, 2, 2)
    assert torch.equal(expert(images, (1, 1)), expert(images, (1, 1)))


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(3, 8, 8), ValueError),
        (torch.zeros(1, 1, 8, 8), ValueError),
        (torch.zeros(1, 3, 0, 8), ValueError),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError),
        ([[0.0]], TypeError),
    ],
)
def test_bad_images_are_refused(experts, images, error):
    with pytest.raises(error, match="images must be"):
        experts["semantics"](images, GRID)


@pytest.mark.parametrize("grid", [(0, 4), (4, -1), (4,), (4, 4, 4), (4.0, 4.0), 4, "12"])
def test_bad_grids_are_refused(experts, grid):
    with pytest.raises(ValueError, match="grid must be two positive integers"):
        experts["semantics"](torch.zeros(1, 3, 8, 8), grid)


def test_named_specialists_come_in_the_order_asked_for():
    assert [expert.name for expert in load_specialists(["appearance", "geometry"])] == ["appearance", "geometry"]
    assert load_specialists([]) == []


def test_unknown_name_gets_the_near_match():
    with pytest.raises(ValueError, match="'geometri'.*'geometry'"):
        load_specialists(["geometri"])
    with pytest.raises(TypeError, match="sequence of names"):
        load_specialists("geometry")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no weights for specialist 'geometry'.*geometry\.safetensors"):
        load_specialists(["geometry"], tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "foreign", "renamed"])
def test_corrupt_weights_are_refused(tmp_path, damage):
    whole = (module.WEIGHTS / "geometry.safetensors").read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "noise": bytes(range(256)) * 8,
        "empty": b"",
        "foreign": (module.WEIGHTS / "appearance.safetensors").read_bytes(),
        "renamed": safetensors.save({"weight": torch.zeros(3)}),
    }[damage]
    (tmp_path / "geometry.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"geometry\.safetensors does not hold the weights of specialist 'geometry'"):
        load_specialists(["geometry"], tmp_path)


def test_weights_are_small():
    files = sorted(module.WEIGHTS.glob("*.safetensors"))
    assert [file.stem for file in files] == sorted(SPECIALISTS)
    assert sum(file.stat().st_size for file in files) < 4_000_000


def test_tokens_are_standardised_on_held_out_scenes(tokens):
    for name, values in tokens.items():
        mean, std = values.mean(dim=(0, 1)), values.std(dim=(0, 1))
        # 96 other scenes: a channel's mean over scenes varies by well under 0.3 of its deviation
        assert mean.abs().max() < 0.3, name
        assert 0.75 < std.min() and std.max() < 1.3, name


def _scores(task: str, tokens: dict[str, torch.Tensor], batch: training.Batch) -> dict[str, float]:
    fit, held = slice(0, 64), slice(64, 96)
    known, unseen = ({key: value[part] for key, value in batch.items()} for part in (fit, held))
    return {name: training.probe(task, values[fit], known, values[held], unseen) for name, values in tokens.items()}


@pytest.mark.parametrize(
    ("task", "expert"),
    [
        ("semseg", "semantics"),
        ("depth", "geometry"),
        ("normals", "geometry"),
        ("edge", "boundaries"),
        ("saliency", "appearance"),
    ],
)
def test_each_task_is_best_read_from_its_specialist(tokens, batch, task, expert):
    scores = _scores(task, tokens, batch)
    higher = training.PROBE_TASKS[task][1]
    assert (max if higher else min)(scores, key=scores.get) == expert, scores


def test_saliency_needs_appearance(tokens, batch):
    scores = _scores("saliency", tokens, batch)
    others = max(score for name, score in scores.items() if name != "appearance")
    assert scores["appearance"] > 1.5 * others, scores


def test_average_precision_of_a_ranking_worked_out_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    positive = torch.tensor([True, False, True, False])
    assert training.average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)


def test_training_a_specialist_gives_the_same_weights_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "standardise", lambda expert, offset, count: None)
    first, second = (training.train_specialist("appearance", steps=2, batch_size=2) for _ in range(2))
    for (key, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    path = training.save_specialist(first, tmp_path)
    loaded = load_specialists(["appearance"], path.parent)[0]
    for (key, one), other in zip(first.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_pretext_heads_fill_each_tokens_own_cell():
    head = torch.nn.Linear(1, training.CELL**2)
    torch.nn.init.ones_(head.weight)
    torch.nn.init.zeros_(head.bias)
    tokens = torch.zeros(1, 192, 1)
    tokens[0, 16 * 2 + 5] = 1.0
    pixels = training.predict_pixels(head, tokens)
    assert pixels.shape == (1, 1, 96, 128)
    assert pixels[0, 0, 16:24, 40:48].eq(1).all() and pixels.sum() == 64


def test_shuffled_colours_stay_images():
    images = Scenes(2)[0]["image"][None].expand(4, -1, -1, -1)
    shuffled = training.shuffle_colours(images, torch.Generator().manual_seed(0))
    assert shuffled.shape == images.shape
    assert shuffled.min() >= -1e-6 and shuffled.max() <= 1 + 1e-6
    assert (shuffled[0] - shuffled[1]).abs().max() > 0.01
