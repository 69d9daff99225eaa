"""Scenes: the promised types and values, labels that agree with each other, and bytes that never change."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tiger_fast.data import CLASSES, IGNORE_INDEX, MAX_DEPTH, NUM_CLASSES, Scenes
from tiger_fast.data import scenes as module

# Scenes (index, height, width, seed) of every range of offsets, other sizes and another seed.
GOLDEN_SCENES = [(0, 96, 128, 0), (1, 96, 128, 0), (17, 96, 128, 0), (500_000, 96, 128, 0), (1_000_000, 96, 128, 0)]
GOLDEN_SCENES += [(3, 61, 83, 0), (4, 192, 256, 0), (0, 96, 128, 5)]
GOLDEN = "ec8e880857db9f7d8fa29b7e0b21a1b68137b768e8c86ea1f1e9c33f6e4978ef"

DTYPES = {
    "image": torch.float32,
    "semseg": torch.int64,
    "depth": torch.float32,
    "normals": torch.float32,
    "saliency": torch.int64,
    "edge": torch.float32,
}


def digest() -> str:
    """sha256 over the bytes of all tensors of the golden scenes."""
    state = hashlib.sha256()
    for index, height, width, seed in GOLDEN_SCENES:
        sample = Scenes(1, offset=index, height=height, width=width, seed=seed)[0]
        for name in DTYPES:
            state.update(np.ascontiguousarray(sample[name].numpy()).tobytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def samples() -> list[dict[str, torch.Tensor]]:
    return [Scenes(40, offset=100)[i] for i in range(40)]


@pytest.mark.parametrize(("height", "width"), [(96, 128), (61, 83)])
def test_shapes_and_dtypes(height, width):
    sample = Scenes(3, height=height, width=width)[2]
    shapes = {"image": (3,), "semseg": (), "depth": (1,), "normals": (3,), "saliency": (), "edge": (1,)}
    assert sample.keys() == DTYPES.keys()
    for name, tensor in sample.items():
        assert tensor.dtype == DTYPES[name], name
        assert tensor.shape == (*shapes[name], height, width), name
        assert tensor.is_contiguous(), name


def test_values_are_in_their_ranges(samples):
    for sample in samples:
        assert all(torch.isfinite(tensor).all() for tensor in sample.values())
        assert 0 <= sample["image"].min() and sample["image"].max() <= 1
        assert set(sample["semseg"].unique().tolist()) <= {*range(NUM_CLASSES), IGNORE_INDEX}
        assert set(sample["saliency"].unique().tolist()) <= {0, 1, IGNORE_INDEX}
        assert set(sample["edge"].unique().tolist()) <= {0.0, 1.0, float(IGNORE_INDEX)}
        assert 0 <= sample["depth"].min() and sample["depth"].max() < MAX_DEPTH


def test_image_is_exact_in_eight_bits(samples):
    image = samples[0]["image"]
    assert torch.equal((image * 255).round().to(torch.uint8).float() / 255, image)


def test_normals_are_unit_and_face_the_camera(samples):
    for sample in samples:
        normals, valid = sample["normals"], sample["depth"][0] > 0
        length = normals.norm(dim=0)
        assert (length[~valid] == 0).all()
        assert (length[valid] - 1).abs().max() < 1e-5  # float32 rounding of about ten operations
        height, width = valid.shape
        y, x = torch.meshgrid(
            torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij"
        )
        for focal in (0.7 * width, 0.95 * width):  # the range of focal lengths; the floor and far walls face at both
            facing = normals[0] * x + normals[1] * y + normals[2] * focal < 0
            assert facing[valid].float().mean() > 0.95


def test_floor_faces_up_and_ceiling_faces_down(samples):
    for sample in samples:
        down = sample["normals"][1]
        assert (down[(sample["semseg"] == CLASSES.index("floor"))] < -0.9).all()
        assert (down[sample["semseg"] == CLASSES.index("ceiling")] > 0.9).all()


def test_normals_agree_with_depth(samples):
    """On a plane, 1 / depth is affine in the pixel, and along x its slope has the sign of -n_x."""
    agree, total = 0, 0
    for sample in samples:
        depth, normals, edge = sample["depth"][0], sample["normals"], sample["edge"][0]
        clean = (depth > 0) & (edge == 0)
        pair = clean[:, :-1] & (depth[:, 1:] > 0) & (normals[:, :, 1:] == normals[:, :, :-1]).all(0)
        slope = (1 / depth[:, 1:].clamp(min=0.1) - 1 / depth[:, :-1].clamp(min=0.1))[pair]
        towards = -normals[0, :, :-1][pair]  # 1/z = (n_x x + n_y y + n_z) / (n . p), and n . p < 0
        steep = towards.abs() > 0.2
        agree += int((slope.sign() == towards.sign())[steep].sum())
        total += int(steep.sum())
    assert total > 10_000
    assert agree / total > 0.99


def test_windows_are_where_geometry_is_invalid(samples):
    window = CLASSES.index("window")
    seen = 0
    for sample in samples:
        invalid = sample["depth"][0] == 0
        assert torch.equal(invalid, sample["semseg"] == window)
        seen += int(invalid.any())
    assert seen >= 5


def test_unlabelled_objects_are_ignored_everywhere(samples):
    seen = 0
    for sample in samples:
        void = sample["semseg"] == IGNORE_INDEX
        assert torch.equal(void, sample["saliency"] == IGNORE_INDEX)
        assert (sample["edge"][0][void] == IGNORE_INDEX).all()
        assert not (sample["saliency"][void] == 1).any()
        seen += int(void.any())
    assert 2 <= seen <= 25  # a quarter of 40 in expectation


def test_class_boundaries_are_edges(samples):
    for sample in samples:
        semantics, edge = sample["semseg"], sample["edge"][0]
        differs = semantics[:, :-1] != semantics[:, 1:]
        assert (edge[:, :-1][differs] != 0).all()
        assert 0.005 < (edge == 1).float().mean() < 0.2  # thin


def test_every_class_and_saliency_occur(samples):
    seen = torch.stack([sample["semseg"] for sample in samples]).unique().tolist()
    assert set(range(NUM_CLASSES)) <= set(seen)
    assert sum(bool((sample["saliency"] == 1).any()) for sample in samples) >= 38


def test_saliency_is_spread_over_classes(samples):
    """No class tells saliency: each class of things is salient in some scenes and not in others."""
    for name in ("box", "table", "ball", "column", "panel"):
        here = [sample["saliency"][sample["semseg"] == CLASSES.index(name)] for sample in samples]
        share = torch.cat(here).float().mean()
        assert 0.02 < share < 0.7, name


def test_golden_bytes():
    assert digest() == GOLDEN


def _dispatched_features() -> list[str]:
    core = getattr(np, "_core", None) or np.core
    umath = core._multiarray_umath
    return [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "PYTHONHASHSEED": "7"},
        {"NPY_DISABLE_CPU_FEATURES": " ".join(_dispatched_features())},  # another machine's SIMD width
    ],
    ids=["one thread", "four threads", "baseline instructions"],
)
def test_golden_bytes_in_another_process(environment):
    here = os.path.dirname(__file__)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_scenes; print(test_scenes.digest())"
    paths = [os.path.dirname(here), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, here],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == GOLDEN


def test_golden_bytes_at_other_torch_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert digest() == GOLDEN
    finally:
        torch.set_num_threads(threads)


def test_offset_only_shifts_the_index():
    first, second = Scenes(4)[3], Scenes(1, offset=3)[0]
    assert all(torch.equal(first[name], second[name]) for name in DTYPES)


def test_order_of_access_does_not_matter():
    data = Scenes(3)
    backwards = [data[i]["image"] for i in (2, 1, 0)][::-1]
    assert all(torch.equal(image, data[i]["image"]) for i, image in enumerate(backwards))


def test_seeds_and_indices_differ():
    images = [Scenes(2, seed=seed)[i]["image"] for seed in (0, 1) for i in (0, 1)]
    assert all(not torch.equal(images[i], images[j]) for i in range(4) for j in range(i))


def test_draws_are_never_used_up(monkeypatch):
    """Two hundred scenes need at most half of the stream each, so that no unlucky one runs out."""
    monkeypatch.setattr(module, "_DRAWS", module._DRAWS // 2)
    for index in range(200):
        module.render(index, 8, 8)


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        Scenes(4)[index]


def test_length_and_iteration():
    assert len(Scenes(0)) == 0
    assert len(list(Scenes(2, height=8, width=8))) == 2


@pytest.mark.parametrize("argument", ["size", "offset", "height", "width", "seed"])
def test_bad_arguments_are_named(argument):
    with pytest.raises(ValueError, match=argument):
        Scenes(**{"size": 1, argument: -1})
    with pytest.raises(TypeError, match=argument):
        Scenes(**{"size": 1, argument: 2.5})
