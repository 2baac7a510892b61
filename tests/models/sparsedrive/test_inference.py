"""The form for inference computes what the model does, in one dtype and from fewer kernels."""

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation.models.sparsedrive import ReplayedDetector, SparseDrive, SparseDriveConfig, for_inference
from reimplementation.models.sparsedrive.config import BankConfig, BoxHeadConfig, MapHeadConfig
from tests.models.sparsedrive.small import CONFIG, DENOISING, NUM_CAMS, frame, trained

VIEWS = "view expand permute transpose t slice select unsqueeze squeeze split split_with_sizes unbind detach alias"
NO_KERNELS = {*VIEWS.split(), "_unsafe_view", "_reshape_alias", "as_strided", "promote_types", "empty", "scalar_tensor"}
TIMES = ([0.0, 0.0], [0.5, 0.25], [1.0, 60.0])  # of two samples, the second of which starts anew at the end


class Operators(TorchDispatchMode):
    """Counts what is dispatched, and neither makes a view nor a number."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in NO_KERNELS
        return function(*args, **(kwargs or {}))


def run(model, dtype=torch.float32, device="cpu", frames=3, **settings):
    """The outputs of each frame, and the last state."""
    state, found = model.initial_state(2), []
    for index, times in enumerate(TIMES[:frames]):
        images, metas = frame(2, index, times)
        metas = {name: tensor.to(device) for name, tensor in metas.items()}
        with torch.no_grad():
            outputs, state = model(images.to(device, dtype), metas, state=state, **settings)
        found.append(outputs)
    return found, state


def tensors(outputs):
    """Every prediction, logit and id by its name."""
    for head, lists in outputs.items():
        for kind, layers in lists.items():
            for layer, tensor in enumerate(layers if isinstance(layers, list) else [layers]):
                if tensor is not None:
                    yield f"{head} {kind} {layer}", tensor


@pytest.mark.parametrize(
    ("config", "every_layer"), [(CONFIG, True), (DENOISING, False)], ids=["sparsedrive", "sparse4d"]
)
def test_it_computes_what_the_model_does(config, every_layer):
    model = trained(config).double()
    form = for_inference(model, torch.float64)
    expected, _ = run(model, torch.float64, every_layer=every_layer)
    found, _ = run(form, torch.float64, every_layer=every_layer)
    for got, wanted in zip(found, expected, strict=True):
        got, wanted = dict(tensors(got)), dict(tensors(wanted))
        assert got.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "fresh"])
def test_half_precision_is_no_worse_than_autocast(is_trained):
    """Of the first frame, whose instances no top-k has exchanged yet.

    What a fresh model makes of anchors that are all at rest differs little from channel to channel before it is
    normalised, so that it must not be rounded before.
    """
    torch.manual_seed(0)
    model = trained() if is_trained else SparseDrive(CONFIG).eval()
    (exact,), _ = run(model, frames=1)
    with torch.autocast("cpu", torch.bfloat16):
        (autocast,), _ = run(model, frames=1)
    (half,), state = run(for_inference(model, torch.bfloat16), frames=1)
    for head in ("det", "map"):
        for kind in ("prediction", "classification"):
            got, peer, wanted = (outputs[head][kind][-1].float() for outputs in (half, autocast, exact))
            assert (got - wanted).norm() <= 2 * (peer - wanted).norm()
        assert half[head]["prediction"][-1].dtype == torch.float32
    assert state["det"].feature.dtype == torch.bfloat16 and state["det"].anchor.dtype == torch.float32


def test_coordinates_are_not_rounded():
    head = for_inference(trained(), torch.bfloat16).heads["det"]
    assert head.anchor_encoder.layers[0].weight.dtype == torch.float32
    assert head.camera_logits.first.weight.dtype == torch.float32
    generator = next(layer.kps_generator for layer in head.layers if hasattr(layer, "kps_generator"))
    assert generator.fix_scale.dtype == torch.float32


def test_autocast_changes_no_head():
    form = for_inference(trained())
    levels = form.image_features(frame(2)[0])
    outputs = []
    for enabled in (False, True):
        form.image_features = lambda images: levels
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(run(form, frames=2)[0][-1])
    for (_, got), (_, wanted) in zip(*map(tensors, outputs), strict=True):
        assert torch.equal(got, wanted)


@torch.no_grad()
def test_number_of_operators():
    """Of a frame of SparseDrive-S's layers; their widths change nothing."""
    bank = BankConfig(num_anchors=16, num_temp_instances=8)
    boxes = BoxHeadConfig(bank=bank)
    lines = MapHeadConfig(bank=dataclasses.replace(bank, num_temp_instances=0))
    model = SparseDrive(SparseDriveConfig(embed_dims=32, feedforward_dims=32, num_cams=NUM_CAMS, det=boxes, map=lines))
    model.eval().img_backbone.fold_norms()
    images, metas = frame(1)
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        form = for_inference(model, dtype)
        with Operators() as operators:
            form(images, metas, state=form.initial_state(1), every_layer=False)
        counts.append(operators.count)
    assert counts[0] <= 760 and counts[1] <= 790  # the model took 1260 and 1500 when this was written


