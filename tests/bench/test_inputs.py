"""The modules that are timed: their sizes and inputs."""

from __future__ import annotations

import pytest
import torch

from reimplementation.bench.inputs import UnfusedAttentionProblem, aggregation_problem, attention_problem
from reimplementation.data.rig import nuscenes_like_rig


@pytest.fixture(scope="module")
def small():
    """The module on small images: the sizes of the pyramid do not matter here."""
    return aggregation_problem(nuscenes_like_rig().scaled_to(176, 64), num_queries=12)


def test_sizes_are_sparsedrives(small):
    col_feats, spatial_shape, _ = small.feature_maps
    assert col_feats.shape == (1, 6 * (16 * 44 + 8 * 22 + 4 * 11 + 2 * 5), 256)
    assert spatial_shape.shape == (6, 4, 2)
    assert small.anchor.shape == (1, 12, 11) and small.module.num_pts == 13


def test_problem_is_reproducible_and_leaves_the_global_generator_alone(small):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = aggregation_problem(nuscenes_like_rig().scaled_to(176, 64), num_queries=12)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.forward(), small.forward())


def test_every_image_of_a_batch_stands_for_itself(small):
    batch = aggregation_problem(nuscenes_like_rig().scaled_to(176, 64), num_queries=12, batch_size=2)
    assert batch.forward().shape == (2, 12, 256)
    assert torch.equal(batch.anchor[0], small.anchor[0]) and not torch.equal(batch.anchor[0], batch.anchor[1])
    assert batch.metas["projection_mat"].shape == (2, 6, 4, 4)


def test_the_layer_and_the_unfused_one_compute_the_same():
    fused = attention_problem("small-encoder")
    unfused = attention_problem("small-encoder", UnfusedAttentionProblem)
    assert fused.query.shape == (1, 16 * 20 + 8 * 10, 64)
    torch.testing.assert_close(fused.forward(), unfused.forward())
    assert fused.to(dtype=torch.bfloat16).query.dtype == torch.float32
