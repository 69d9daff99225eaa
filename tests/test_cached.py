"""CachedSamples gives back what the data set and the experts gave, from a fraction of the memory."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from tiger_fast.data import CachedSamples, Scenes

SIZE = 7


class Patches(nn.Module):
    """An expert whose tokens are pixels of the image, and which says how often it was asked."""

    name, patch_size, dim = "patches", 1, 3

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images, grid):
        self.seen += len(images)
        assert not torch.is_grad_enabled()
        return images[..., : grid[0], : grid[1]].flatten(2).mT


@pytest.fixture(scope="module")
def scenes():
    return Scenes(SIZE, height=24, width=32)


@pytest.fixture(scope="module")
def cached(scenes):
    expert = Patches()
    data = CachedSamples(scenes, [expert], grid=(3, 4), workers=0)
    assert expert.seen == SIZE, "every image is shown to the expert once"
    return data


def test_samples_come_back_bit_for_bit(scenes, cached):
    assert len(cached) == SIZE
    for index in range(SIZE):
        item, sample = cached[index], scenes[index]
        assert set(item) == {*sample, "features"}
        for name, value in sample.items():
            assert item[name].dtype == value.dtype and torch.equal(item[name], value), name


def test_tokens_are_the_experts_in_half_precision(cached):
    (tokens,) = cached[2]["features"]
    assert tokens.shape == (12, 3) and tokens.dtype == torch.float32
    expected = cached[2]["image"][:, :3, :4].flatten(1).mT
    assert torch.equal(tokens, expected.half().float())


def test_batch_is_the_items_stacked(cached):
    order = torch.tensor([5, 0, 5])
    batch = cached.batch(order)
    for row, index in enumerate(order.tolist()):
        item = cached[index]
        assert torch.equal(batch["features"][0][row], item["features"][0])
        assert all(torch.equal(batch[name][row], item[name]) for name in item if name != "features")


def test_a_batch_is_the_callers_own(cached):
    before = cached[0]["depth"].clone()
    cached.batch(torch.tensor([0]))["depth"].zero_()
    cached[0]["depth"].zero_()
    assert torch.equal(cached[0]["depth"], before)


def test_workers_change_nothing(scenes, cached):
    other = CachedSamples(scenes, workers=2)
    assert all(torch.equal(other[i]["image"], cached[i]["image"]) for i in range(SIZE))
    assert "features" not in other[0]


def test_wrong_indices_and_no_samples_are_refused(cached):
    for index in (-1, SIZE):
        with pytest.raises(IndexError, match=f"index {index} is outside"):
            cached[index]
    with pytest.raises(ValueError, match="at least one sample"):
        CachedSamples(Scenes(0, height=24, width=32), workers=0)


def test_iteration_ends(cached):
    assert sum(1 for _ in cached) == SIZE


def test_samples_of_somebody_elses_data_set_keep_their_own_keys():
    class Own(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": torch.full((3, 8, 8), index / 255), "albedo": torch.full((3, 8, 8), index / 3)}

    cached = CachedSamples(Own(), workers=0)
    assert torch.equal(cached[2]["albedo"], Own()[2]["albedo"]) and torch.equal(cached[2]["image"], Own()[2]["image"])
