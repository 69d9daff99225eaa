"""Group attention by Triton kernels: both of its ways at the sizes where they begin and end, groups padded to a tile, heads
wider than one, views of packed tensors, and numbers that are not finite."""

import math

import pytest
import torch

pytest.importorskip("triton")

from helpers import gradients, make
from native import check_one, exactly

from tiger_fast.ops import triton as backend

if not backend.INTERPRETED:
    pytest.skip("runs in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)

from tiger_fast.kernels import group_attention as kernels
from tiger_fast.kernels.launch import recording

NAMES = ("group_attention", "group_attention_packed")
# Members, heads, channels of a head, tokens. Rows are tokens x heads.
BY_ELEMENTS = {
    "one channel a head, more rows than a tile": (3, 7, 1, 10),
    "rows of a tile begin within a token": (4, 3, 64, 4),
    "channels that fill no vector": (5, 2, 7, 3),
    "channels that fill no power of two": (4, 2, 24, 3),
    "the widest head": (2, 1, 256, 3),
    "the largest group": (8, 1, 4, 2),
}
BY_PRODUCTS = {
    "the smallest group": (9, 2, 8, 3),
    "a whole tile of members": (16, 1, 16, 3),
    "the next tile of members": (17, 3, 8, 2),
    "the largest group of all": (32, 1, 32, 2),
    "one channel a head": (10, 5, 1, 3),
    "a head in steps": (9, 1, 100, 1),
    "a small group of heads too wide for elements": (2, 1, 257, 1),
    "one member of heads too wide for elements": (1, 1, 257, 1),
}
SIZES = BY_ELEMENTS | BY_PRODUCTS


def arguments_of(name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> dict:
    members, heads, head, tokens = sizes
    return make(name, dtype, B=2, G=members, D=heads * head, N=tokens) | {"num_heads": heads}


def compare(name: str, arguments: dict, dtype: torch.dtype) -> None:
    outputs, found = gradients(name, arguments, backend="triton")
    eager, eager_found = gradients(name, arguments, backend="reference")
    exact, exact_found = gradients(name, exactly(arguments), backend="reference")
    check_one("output", outputs[0], eager[0], exact[0], 2, dtype, 1)
    for key, value in found.items():
        check_one(f"gradient of {key}", value, eager_found[key], exact_found[key], 2, dtype, 1)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_agree_with_the_reference(sizes):
    compare("group_attention", arguments_of("group_attention", sizes), torch.float32)


@pytest.mark.parametrize("sizes", [(4, 2, 16, 3), (6, 2, 16, 3), (9, 3, 8, 3), (18, 1, 20, 1)], ids=str)
def test_half_precision_agrees_with_the_reference(sizes):
    compare("group_attention_packed", arguments_of("group_attention_packed", sizes, torch.float16), torch.float16)


def launched(members: int, head: int, dtype: torch.dtype) -> list[str]:
    inputs = [torch.empty(1, members, 3, 2 * head, dtype=dtype, device="meta") for _ in range(4)]
    with recording() as launches:
        kernels.group_attention(*inputs[:3], 2)
        kernels.group_attention_backward(*inputs, 2, 7)
    return [launch.kernel.fn.__name__.rpartition("_")[2] for launch in launches]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_sizes_above_take_both_ways(sizes):
    members, _, head, _ = sizes
    way = "elements" if sizes in BY_ELEMENTS.values() else "products"
    assert launched(members, head, torch.float32) == [way, way]


def test_the_way_is_chosen_by_group_and_type():
    assert launched(5, 64, torch.bfloat16) == ["elements", "elements"]
    assert launched(6, 64, torch.bfloat16) == ["elements", "products"]
    assert launched(7, 64, torch.bfloat16) == ["products", "products"]
    assert launched(8, 64, torch.float32) == ["elements", "elements"]
    assert launched(9, 64, torch.float32) == ["products", "products"]


@pytest.mark.parametrize("head", [1, 3, 8, 24, 36, 64, 200, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration_covers_its_tile(dtype, head):
    # What Triton would refuse: extents that are no powers of two, tiles of products under 16, and rows without a thread.
    for members in range(1, 33):
        inputs = [torch.empty(1, members, 3, head, dtype=dtype, device="meta") for _ in range(4)]
        with recording() as launches:
            kernels.group_attention(*inputs[:3], 1)
            kernels.group_attention_backward(*inputs, 1, 7)
        for launch in launches:
            c = launch.constants
            extents = [c["BLOCK_R"], c["BLOCK_D"], c.get("BLOCK_G", 16), c["num_warps"]]
            assert all(size > 0 and size & (size - 1) == 0 for size in extents)
            if "BLOCK_G" in c:
                assert min(c["BLOCK_G"], c["BLOCK_D"]) >= 16 and c["BLOCK_G"] >= members
                assert c["BLOCK_R"] == 1 or c["BLOCK_R"] >= c["num_warps"], "warps would repeat each other's work"
            else:
                assert c["BLOCK_D"] >= head, "by elements a head is one tile"


@pytest.mark.parametrize("sizes", [(4, 2, 8, 5), (10, 2, 8, 5), (9, 1, 40, 1)], ids=str)
def test_packed_and_apart_are_bitwise_equal(sizes):
    apart = arguments_of("group_attention", sizes)
    packed = {"qkv": torch.cat([apart[key] for key in "qkv"], dim=-1), "num_heads": apart["num_heads"]}
    (out,), found = gradients("group_attention", apart, backend="triton")
    (other,), other_found = gradients("group_attention_packed", packed, backend="triton")
    assert torch.equal(out, other)
    assert torch.equal(torch.cat([found[key] for key in "qkv"], dim=-1), other_found["qkv"])
    assert other_found["qkv"].is_contiguous()


@pytest.mark.parametrize("sizes", [(3, 2, 4, 5), (10, 2, 4, 5)], ids=str)
def test_strides_do_not_change_a_bit(sizes):
    arguments = arguments_of("group_attention", sizes)
    strided = (
        arguments
        | {
            "q": arguments["q"].permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),  # last stride not 1
            "k": torch.nn.functional.pad(arguments["k"], (1, 2))[..., 1:-2],
            "v": arguments["v"].transpose(1, 2).contiguous().transpose(1, 2),
        }
    )
    assert not any(strided[key].is_contiguous() for key in "qkv")
    (out,), found = gradients("group_attention", arguments, backend="triton")
    (other,), other_found = gradients("group_attention", strided, backend="triton")
    assert torch.equal(out, other)
    assert all(torch.equal(found[key], other_found[key]) and other_found[key].is_contiguous() for key in "qkv")


def test_one_row_is_read_for_all_through_strides_of_0():
    q = torch.randn(1, 1, 1, 8).expand(2, 3, 4, 8)
    k, v = torch.randn(2, 2, 3, 4, 8)
    assert torch.equal(kernels.group_attention(q, k, v, 2), kernels.group_attention(q.contiguous(), k, v, 2))


@pytest.mark.parametrize("sizes", [(3, 2, 4, 2), (10, 2, 4, 2), (9, 1, 40, 1)], ids=str)
def test_what_is_not_needed_is_left_out_and_changes_nothing(sizes):
    arguments = arguments_of("group_attention", sizes)
    inputs = [arguments[key] for key in "qkv"]
    grad = torch.randn_like(inputs[0])
    every = kernels.group_attention_backward(grad, *inputs, sizes[1], 7)
    for needs in range(7):
        found = kernels.group_attention_backward(grad, *inputs, sizes[1], needs)
        wanted = [every[i] for i in range(3) if needs >> i & 1]
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("sizes", [(3, 2, 4, 4), (10, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_token_and_head(key, value, sizes):
    arguments = arguments_of("group_attention", sizes)
    dirty = arguments | {key: arguments[key].clone()}
    dirty[key][0, 1, 2, 3] = value
    (out,), found = gradients("group_attention", arguments, backend="triton")
    (spoiled,), spoiled_found = gradients("group_attention", dirty, backend="triton")
    (eager,), eager_found = gradients("group_attention", dirty, backend="reference")
    assert torch.equal(spoiled.isfinite(), eager.isfinite())
    assert all(torch.equal(spoiled_found[name].isfinite(), eager_found[name].isfinite()) for name in "qkv")
    head = sizes[2]
    for clean, other in [(out, spoiled), *((found[name], spoiled_found[name]) for name in "qkv")]:
        mask = torch.ones_like(clean, dtype=torch.bool)
        mask[0, :, 2, :head] = False
        assert torch.equal(clean[mask], other[mask])


@pytest.mark.parametrize("members", [2, 9])
def test_a_member_of_weight_0_may_be_anything_but_not_finite_scores_are_nan(members):
    # One key is minus infinity where every query is 1: its weight is 0, and the softmax is over the others.
    q, v = torch.ones(1, members, 1, 4), torch.randn(1, members, 1, 4)
    k = torch.zeros(1, members, 1, 4)
    k[0, 0, 0, 0] = -math.inf
    out = kernels.group_attention(q, k, v, 1)
    torch.testing.assert_close(out, v[:, 1:].mean(dim=1, keepdim=True).expand_as(v))
    k[:] = -math.inf
    assert kernels.group_attention(q, k, v, 1).isnan().all()


@pytest.mark.parametrize("sizes", [(3, 2, 4, 5), (10, 2, 4, 5)], ids=str)
def test_large_scores_do_not_overflow(sizes):
    arguments = arguments_of("group_attention", sizes)
    arguments["q"] *= 1e4
    (out,), _ = gradients("group_attention", arguments, backend="triton")
    (exact,), _ = gradients("group_attention", exactly(arguments), backend="reference")
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 12, 0)], ids=str)
def test_nothing_in_nothing_out(shape):
    batch, members, tokens = shape
    x = torch.empty(batch, members, tokens, 8)
    assert kernels.group_attention(x, x, x, 2).shape == x.shape
    assert [g.shape for g in kernels.group_attention_backward(x, x, x, x, 2, 5)] == [x.shape] * 2
    qkv = torch.empty(batch, members, tokens, 24)
    assert kernels.group_attention_packed(qkv, 2).shape == x.shape
    assert kernels.group_attention_packed_backward(x, qkv, 2).shape == qkv.shape
