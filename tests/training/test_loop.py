"""A training goes on as if nothing had happened, and stops with a word where it must."""

import dataclasses
import math

import pytest
import torch

from reimplementation.models.sparsedrive import SparseDrive
from reimplementation.training import checkpoint, journal
from reimplementation.training.building import held_out_frames
from reimplementation.training.held_out import judge, moments
from reimplementation.training.loop import Training
from reimplementation.training.optimization import make_optimizer, rate_factor
from tests.training.processes import run_in_processes
from tests.training.tiny import ALIKE, ALONE, MODEL, TINY, numbers

pytest.importorskip("scipy")


def never() -> bool:
    return False


def quietly(row: dict) -> None:
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = Training(TINY, folder, ALONE).run(quietly, never)
    assert (outcome.step, outcome.is_finished) == (4, True)
    return folder


def test_stopped_and_gone_on_with(uninterrupted, tmp_path):
    """The same numbers to the last bit, and the same parameters."""
    first = Training(TINY, tmp_path, ALONE)
    outcome = first.run(quietly, lambda: first.step == 1)
    assert (outcome.step, outcome.is_finished) == (2, False) and outcome.checkpoint.is_file()
    Training(TINY, tmp_path, ALONE).run(quietly, never)
    assert len(numbers(tmp_path)) == 4 and numbers(tmp_path) == numbers(uninterrupted)
    (_, ours), (_, theirs) = (checkpoint.load_newest(folder) for folder in (tmp_path, uninterrupted))
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name


def test_killed_and_gone_on_with(uninterrupted, tmp_path):
    """What was done after the last checkpoint is done again, and written down once."""
    config = dataclasses.replace(TINY, checkpoint_every=2)

    class Killed(BaseException):
        pass

    def kill(row):
        if row["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        Training(config, tmp_path, ALONE).run(kill, never)
    (tmp_path / journal.METRICS).open("a").write('{"step": 3, "lo')  # a line that was cut off
    again = Training(config, tmp_path, ALONE)
    assert again.step == 2
    again.run(quietly, never)
    assert numbers(tmp_path) == numbers(uninterrupted)


def test_gone_on_with_from_an_optimizer_that_was_not_fused(uninterrupted, tmp_path):
    """As trainings on a CPU once were."""
    first = Training(TINY, tmp_path, ALONE)
    path = first.run(quietly, lambda: first.step >= 1).checkpoint
    document = checkpoint.load(path)
    for group in document["optimizer"]["param_groups"]:
        group["fused"] = False
    torch.save(document, path)
    assert Training(TINY, tmp_path, ALONE).run(quietly, never).is_finished
    assert numbers(tmp_path) == numbers(uninterrupted)


def test_judged_on_the_way(uninterrupted, tmp_path):
    """As `evaluate` judges what is saved then, and without a trace in the training."""
    Training(dataclasses.replace(TINY, evaluate_every=3, checkpoint_every=3), tmp_path, ALONE).run(quietly, never)
    rows = numbers(tmp_path)
    judged = {row["step"]: {name: row.pop(name) for name in ("mAP", "NDS", "map_mAP")} for row in rows if "mAP" in row}
    assert rows == numbers(uninterrupted)
    assert judged.keys() == {2, 3}
    model = SparseDrive(MODEL)
    for step, found in judged.items():
        document = checkpoint.load(tmp_path / f"step-{step + 1:08d}.pt")
        model.load_state_dict(checkpoint.parameters_to_judge(document))
        frames = held_out_frames(TINY, None, ALONE.device)
        assert judge(moments(model, frames, ALONE.device), MODEL).summary() == found


def test_a_finished_training_stays_as_it_is(uninterrupted):
    before = numbers(uninterrupted)
    outcome = Training(TINY, uninterrupted, ALONE).run(quietly, never)
    assert outcome.is_finished and numbers(uninterrupted) == before


def test_another_configuration_is_refused(uninterrupted):
    with pytest.raises(ValueError, match=r"with other settings \(optimizer, seed\); choose another folder"):
        other = dataclasses.replace(TINY.optimizer, lr=1.0)
        Training(dataclasses.replace(TINY, seed=1, optimizer=other), uninterrupted, ALONE)


def test_no_number(tmp_path):
    """The step that would spoil the parameters is not made."""
    training = Training(dataclasses.replace(TINY, checkpoint_every=2), tmp_path, ALONE)
    before = {}

    def spoil(row):
        if row["step"] == 2:
            training.model.head.det_head.layers[0].output_proj.bias.data.fill_(math.nan)
            before.update({name: value.clone() for name, value in training.model.named_parameters()})

    with pytest.raises(RuntimeError, match="step 3: not a finite number: .*last good checkpoint is .*step-00000002.pt"):
        training.run(spoil, never)
    for name, value in training.model.named_parameters():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_bfloat16(tmp_path):
    config = dataclasses.replace(TINY, num_steps=2, precision="bfloat16")
    assert Training(config, tmp_path, ALONE).run(quietly, never).is_finished
    assert all(math.isfinite(row["loss"]) for row in numbers(tmp_path))


def test_groups(uninterrupted):
    model = Training(TINY, uninterrupted, ALONE).model
    head, backbone = make_optimizer(model, TINY.optimizer).param_groups
    assert (head["lr"], backbone["lr"]) == (1e-3, 5e-4)
    assert len(backbone["params"]) == len(list(model.img_backbone.parameters()))
    grouped = {id(p) for group in (head, backbone) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_rate():
    config = dataclasses.replace(TINY.optimizer, warmup_steps=10)
    factors = [rate_factor(step, 100, config) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 3) and factors[100] == pytest.approx(1e-3)
    assert factors[50] == pytest.approx(1e-3 + 0.999 / 2)
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)


def train_until(process, config, folder, step: float) -> None:
    torch.backends.cudnn.allow_tf32 = False
    training = Training(config, folder, process)
    training.run(quietly, lambda: training.step >= step)


def check_processes(folder, device: str, graph: bool) -> None:
    """Two processes, stopped and gone on with, see the losses of one.

    Before a parameter has moved they are equal to rounding, where no tie between assignments of equal L1 costs is left
    for rounding to decide: in the first layer. Later they stay close.
    """
    config = dataclasses.replace(ALIKE, graph=graph)
    for count, until in ((1, math.inf), (2, 1), (2, math.inf)):
        run_in_processes(count, device, train_until, config, folder / str(count), until)
    theirs, ours = (numbers(folder / str(count)) for count in (1, 2))
    assert len(ours) == len(theirs) == 3
    for name in ("det_loss_cls_0", "det_loss_box_0", "map_loss_cls_0", "loss_dense_depth"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5), name
    for row, expected in zip(ours, theirs):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.02)


@pytest.mark.slow
def test_two_processes(tmp_path):
    check_processes(tmp_path, "cpu", graph=False)


@pytest.mark.cuda
@pytest.mark.two_gpus
@pytest.mark.parametrize("graph", [False, True])
def test_two_gpus(tmp_path, cuda_kernels, graph):
    check_processes(tmp_path, "cuda", graph)
