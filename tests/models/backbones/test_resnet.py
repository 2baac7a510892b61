"""ResNet against the same network written with functions, from the parameters' names alone."""

import copy

import pytest
import torch
from torch.nn import functional as F

from reimplementation.models.backbones.resnet import ARCHITECTURES, ResNet

PARAMETERS = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032, 101: 42_500_160}  # torchvision's, less the classifier


@pytest.mark.parametrize("depth", ARCHITECTURES)
def test_number_of_parameters(depth):
    with torch.device("meta"):
        backbone = ResNet(depth)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == PARAMETERS[depth]


def test_names():
    with torch.device("meta"):
        names = set(ResNet(50).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias"} <= names
    assert {"layer3.5.conv3.weight", "layer4.2.bn3.num_batches_tracked"} <= names
    assert not {name for name in names if name.startswith(("fc", "layer1.1.downsample"))}


@pytest.mark.parametrize(("depth", "size"), [(18, (37, 51)), (50, (32, 32))])
def test_maps(depth, size):
    torch.manual_seed(0)
    backbone = ResNet(depth).double().eval()
    with torch.no_grad():
        for name, buffer in backbone.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    maps = backbone(images)
    for got, wanted, channels in zip(
        maps, reference(backbone.state_dict(), images), backbone.out_channels, strict=True
    ):
        assert got.shape[1] == channels
        torch.testing.assert_close(got, wanted)


def reference(state, x):
    """Every convolution whose name the parameters have, in the order of their names."""

    def normalised(x, convolution, norm, stride):
        weight = state[f"{convolution}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance, scale, shift = (
            state[f"{norm}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = F.max_pool2d(normalised(x, "conv1", "bn1", 2).clamp(min=0), 3, 2, 1)
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            prefix = f"layer{stage}.{block}"
            is_bottleneck = f"{prefix}.conv3.weight" in state
            stride, branch = (2 if stage > 1 and block == 0 else 1), x
            for index in range(1, 4 if is_bottleneck else 3):
                step = stride if index == (2 if is_bottleneck else 1) else 1
                branch = normalised(branch, f"{prefix}.conv{index}", f"{prefix}.bn{index}", step)
                if f"{prefix}.conv{index + 1}.weight" in state:
                    branch = branch.clamp(min=0)
            if f"{prefix}.downsample.0.weight" in state:
                x = normalised(x, f"{prefix}.downsample.0", f"{prefix}.downsample.1", stride)
            x = (x + branch).clamp(min=0)
            block += 1
        yield x


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_folded(depth):
    torch.manual_seed(0)
    backbone = ResNet(depth).double().to(memory_format=torch.channels_last).eval()
    for norm in backbone.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
            norm.bias.normal_()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = backbone(images)
    backbone.fold_norms()
    assert not any("bn" in name or "downsample.1" in name for name in backbone.state_dict())
    assert backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for got, wanted in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_folded_on_a_gpu(dtype):
    """cuDNN's kernels of a convolution, its sum and its ReLU, against the layers in float64; TF32 has ten bits."""
    torch.manual_seed(0)
    backbone = ResNet(50).eval()
    backbone.fold_norms()
    images = torch.randn(2, 3, 64, 96)
    expected = copy.deepcopy(backbone).double()(images.double())
    backbone.to("cuda", dtype, memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        maps = backbone(images.to("cuda", dtype, memory_format=torch.channels_last))
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::cudnn_convolution_relu"] == 32 and counts["aten::cudnn_convolution_add_relu"] == 16
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for got, wanted in zip(maps, expected, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert (got.cpu().double() - wanted).norm() <= 10 * rounding * wanted.norm()


def test_folding_twice():
    backbone = ResNet(18).eval()
    backbone.fold_norms()
    folded = copy.deepcopy(backbone.state_dict())
    backbone.fold_norms()
    assert all(torch.equal(tensor, folded[name]) for name, tensor in backbone.state_dict().items())


def test_folding_is_for_inference():
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        ResNet(18).fold_norms()


def test_unknown_depth():
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, 101; got 49"):
        ResNet(49)
