"""What is special to the Triton kernels of the counterfactual losses: the ways that sizes choose, edges of tiles, and what
may stand behind them. Values over all cases are compared elsewhere."""

import pytest
import torch
from helpers import gradients, make, relative_error, replaced, tensors

pytest.importorskip("triton")

from tiger_fast.ops import triton as backend

if not backend.INTERPRETED:
    pytest.skip("these run in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from tiger_fast.kernels import config, counterfactual
from tiger_fast.kernels.launch import recording

CPU = torch.device("cpu")


def compare(name: str, arguments: dict, limit: float = 3e-6, **keywords: object) -> None:
    """Values and gradients against the reference in float64; a NaN must be one in both."""
    exact = replaced(arguments, {k: t.double() for k, t in tensors(arguments).items() if t.is_floating_point()})
    outputs, found = gradients(name, arguments, backend="triton", **keywords)
    values, expected = gradients(name, exact, backend="reference", **keywords)
    pairs = [*zip(outputs, values, strict=True), *((found[key], expected[key]) for key in found)]
    for value, other in pairs:
        assert torch.equal(value.isnan(), other.isnan())
        assert relative_error(value.nan_to_num(), other.nan_to_num()) < limit


def by_library(members: int, classes: int, width: int = 64) -> bool:
    return not config.choose("counterfactual", CPU, torch.float32, D=width, M=members, C=classes).classes


@pytest.fixture(params=["one kernel", "library"])
def way(request, monkeypatch):
    """A few classes by either way, the library's as if they were many."""
    if request.param == "library":
        monkeypatch.setitem(config._HEURISTICS, "counterfactual", lambda *_, **__: config.Config(16, 0, 4))
    config.reload()
    yield request.param
    config.reload()


def kernels_of(name: str, arguments: dict) -> list[str]:
    with recording() as launches:
        gradients(name, arguments, backend="triton")
    return [launch.kernel.fn.__name__ for launch in launches]


def test_few_classes_take_one_kernel_and_many_the_library():
    assert not by_library(4, 40) and not by_library(16, 21) and not by_library(1, 256)
    assert by_library(4, 150) and by_library(16, 40) and by_library(1, 1000)
    name = "counterfactual_losses mse"
    backward = ["gradients", "_features", "_head"]
    assert kernels_of(name, make(name, torch.float32, C=40)) == ["from_experts", *backward]
    assert kernels_of(name, make(name, torch.float32, C=150)) == ["from_projections", *backward]


@pytest.mark.parametrize("loss", ["cross_entropy", "cosine", "bce"])
@pytest.mark.parametrize("classes", [64, 65, 129, 257])
def test_classes_in_tiles(loss, classes):
    name = f"counterfactual_losses_from_projections {loss} valid"
    compare(name, make(name, torch.float32, B=1, N=3, M=2, C=classes))


@pytest.mark.parametrize("classes", [16, 17, 150])
def test_head_gradients_over_classes_in_tiles(classes):
    name = "counterfactual_losses cross_entropy valid"
    compare(name, make(name, torch.float32, B=1, N=33, M=2, C=classes, D=70 if classes < 100 else 20))


def test_sixteen_experts_on_both_ways():
    name = "counterfactual_losses l1"
    for classes in (9, 40):
        assert by_library(16, classes) == (classes == 40)
        compare(name, make(name, torch.float32, B=1, N=1, M=16, C=classes, D=8))


@pytest.mark.parametrize("width", [9, 20], ids=["made again", "kept"])
def test_projections_by_parts_are_those_in_one(way, width, monkeypatch):
    name = "counterfactual_losses cosine valid"
    arguments = make(name, torch.float32, B=2, N=3, M=2, C=6, D=width)
    whole = gradients(name, arguments, backend="triton")
    row = 2 * 8 * 4  # classes in whole vectors
    for size in (3 * row, 2 * row):  # a sample, parts of one
        monkeypatch.setattr(counterfactual, "_SCRATCH", size)
        outputs, found = gradients(name, arguments, backend="triton")
        assert all(relative_error(value, other) < 1e-6 for value, other in zip(outputs, whole[0], strict=True))
        for key, value in found.items():
            assert relative_error(value, whole[1][key]) < 1e-6, key


def test_parts_cover_every_token_once(monkeypatch):
    for batch, tokens, most in ((3, 5, 5), (3, 5, 12), (2, 7, 3), (4, 1, 2), (0, 3, 9), (3, 0, 9), (2, 3, 0)):
        monkeypatch.setattr(counterfactual, "_SCRATCH", 8 * most)
        seen = torch.zeros(batch, tokens, dtype=torch.int)
        for part in counterfactual._parts(batch, tokens, 8):
            assert seen[part].numel() <= max(1, most)
            seen[part] += 1
        assert (seen == 1).all()


def test_what_does_not_count_is_neither_read_nor_heard_of(way):
    name = "counterfactual_losses cross_entropy valid"
    arguments = make(name, torch.float32, B=2, N=4, M=2, C=5, D=8)
    arguments["valid"] = torch.tensor([[True, False, True, True], [True, True, False, True]])
    arguments["target"][0, 0] = arguments["ignore_index"] = -7
    skipped = ~arguments["valid"] | (arguments["target"] == -7)
    for expert in arguments["experts"]:
        expert[skipped] = float("nan")
    arguments["weights"][skipped] = float("inf")
    compare(name, arguments)
    outputs, found = gradients(name, arguments, backend="triton")
    assert all(value.isfinite().all() for value in (*outputs, *found.values()))


def test_infinite_experts_are_not_in_what_leaves_them_out(way):
    name = "counterfactual_losses mse"
    arguments = make(name, torch.float32, B=1, N=3, M=3, C=5, D=8)
    arguments["experts"][1][0, 1] = float("inf")
    outputs, _ = gradients(name, arguments, backend="triton")
    assert outputs[1][0, 1].isfinite().all()
    assert outputs[0].isfinite().tolist() == [[True, False, True]]


@pytest.mark.parametrize("classes", [5, 200])
def test_a_class_that_does_not_exist_is_a_nan_of_its_token(classes):
    name = "counterfactual_losses_from_projections cross_entropy"
    arguments = make(name, torch.float32, B=1, N=5, M=2, C=classes)
    for token, label in enumerate((-1, 0, classes, 2**40)):
        arguments["target"][0, token] = label
    compare(name, arguments)


def test_infinite_logits_in_a_later_tile():
    name = "counterfactual_losses_from_projections cross_entropy"
    arguments = make(name, torch.float32, B=1, N=3, M=1, C=200)
    arguments["head_bias"] = None
    arguments["projections"][0, 0, 0, :] = -float("inf")
    arguments["projections"][0, 0, 0, 190] = -1e4
    arguments["projections"][0, 0, 1, :128] = -float("inf")
    arguments["projections"][0, 0, 2, 150:] = 1e4
    arguments["target"][0] = torch.tensor([190, 130, 160])
    arguments["weights"].fill_(1)
    outputs, _ = gradients(name, arguments, backend="triton")
    exact = arguments | {key: arguments[key].double() for key in ("projections", "weights")}
    expected, _ = gradients(name, exact, backend="reference")
    torch.testing.assert_close(outputs[0].double(), expected[0])


def test_slices_of_a_wider_product_are_taken_as_they_are():
    name = "counterfactual_losses_from_projections bce"
    arguments = make(name, torch.float32, B=2, N=3, M=2, C=12)
    wide = torch.full((2, 2, 3, 40), float("nan"))
    wide[..., 5:17] = arguments["projections"]
    compare(name, arguments | {"projections": wide[..., 5:17]})
    with recording() as launches:
        gradients(name, arguments | {"projections": wide[..., 5:17]}, backend="triton")
    assert all(launch.arguments[0].stride(-2) == 40 for launch in launches)


def test_absent_gradients_and_single_needs(way):
    name = "counterfactual_losses cross_entropy"
    arguments = make(name, torch.float32, B=1, N=3, M=2, C=5, D=8)
    function = torch.ops.tiger_fast_interpreted.counterfactual_losses_backward
    values = (arguments["experts"], *(arguments[k] for k in ("weights", "head_weight", "head_bias", "target")))

    def found(full, without, needs):
        return function(full, without, None, *values, 0, None, 255, needs)

    full, without = torch.randn(1, 3), torch.randn(1, 2, 3)
    everything = found(full, without, 0b11111)
    halves = [found(full, None, 0b11111), found(None, without, 0b11111)]
    for value, *parts in zip(everything, *halves, strict=True):
        torch.testing.assert_close(value, parts[0] + parts[1])
    for bit, value in enumerate(everything):
        (alone,) = found(full, without, 1 << bit)
        assert torch.equal(alone, value)
    with recording() as launches:
        found(full, without, 1 << 2)  # the weights alone need no product through the head
    assert [launch.kernel.fn.__name__ for launch in launches] == ["gradients"]


def test_the_head_is_summed_up_in_shares_that_do_not_depend_on_chance(monkeypatch):
    name = "counterfactual_losses mse"
    arguments = make(name, torch.float32, B=2, N=70, M=1, C=5, D=20)
    first = gradients(name, arguments, backend="triton")[1]["head_weight"]
    assert torch.equal(first, gradients(name, arguments, backend="triton")[1]["head_weight"])
    monkeypatch.setattr(config, "MULTIPROCESSORS", 1)
    assert relative_error(gradients(name, arguments, backend="triton")[1]["head_weight"], first) < 1e-6


def test_a_float32_head_beside_bfloat16_experts():
    name = "counterfactual_losses mse"
    arguments = make(name, torch.bfloat16, torch.float32, B=1, N=4, M=2, C=5, D=20)
    _, found = gradients(name, arguments, backend="triton")
    _, exact = gradients(name, make(name, torch.float64, B=1, N=4, M=2, C=5, D=20), backend="reference")
    assert {key: value.dtype for key, value in found.items() if "experts" not in key} == dict.fromkeys(
        ("weights", "head_weight", "head_bias", "target"), torch.float32
    )
    assert all(relative_error(value, exact[key]) < 3e-2 for key, value in found.items())


@pytest.mark.parametrize("sizes", [{"N": 0}, {"B": 0}, {"N": 0, "C": 300}, {"B": 0, "N": 0, "C": 300}])
def test_no_tokens(sizes):
    name = "counterfactual_losses mse"
    compare(name, make(name, torch.float32, **sizes))
