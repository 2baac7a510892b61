"""The detector compiled as one graph, exported, and as ONNX."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from reimplementation.models.sparsedrive.single_frame import SingleFrame
from tests.models.sparsedrive.small import CONFIG, frame, trained

TINY = dataclasses.replace(CONFIG, det=dataclasses.replace(CONFIG.det, num_decoders=2), map=None)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


def assert_frames_agree(model, compiled) -> None:
    """Three frames in a row, the first of them a start, through one graph."""
    state = compiled_state = model.initial_state(2)
    for index in range(3):
        images, metas = frame(2, index, 0.5 * index)
        expected, state = model(images, metas, state=state)
        outputs, compiled_state = compiled(images, metas, state=compiled_state)
        for name in expected:
            got, wanted = (found[name]["prediction"][-1] for found in (outputs, expected))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(outputs["det"]["instance_id"], expected["det"]["instance_id"])
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_serves_every_frame():
    """The whole pipeline but the compilation of the graph: no graph breaks, and no second graph for a later frame."""
    model = trained(TINY)
    assert_frames_agree(model, torch.compile(model, fullgraph=True, backend="eager"))


@pytest.mark.slow
def test_compiled():
    model = trained(TINY)
    assert_frames_agree(model, torch.compile(model, fullgraph=True))


@pytest.mark.slow
def test_compiled_with_a_state_of_its_own():
    model = trained()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    frames = [frame(1, index, 0.5 * index) for index in range(3)]
    expected = [model(*each)["det"]["prediction"][-1] for each in frames]
    model.reset()
    for each, wanted in zip(frames, expected):
        torch.testing.assert_close(compiled(*each)["det"]["prediction"][-1], wanted, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # the first frame, and the others


def single_frame_inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    images, metas = frame(1, seed)
    return images, metas["projection_mat"], metas["image_wh"]


def test_single_frame():
    model = trained()
    images, metas = frame(1)
    outputs = model(images, metas)
    boxes, classes, quality, lines, line_classes = SingleFrame(model)(*single_frame_inputs())
    det, lane = outputs["det"], outputs["map"]
    assert torch.equal(boxes, det["prediction"][-1]) and torch.equal(classes, det["classification"][-1])
    assert torch.equal(quality, det["quality"][-1])
    assert torch.equal(lines, lane["prediction"][-1]) and torch.equal(line_classes, lane["classification"][-1])
    assert len(SingleFrame(trained(TINY))(*single_frame_inputs())) == 3


@pytest.mark.slow
def test_exported_program():
    module = SingleFrame(trained())
    program = torch.export.export(module, single_frame_inputs())
    inputs = single_frame_inputs(seed=1)
    for got, wanted in zip(program.module()(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = SingleFrame(trained())
    program = torch.onnx.export(module, single_frame_inputs(), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    inputs = single_frame_inputs(seed=1)
    names = [entry.name for entry in session.get_inputs()]
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs)})
    for got, wanted in zip(outputs, module(*inputs), strict=True):
        assert (torch.from_numpy(got) - wanted).abs().max() <= 1e-3
