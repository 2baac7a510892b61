"""Masks: how many tokens they keep, where, and that what is taken out goes back to its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reimplementation.models.backbones.vit import (
    apply_mask,
    create_mask,
    generate_non_overlapping_mask,
    unapply_mask,
)

sizes = st.lists(st.integers(3, 9), min_size=2, max_size=3)
masks = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 12).flatmap(
        lambda length: st.lists(st.booleans(), min_size=batch * length, max_size=batch * length).map(
            lambda kept: torch.tensor(kept).view(batch, length)
        )
    )
)


@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(0.05, 0.95), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_as_many_as_asked_for(size, ratio, batch, scale, roll):
    mask = create_mask(size, ratio, batch, scale, roll)
    length = torch.Size(size).numel()
    assert mask.shape == (batch, length) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [round(length * ratio)] * batch


def test_samples_differ_and_a_generator_repeats():
    first, second = (create_mask((8, 8), 0.5, 2, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_every_token_is_kept_equally_often():
    torch.manual_seed(0)
    share = create_mask((4, 6), 0.25, 4000).double().mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("roll", [False, True])
def test_blocks(roll):
    mask = create_mask((8, 12), 0.5, 6, scale=4, roll=roll).view(6, 8, 12)
    assert mask.sum((1, 2)).tolist() == [48] * 6  # three of six blocks
    for index, sample in enumerate(mask):
        if roll and index % 2 == 0:
            sample = sample.roll((-2, -2), (0, 1))
        blocks = sample.view(2, 4, 3, 4).transpose(1, 2).flatten(2)
        assert (blocks.all(-1) | ~blocks.any(-1)).all()


def test_one_block_is_cut_where_blocks_do_not_fit():
    mask = create_mask((8, 8), 0.3, 5, scale=4).view(5, 2, 4, 2, 4).transpose(2, 3).flatten(3).flatten(1, 2)
    assert mask.flatten(1).sum(1).tolist() == [19] * 5
    assert [sorted(row) for row in mask.sum(-1).tolist()] == [[0, 0, 3, 16]] * 5


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="unmasked_ratio must be between 0 and 1"):
        create_mask((4, 4), ratio)
    with pytest.raises(ValueError, match="unmasked_ratio must be between 0 and 1"):
        generate_non_overlapping_mask(torch.ones(1, 4, dtype=torch.bool), ratio)


@pytest.mark.parametrize("scale", [0, 4, 5])
def test_a_scale_out_of_range(scale):
    with pytest.raises(ValueError, match="smaller than every side"):
        create_mask((4, 6), 0.5, scale=scale)


def test_the_second_mask_is_disjoint():
    torch.manual_seed(0)
    first = create_mask((5, 7), 0.4, 3)
    second = generate_non_overlapping_mask(first, 0.5)
    assert not (first & second).any() and second.sum(1).tolist() == [17] * 3  # int(35 * 0.5)
    with pytest.raises(ValueError, match="unmasked_ratio=0.7 asks for 24 tokens, but the mask leaves only 21"):
        generate_non_overlapping_mask(first, 0.7)


@settings(max_examples=40, deadline=None)
@given(masks)
def test_there_and_back(mask):
    x = torch.arange(1.0, mask.numel() * 2 + 1).view(*mask.shape, 2)
    taken = apply_mask(mask, x, padding_value=-1)
    longest = int(mask.sum(1).max())
    assert taken.shape == (mask.shape[0], longest, 2)
    for kept, tokens, sample in zip(mask, taken, x):
        count = int(kept.sum())
        assert torch.equal(tokens[:count], sample[kept]) and (tokens[count:] == -1).all()
    back = unapply_mask(mask, taken, fill_value=-2)
    assert torch.equal(back, torch.where(mask[..., None], x, -2))


def test_in_place_of_what_is_left_out():
    mask = torch.tensor([[True, False, True]])
    x = torch.ones(1, 3, 2)
    assert apply_mask(mask, x, fill_value=7).tolist() == [[[1, 1], [7, 7], [1, 1]]]
    learned = torch.tensor([3.0, 4.0])
    assert apply_mask(mask, x, fill_value=learned).tolist() == [[[1, 1], [3, 4], [1, 1]]]


def test_gradients_go_to_the_kept_tokens():
    mask = torch.tensor([[True, False, True]])
    x = torch.ones(1, 3, 1, requires_grad=True)
    unapply_mask(mask, apply_mask(mask, x)).sum().backward()
    assert x.grad.flatten().tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_mask(torch.ones(2, 3), torch.ones(2, 3, 1)), r"must be \(B, L\) of bool; got \(2, 3\)"),
        (lambda: apply_mask(torch.ones(3).bool(), torch.ones(3, 1)), r"must be \(B, L\) of bool; got \(3,\)"),
        (lambda: apply_mask(torch.ones(2, 3).bool(), torch.ones(2, 4, 1)), r"got \(2, 4, 1\)"),
        (lambda: unapply_mask(torch.ones(2, 3).bool(), torch.ones(2, 2, 1)), "with B=2, n=3"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
