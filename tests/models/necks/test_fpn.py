"""FPN against its formula, pixel by pixel."""

import pytest
import torch
from torch.nn import functional as F

from reimplementation.models.necks.fpn import FPN


@pytest.mark.parametrize("sizes", [((8, 12), (4, 6), (2, 3)), ((7, 9), (4, 5), (2, 3))])
def test_levels(sizes):
    torch.manual_seed(0)
    neck = FPN((3, 5, 7), out_channels=4).double()
    maps = [torch.randn(2, channels, *size).double() for channels, size in zip((3, 5, 7), sizes)]
    state = neck.state_dict()
    summed = None
    for index in (2, 1, 0):
        weight, bias = (state[f"lateral_convs.{index}.conv.{key}"] for key in ("weight", "bias"))
        lateral = torch.einsum("nchw,oc->nohw", maps[index], weight[:, :, 0, 0]) + bias.view(-1, 1, 1)
        if summed is not None:
            (height, width), (coarse_height, coarse_width) = sizes[index], sizes[index + 1]
            rows = torch.arange(height) * coarse_height // height
            columns = torch.arange(width) * coarse_width // width
            lateral = lateral + summed[:, :, rows][..., columns]
        summed = lateral
        smoothed = F.conv2d(
            summed, state[f"fpn_convs.{index}.conv.weight"], state[f"fpn_convs.{index}.conv.bias"], padding=1
        )
        torch.testing.assert_close(neck(maps)[index], smoothed)


def test_memory_stays_channels_last():
    """The aggregation reads rows of channels: nothing on the way may turn them back."""
    neck = FPN((3, 5), out_channels=4).to(memory_format=torch.channels_last)
    maps = [torch.randn(2, 3, 8, 12), torch.randn(2, 5, 4, 6)]
    for level in neck([x.contiguous(memory_format=torch.channels_last) for x in maps]):
        assert level.is_contiguous(memory_format=torch.channels_last)


def test_wrong_number_of_maps():
    with pytest.raises(ValueError, match="maps must hold 2 feature maps; got 1"):
        FPN((3, 5))([torch.zeros(1, 3, 4, 4)])
