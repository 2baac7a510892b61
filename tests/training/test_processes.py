"""What processes that train together tell each other, and that their gradients are those of one process."""

import dataclasses

import pytest
import torch
from torch import nn

from reimplementation.models.sparsedrive.depth import depth_loss
from reimplementation.training.batches import slots_of
from reimplementation.training.building import new_model, share_norms, training_frames
from reimplementation.training.graphs import flat, unflat
from tests.training.processes import run_in_processes
from tests.training.tiny import TINY

pytest.importorskip("scipy")


def share_and_check(process) -> None:
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(()))]
    parameters[0].grad = torch.arange(6.0).view(2, 3).t().contiguous().t() * (process.rank + 1)  # strided
    parameters[2].grad = torch.tensor(float(process.rank))
    process.share_gradients(parameters)
    assert torch.equal(parameters[0].grad, torch.arange(6.0).view(2, 3) * 1.5)
    assert parameters[1].grad is None
    assert parameters[2].grad == 0.5
    assert torch.equal(process.joined(torch.tensor([process.rank])), torch.tensor([0, 1]))


def test_gradients_become_their_mean():
    run_in_processes(2, "cpu", share_and_check)


def depth_loss_of_each_half(process, depths, targets, expected) -> None:
    own = slice(process.rank, process.rank + 1)
    loss = depth_loss([depth[own] for depth in depths], [target[own] for target in targets], max_depth=60.0)
    assert process.mean(loss).item() == pytest.approx(expected, rel=1e-12)


def test_depth_is_judged_pixel_by_pixel_whoever_has_it():
    """The lidar measured more of the one half of the batch than of the other."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 6, 4, 11), (2, 6, 2, 6))
    depths, targets = (
        [torch.rand(size, generator=generator, dtype=torch.float64) * 70 - low for size in sizes] for low in (0, 40)
    )
    for target in targets:
        target[0] -= 20
    expected = depth_loss(depths, targets, max_depth=60.0).item()
    run_in_processes(2, "cpu", depth_loss_of_each_half, depths, targets, expected)


def in_float64(value):
    tensors, form = flat(value)
    return unflat(form, [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors])


def keep_gradients(process, folder) -> None:
    """Processes on a CPU do not share norms, which therefore are those of inference there."""
    config = dataclasses.replace(TINY, batch_size=4, model=dataclasses.replace(TINY.model, dropout=0.0, attn_drop=0.0))
    slots = slots_of(process.rank, process.world_size, config.batch_size)
    batch = training_frames(config, None, slots, process.device).at(0)
    model = new_model(config, None).to(process.device).double().train()
    share_norms(model, process)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(process.device.type == "cuda")
    images, metas, targets = map(in_float64, (batch.images, dict(batch.metas), batch.targets))
    outputs, _ = model(images, metas, in_float64(model.initial_state(len(slots))), targets)
    terms = model.loss(outputs, targets)
    torch.stack(list(terms.values())).sum().backward()
    process.share_gradients(model.parameters())
    kept = {name: process.mean(term.detach()) for name, term in terms.items()}
    kept |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if process.is_first:
        torch.save({name: value.cpu() for name, value in kept.items()}, folder / str(process.world_size))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.two_gpus])])
def test_losses_and_gradients_are_those_of_one_process(tmp_path, device):
    """In float64, with halves of a batch that are not alike."""
    for count in (1, 2):
        run_in_processes(count, device, keep_gradients, tmp_path)
    one, two = (torch.load(tmp_path / str(count)) for count in (1, 2))
    assert one.keys() == two.keys()
    largest = max(value.abs().max() for name, value in one.items() if "loss" not in name)
    for name, value in one.items():
        scale = value.abs() if "loss" in name else largest
        assert (two[name] - value).abs().max() <= 1e-9 * scale, name
