"""The conformance vectors: values and gradients of an independent implementation, written from the papers alone."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from conftest import DRY_RUN
from helpers import ACTIVATIONS, FUNCTIONS, relative_error

import tiger_fast
from tiger_fast import functional
from tiger_fast.ops.triton import INTERPRETED

VECTORS = sorted(Path(__file__).with_name("conformance").glob("*.npz"))
# What tests/conformance/README.md calls agreement.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
GRADIENT_FACTOR = 20
OPTIONAL = {
    "route": ("base_bias",),
    "counterfactual_losses": ("head_bias",),
    "counterfactual_losses_from_projections": ("head_bias",),
}


def function_of(path: Path) -> str:
    return path.stem.rpartition("_")[0]


def load(path: Path, dtype: torch.dtype, backend: str) -> tuple[dict, dict, dict]:
    """Arguments, keywords and everything that is stored, on the backend's device."""
    stored = numpy.load(path)
    keywords = json.loads(str(stored["attrs"])) | {"backend": backend}
    device = "cuda" if backend == "triton" and not INTERPRETED else "cpu"
    arrays = {key: torch.from_numpy(stored[key]).to(device) for key in stored.files if key != "attrs"}
    arrays = {key: value.to(dtype) if value.is_floating_point() else value for key, value in arrays.items()}
    inputs = {key.removeprefix("in_"): value for key, value in arrays.items() if key.startswith("in_")}
    for name in OPTIONAL.get(function_of(path), ()):
        inputs.setdefault(name, None)
    return inputs, keywords, arrays


def test_every_function_with_vectors_exists():
    covered = {function_of(path) for path in VECTORS}
    assert len(VECTORS) >= 20
    assert covered <= set(FUNCTIONS)
    assert set(FUNCTIONS) - covered <= {"group_attention_packed", "counterfactual_losses_from_projections"}


# Triton's kernels have no float64. On a GPU they are part of what `-m gpu` selects.
COMBINATIONS = [
    pytest.param(
        backend,
        dtype,
        id=f"{backend}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.gpu] if backend == "triton" and (DRY_RUN or not INTERPRETED) else [],
    )
    for backend in tiger_fast.available_backends()
    for dtype in (torch.float64, torch.float32)
    if (backend, dtype) != ("triton", torch.float64)
]


# Experts in one tensor, as the vectors have them, and apart.
FORMS = [
    pytest.param(path, listed, id=path.stem + "-listed" * listed)
    for path in VECTORS
    for listed in ((False, True) if "experts" in ACTIVATIONS[function_of(path)] else (False,))
]


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize(("path", "listed"), FORMS)
def test_values_and_gradients_agree(path, dtype, listed, backend):
    inputs, keywords, stored = load(path, dtype, backend)
    wanted = {k: v.requires_grad_() for k, v in inputs.items() if v is not None and v.is_floating_point()}
    arguments = inputs | ({"experts": inputs["experts"].unbind(1)} if listed else {})
    result = getattr(functional, function_of(path))(**arguments, **keywords)
    names = [key.removeprefix("out_") for key in stored if key.startswith("out_")]
    outputs = dict(zip(names, (result,), strict=True)) if len(names) == 1 else result._asdict()
    assert set(outputs) == set(names)
    for name, value in outputs.items():
        assert relative_error(value, stored[f"out_{name}"]) <= TOLERANCE[dtype], name

    cotangents = [stored[f"cot_{name}"] for name in outputs]
    found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), cotangents, allow_unused=True)
    found = dict(zip(wanted, found, strict=True))
    expected = {key.removeprefix("grad_"): value for key, value in stored.items() if key.startswith("grad_")}
    assert expected and set(expected) <= set(found)
    for name, value in expected.items():
        gradient = torch.zeros_like(value) if found[name] is None else found[name]
        assert relative_error(gradient, value) <= GRADIENT_FACTOR * TOLERANCE[dtype], name


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize(
    "path", [p for p in VECTORS if function_of(p) == "group_attention"], ids=lambda path: path.stem
)
def test_packed_attention_agrees_with_the_vectors(path, dtype, backend):
    inputs, keywords, stored = load(path, dtype, backend)
    qkv = torch.cat([inputs["q"], inputs["k"], inputs["v"]], dim=-1).requires_grad_()
    out = functional.group_attention_packed(qkv, **keywords)
    assert relative_error(out, stored["out_out"]) <= TOLERANCE[dtype]
    (gradient,) = torch.autograd.grad(out, qkv, stored["cot_out"])
    expected = torch.cat([stored[f"grad_{name}"] for name in "qkv"], dim=-1)
    assert relative_error(gradient, expected) <= GRADIENT_FACTOR * TOLERANCE[dtype]


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize(
    "path", [p for p in VECTORS if function_of(p) == "counterfactual_losses"], ids=lambda path: path.stem
)
def test_losses_from_projections_agree_with_the_vectors(path, dtype, backend):
    inputs, keywords, stored = load(path, dtype, backend)
    inputs = {k: v.requires_grad_() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    head_weight = inputs.pop("head_weight")
    projections = inputs.pop("experts") @ head_weight.T
    result = functional.counterfactual_losses_from_projections(projections, **inputs, **keywords)
    for name, value in result._asdict().items():
        assert relative_error(value, stored[f"out_{name}"]) <= TOLERANCE[dtype], name
    (gradient,) = torch.autograd.grad(result, head_weight, [stored["cot_full"], stored["cot_without"]])
    assert relative_error(gradient, stored["grad_head_weight"]) <= GRADIENT_FACTOR * TOLERANCE[dtype]
