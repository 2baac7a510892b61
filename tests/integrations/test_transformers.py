"""Models of Hugging Face transformers on our ops: results as before, and all that one does with a model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from reimplementation.integrations import accelerate, accelerated
from tests.integrations.stand_ins import import_or_skip
from tests.ops.agreement import KernelCalls
from tests.reference import relative_error

transformers = import_or_skip("transformers", "5")

from tests.integrations.tiny import MODELS, model_of, outputs_of  # noqa: E402

every_model = pytest.mark.parametrize("tiny", MODELS, ids=str)
ROUNDINGS = 1000
"""By how many times as much as the input's last digit a result may be off, of that which it changes the original by."""


def results_of(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """The outputs, and the gradients of all parameters toward a random direction of each output, as one vector."""
    model = copy.deepcopy(model)  # which calls of some models change: they keep what they computed
    outputs = outputs_of(model, inputs)
    generator = torch.Generator().manual_seed(2)
    toward = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in outputs.items()}
    sum((value * toward[name]).mean() for name, value in outputs.items() if value.requires_grad).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    named = {
        kind: torch.cat([p.grad.flatten() for name, p in model.named_parameters() if kind in name])
        for kind in ("sampling_offsets", "attention_weights")
        if all(p.grad is not None for name, p in model.named_parameters() if kind in name)
    }
    results = {name: value.detach().clone() for name, value in outputs.items()}
    return results | named | {"all gradients": torch.cat(gradients)}


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_results_are_as_before(tiny, dtype):
    """Within what the original makes of an input whose last digit is another."""
    model, inputs = model_of(tiny, dtype), tiny.inputs(dtype)
    expected = results_of(model, inputs)
    eps = torch.finfo(dtype).eps
    sign = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(3)).sign().to(dtype)
    beside = results_of(model, inputs | {"pixel_values": inputs["pixel_values"] * (1 + sign * eps)})
    report = accelerate(model)
    assert len(report.replaced) == tiny.modules and not report.left
    assert all(replaced.unchecked is None for replaced in report.replaced)
    with KernelCalls() as calls:
        got = results_of(model, inputs)
    if calls.names:  # without the extension the same runs on plain PyTorch
        backwards = [name for name in calls.names if name.endswith("_backward")]
        assert all(name.startswith("ms_deform_attn") for name in calls.names)
        assert len(calls.names) == 2 * len(backwards) == 2 * tiny.modules
    assert got.keys() == expected.keys()
    assert got["attention_weights"].any()
    for name, value in expected.items():
        floor = relative_error(beside[name], value)
        tolerance = max(10 * floor, ROUNDINGS * eps)
        error = relative_error(got[name], value)
        assert error <= tolerance, f"{name}: relative L2 error {error:.1e}; of the input's last digit {floor:.1e}"


def unpickled(model: nn.Module) -> list[nn.Module]:
    """What a pickle of the model gives back; nothing for those whose hooks cannot be pickled."""
    file = io.BytesIO()
    try:
        torch.save(model, file)
    except AttributeError as error:
        assert "output_capturing_hook" in str(error)
        return []
    file.seek(0)
    return [torch.load(file, weights_only=False)]


@every_model
def test_what_one_does_with_a_model(tiny):
    """State dicts, copies, pickles, undoing: the names stay, and so do the classes that others ask for."""
    model, inputs = model_of(tiny), tiny.inputs(torch.float32)
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    report = accelerate(model)
    assert list(model.state_dict()) == names
    assert all(isinstance(module, before) for module, before in zip(model.modules(), classes, strict=True))
    copies = [copy.deepcopy(model), *unpickled(model)]
    with torch.no_grad():
        expected = outputs_of(model, inputs)
        for other in copies:
            assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
            got = outputs_of(other, inputs)
            assert all(torch.equal(got[name], value) for name, value in expected.items())
    report.undo()
    assert [type(module) for module in model.modules()] == classes
    with accelerated(model) as again:
        assert len(again.replaced) == tiny.modules
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("tiny", [MODELS[0], MODELS[5], MODELS[14]], ids=str)
def test_attentions_that_are_asked_for(tiny):
    model, inputs = model_of(tiny), tiny.inputs(torch.float32)
    asked = {"output_attentions": True}
    with torch.no_grad():
        expected = model(**inputs, **asked)
        accelerate(model)
        got = model(**inputs, **asked)
    names = [name for name in expected if "attentions" in name and expected[name] is not None]
    assert names
    for name in names:
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@every_model
def test_saved_and_loaded(tiny, tmp_path):
    """An accelerated model is saved as the original is, and a loaded one is an original."""
    model, inputs = model_of(tiny), tiny.inputs(torch.float32)
    accelerate(model)
    with torch.no_grad():
        expected = outputs_of(copy.deepcopy(model), inputs)
        model.save_pretrained(tmp_path)
        loaded = getattr(transformers, tiny.model).from_pretrained(tmp_path).eval()
        assert len(accelerate(loaded).replaced) == tiny.modules
        got = outputs_of(loaded, inputs)
    for name, value in expected.items():
        assert relative_error(got[name], value) <= ROUNDINGS * torch.finfo(value.dtype).eps, name


def losses_in_training(model: nn.Module, inputs: dict) -> list[float]:
    """Before each of some steps that change all parameters, and behind the last."""
    torch.manual_seed(0)  # what is dropped out
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(value.square().mean() for value in outputs_of(model, inputs).values() if value.requires_grad)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_model
def test_trained(tiny):
    """Steps of training take the model where they take the original."""
    inputs = tiny.inputs(torch.float64)
    expected = losses_in_training(model_of(tiny, torch.float64), inputs)
    model = model_of(tiny, torch.float64)
    accelerate(model)
    got = losses_in_training(model, inputs)
    assert len(set(expected)) == len(expected)
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tiny", [MODELS[0], MODELS[5], MODELS[14]], ids=str)
class TestAttentionModule:
    """One module of a model, within a compiler and an exporter. Whole models take minutes: see test_whole_models.py."""

    @pytest.fixture
    def called(self, tiny):
        """An accelerated module, and what its model calls it with."""
        model = model_of(tiny)
        (first, *_) = accelerate(model).replaced
        seen = []
        handle = first.module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            model(**tiny.inputs(torch.float32))
        handle.remove()
        given = {name: value for name, value in seen[0].items() if value is not None and not isinstance(value, bool)}
        return first.module, given

    def test_compiled(self, called):
        module, given = called
        torch.compiler.reset()
        with torch.no_grad():
            expected = module(**given)[0]
            got = torch.compile(module, backend="eager", fullgraph=True)(**given)[0]
        torch.testing.assert_close(got, expected)

    def test_exported(self, called):
        module, given = called
        with torch.no_grad():
            expected = module(**given)[0]
            program = torch.export.export(module, (), given)
            torch.testing.assert_close(program.module()(**given)[0], expected)


def test_a_form_that_is_not_known_is_an_error():
    model = model_of(MODELS[0])
    attention = model.model.encoder.layers[0].self_attn

    class OtherMultiscaleDeformableAttention(type(attention)):
        def forward(self, hidden_states, something_new):
            return hidden_states

    attention.__class__ = OtherMultiscaleDeformableAttention
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"(?s)another form:.*takes \(hidden_states, something_new\).*transformers 5"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == before
    report = accelerate(model, strict=False)
    assert len(report.replaced) == 4  # three modules as they are, and of the fourth the op alone
    assert [left.path for left in report.left] == ["model.encoder.layers.0.self_attn"]