def test_one_graph():
    boxes = dataclasses.replace(CONFIG.det, num_decoders=2)
    form = for_inference(trained(dataclasses.replace(CONFIG, det=boxes, map=None)))
    expected, _ = run(form, frames=1)
    torch._dynamo.reset()
    found, _ = run(torch.compile(form, backend="eager", fullgraph=True, dynamic=False), frames=1)
    for (name, got), (_, wanted) in zip(tensors(found[0]), tensors(expected[0]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_model_stays_as_it_is():
    model = trained()
    model(*frame(1))
    before, kept = copy.deepcopy(model.state_dict()), model._state
    form = for_inference(model, torch.bfloat16)
    assert model._state is kept and form._state is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in form.parameters())


def test_a_folded_backbone_is_no_obstacle():
    model = trained()
    expected, _ = run(model, frames=1)
    model.img_backbone.fold_norms()
    found, _ = run(for_inference(model), frames=1)
    got, wanted = (outputs[0]["map"]["prediction"][-1] for outputs in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_it_does_not_train():
    form = for_inference(trained())
    with pytest.raises(RuntimeError, match="does not train; train the model that it was made from"):
        form.train()
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        for_inference(trained().train())
    with pytest.raises(TypeError, match=r"dtype must be one of float64, .*; got torch.int32"):
        for_inference(trained(), torch.int32)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_graph_runs_heads_side_by_side(dtype):
    form = for_inference(trained().cuda(), dtype)
    _, state = run(form, device="cuda", frames=2)
    images, metas = frame(2, 2, TIMES[2])
    images, metas = images.cuda(), {name: tensor.cuda() for name, tensor in metas.items()}

    @torch.no_grad()
    def call():
        return form(images, metas, state=state)[0]

    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call()
    for _ in range(10):
        for _, tensor in tensors(recorded):
            tensor.zero_()
        graph.replay()
        for (name, got), (_, wanted) in zip(tensors(recorded), tensors(expected), strict=True):
            assert torch.equal(got, wanted), name


@pytest.mark.cuda
@torch.no_grad()
def test_replayed():
    """Frame after frame as the form computes them, and again after a reset."""
    form = for_inference(trained().cuda())
    frames = [frame(2, index, times) for index, times in enumerate(TIMES)]
    frames = [(images.cuda(), {name: tensor.cuda() for name, tensor in metas.items()}) for images, metas in frames]
    replayed = ReplayedDetector(form, *frames[0], every_layer=True)
    for _ in range(2):
        state = form.initial_state(2)
        for images, metas in frames:
            expected, state = form(images, metas, state=state)
            for (name, got), (_, wanted) in zip(tensors(replayed(images, metas)), tensors(expected), strict=True):
                assert torch.equal(got, wanted), name
        replayed.reset()
    with pytest.raises(ValueError, match="images must be"):
        replayed(frames[0][0][:1], frames[0][1])


def test_replays_are_of_gpus():
    images, metas = frame(1)
    with pytest.raises(ValueError, match="a graph is recorded on a GPU; images are on cpu"):
        ReplayedDetector(for_inference(trained()), images, metas)
