"""The whole detector, frame after frame: what it keeps, what it forgets, what it asks of its inputs."""

import copy
import dataclasses
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation import ops
from reimplementation.models.deformable import DeformableFeatureAggregation
from reimplementation.models.sparsedrive.feature_rows import feature_rows
from tests.models.sparsedrive.small import CONFIG, NUM_BOXES, NUM_CAMS, frame, trained

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32, over some twenty layers


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(autouse=True)
def fresh(model):
    model.reset()
    with torch.no_grad():
        yield


def last(outputs, head="det"):
    return outputs[head]["prediction"][-1]


def test_outputs(model):
    outputs = model(*frame(2))
    for head, layers, shape, classes in (("det", 3, (2, 14, 11), 10), ("map", 2, (2, 5, 8), 3)):
        found = outputs[head]
        assert [x.shape for x in found["prediction"]] == [shape] * layers
        assert [x.shape for x in found["classification"]] == [(*shape[:2], classes)] * layers
        assert len(found["quality"]) == layers
    assert [x.shape for x in outputs["det"]["quality"]] == [(2, 14, 2)] * 3
    assert outputs["map"]["quality"] == [None, None] and "instance_id" not in outputs["map"]
    assert outputs["det"]["instance_id"].tolist() == [list(range(NUM_BOXES))] * 2
    assert "depth" not in outputs


def test_state_of_the_caller_or_of_the_model(model):
    """The two ways to hand a frame over agree, and with a state of the caller the model keeps none."""
    state = model.initial_state(2)
    for index in range(3):
        images, metas = frame(2, index, 0.5 * index)
        kept = model(images, metas)
        given, state = model(images, metas, state=state)
        torch.testing.assert_close(last(kept), last(given), **TOLERANCE)
        assert torch.equal(kept["det"]["instance_id"], given["det"]["instance_id"])
    model.reset()
    model(*frame(2), state=state)
    assert model._state is None


def test_frames_matter_and_reset_forgets(model):
    first = model(*frame(1, 0, 0.0))
    second = model(*frame(1, 1, 0.5))
    model.reset()
    alone = model(*frame(1, 1, 0.5))
    assert not torch.allclose(last(second), last(alone), **TOLERANCE)
    assert not torch.equal(second["det"]["instance_id"], alone["det"]["instance_id"])
    torch.testing.assert_close(last(second, "map"), last(alone, "map"), **TOLERANCE)  # it remembers nothing
    model.reset()
    assert torch.equal(last(model(*frame(1, 0, 0.0))), last(first))


def test_samples_of_a_batch_are_strangers(model):
    """A batch is its samples side by side, one of which starts anew at the third frame."""
    times = [[0.0, 0.0], [0.5, 0.25], [1.0, 60.0]]
    states = [model.initial_state(2), model.initial_state(1), model.initial_state(1)]
    for index, both in enumerate(times):
        images, metas = frame(2, index, both)
        outputs, states[0] = model(images, metas, state=states[0])
        for sample in range(2):
            one = {name: tensor[sample : sample + 1] for name, tensor in metas.items()}
            state = model.initial_state(1) if both[sample] == 60 else states[1 + sample]
            alone, states[1 + sample] = model(images[sample : sample + 1], one, state=state)
            torch.testing.assert_close(last(outputs)[sample], last(alone)[0], **TOLERANCE)
            if both[sample] < 60:  # later ids go on counting, so that none is given twice
                assert torch.equal(outputs["det"]["instance_id"][sample], alone["det"]["instance_id"][0])
            else:
                assert outputs["det"]["instance_id"][sample].min() > alone["det"]["instance_id"].min()


def test_a_gap_in_time_is_a_start(model):
    model(*frame(1, 0, 0.0))
    late = model(*frame(1, 1, 2.5))
    model.reset()
    torch.testing.assert_close(last(late), last(model(*frame(1, 1, 2.5))), **TOLERANCE)


def test_another_batch_size_is_a_start(model):
    model(*frame(2, 0, 0.0))
    outputs = model(*frame(1, 1, 0.5))
    model.reset()
    torch.testing.assert_close(last(outputs), last(model(*frame(1, 1, 0.5))), **TOLERANCE)


def test_float64(model):
    """The whole computes in the parameters' precision, where nothing rounds to float32 on the way."""
    images, metas = frame(1)
    double = copy.deepcopy(model).double()
    exact = {name: tensor.double() for name, tensor in metas.items()}
    outputs = double(images.double(), exact)
    assert last(outputs).dtype == torch.float64
    torch.testing.assert_close(last(model(images, metas)).double(), last(outputs), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, dtype):
    """Anchors stay float32, so that a box is not moved by a rounding; three frames stay finite."""
    state = exact_state = model.initial_state(1)
    for index in range(3):
        images, metas = frame(1, index, 0.5 * index)
        with torch.autocast("cpu", dtype):
            outputs, state = model(images, metas, state=state)
        exact, exact_state = model(images, metas, state=exact_state)
        for head in ("det", "map"):
            assert all(anchor.dtype == torch.float32 for anchor in outputs[head]["prediction"])
            assert all(anchor.isfinite().all() for anchor in outputs[head]["prediction"])
        if index == 0:  # later frames may choose other instances
            error = (last(outputs) - last(exact)).norm() / last(exact).norm()
            assert error < 16 * torch.finfo(dtype).eps


class NoWaiting(TorchDispatchMode):
    """Refuses what has to know a tensor's values on the host."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not by_mask and not name.startswith(self.WAITS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_frame_waits_for_the_device(model):
    state = model.initial_state(2)
    for index in range(2):
        with NoWaiting():
            _, state = model(*frame(2, index, 0.5 * index), state=state)
    with NoWaiting():
        model(*frame(2))
        model(*frame(2, 1, 0.5))


@pytest.mark.cuda
def test_capture(model):
    """A graph of one frame, state in and state out, replayed over three frames, is what eager calls are."""
    model = copy.deepcopy(model).cuda()
    frames = [frame(1, index, 0.5 * index) for index in range(3)]
    frames = [(images.cuda(), {name: x.cuda() for name, x in metas.items()}) for images, metas in frames]
    state, expected = model.initial_state(1), []
    for images, metas in frames:
        outputs, state = model(images, metas, state=state)
        expected.append(last(outputs).clone())

    images, metas = (frames[0][0].clone(), {name: x.clone() for name, x in frames[0][1].items()})
    state = model.initial_state(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(images, metas, state=state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, new_state = model(images, metas, state=state)
    for (next_images, next_metas), wanted in zip(frames, expected):
        images.copy_(next_images)
        for name, x in metas.items():
            x.copy_(next_metas[name])
        graph.replay()
        torch.testing.assert_close(last(outputs), wanted, **TOLERANCE)
        for kept, new in zip(state["det"], new_state["det"]):
            kept.copy_(new)


def test_plain_pytorch_agrees(model):
    """`use_deformable_func=False` is the same detector without the kernels."""
    plain = trained(dataclasses.replace(CONFIG, use_deformable_func=False))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(last(plain(*frame(1))), last(model(*frame(1))), **TOLERANCE)


def test_maps_are_formatted_once(model):
    """Every layer of both heads reads the same rows, in the same place in memory."""
    seen, hooks = [], []
    for module in model.modules():
        if isinstance(module, DeformableFeatureAggregation):
            hooks.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[3][0].data_ptr())))
    model(*frame(1))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3 + 2 and len(set(seen)) == 1


def test_rows_are_the_formatted_maps():
    for width in (12, 10, 12):
        levels = [torch.randn(2 * NUM_CAMS, 4, *shape) for shape in ((6, width), (3, 5))]
        found = feature_rows([level.contiguous(memory_format=torch.channels_last) for level in levels], NUM_CAMS)
        expected = ops.feature_maps_format([level.unflatten(0, (2, NUM_CAMS)) for level in levels])
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted)


def test_a_first_frame_in_inference_mode_leaves_training_possible():
    """What is kept for the size of the images must not be an inference tensor."""
    model, size = trained(), (32, 64)
    images, metas = frame(1)
    images = images[..., : size[0], : size[1]]
    with torch.inference_mode():
        model(images, metas)
    model.reset()
    with torch.enable_grad():
        outputs = model.train()(images, metas)
        last(outputs).sum().backward()
    assert model.img_backbone.conv1.weight.grad.any()


def test_neck_writes_rows_of_channels(model):
    images, _ = frame(1)
    for level in model.image_features(images):
        assert level.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_mat": torch.zeros(1, 3, 4, 4)}, "projection_mat must be (bs, num_cams, 4, 4)"),
        ({"image_wh": torch.zeros(2, NUM_CAMS, 2)}, "image_wh must be (bs, num_cams, 2) with bs=1"),
        ({"timestamp": torch.zeros(1, 1)}, "timestamp must be (bs,)"),
        ({"T_global": torch.zeros(1, 3, 4)}, "T_global must be (bs, 4, 4)"),
    ],
)
def test_metas_that_do_not_fit(model, change, message):
    images, metas = frame(1)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(images, {**metas, **change})


def test_images_that_do_not_fit(model):
    images, metas = frame(1)
    with pytest.raises(ValueError, match="images must be"):
        model(images[:, :1], metas)
    with pytest.raises(ValueError, match="images must be"):
        model(images[0], metas)


def test_what_is_no_tensor(model):
    images, metas = frame(1)
    with pytest.raises(TypeError, match=re.escape("image_wh must be a torch.Tensor; got list")):
        model(images, {**metas, "image_wh": [[1, 2]]})


def test_a_meta_that_is_missing(model):
    images, metas = frame(1)
    del metas["timestamp"]
    with pytest.raises(KeyError, match="timestamp is missing"):
        model(images, metas)


def test_a_state_of_another_batch_size(model):
    with pytest.raises(ValueError, match=re.escape("state is of 2 samples, and images of 1")):
        model(*frame(1), state=model.initial_state(2))
