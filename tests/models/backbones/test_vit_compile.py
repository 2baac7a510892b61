"""The ViT as one graph: compiled, exported, as ONNX and as an AOTInductor package, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.export import Dim

from reimplementation.models.backbones.vit import ViTFeatures

from . import vit_formulas as formulas

ANY_BATCH = ({0: Dim.DYNAMIC},)
OPTIONS = {
    "rope": {"num_cls_tokens": 1, "num_register_tokens": 2, "layer_scale": 0.5, "qk_normalization": True},
    "fourier": {"pos_enc": "fourier", "activation": "swiglu", "glu_limit": 7.0, "norm_type": "layernorm"},
}
TRAINING = {
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "drop_path_rate": 0.4,
    "rope_shift_coords": 0.1,
    "rope_jitter_coords": 1.2,
    "rope_rescale_coords": 2.0,
}
every_position = pytest.mark.parametrize("name", OPTIONS)
one_position = pytest.mark.parametrize("name", ["rope", pytest.param("fourier", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def model(**options):
    small = {"img_size": (16, 24), "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}
    vit = formulas.config(**{**small, "dtype": torch.float32, **options}).instantiate()
    return formulas.fill(vit).eval()


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(batch))


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@one_position
def test_one_graph_for_every_batch(name):
    vit = model(**OPTIONS[name])
    compiled = torch.compile(vit, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for batch in (5, 7):
            assert_near(compiled(images(batch)).dense_features, vit(images(batch)).dense_features)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_one_graph(checkpointing):
    vit = model(**OPTIONS["rope"], **TRAINING, activation_checkpointing=checkpointing).train()
    compiled = torch.compile(vit, fullgraph=True, backend="eager")
    compiled(images(4)).dense_features.square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vit.parameters() if p.requires_grad)


def test_compiled_gradients():
    vit = model(activation_checkpointing=True).train()
    parameters = [p for p in vit.parameters() if p.requires_grad]
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    expected, found = (
        torch.autograd.grad(each(images(2)).dense_features.square().mean(), parameters) for each in (vit, compiled)
    )
    for one, other in zip(found, expected):
        assert_near(one, other)


@every_position
def test_exported_program(name, tmp_path):
    vit = model(**OPTIONS[name])
    program = torch.export.export(vit, (images(2),), dynamic_shapes=ANY_BATCH)
    path = tmp_path / "vit.pt2"
    torch.export.save(program, path)
    for module in (program.module(), torch.export.load(path).module()):
        for batch in (1, 5):
            found = module(images(batch))
            assert isinstance(found, ViTFeatures) and found.tokenized_size == (2, 3)
            assert_near(found.dense_features, vit(images(batch)).dense_features)


def test_any_size_of_image():
    vit = model()
    rows, columns = Dim("rows", min=2, max=8), Dim("columns", min=2, max=8)
    any_size = ({2: 8 * rows, 3: 8 * columns},)
    program = torch.export.export(_DenseFeatures(vit), (torch.randn(1, 3, 24, 32),), dynamic_shapes=any_size)
    x = torch.randn(1, 3, 40, 16)
    assert_near(program.module()(x), vit(x).dense_features)


class _DenseFeatures(torch.nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, x):
        return self.vit(x).dense_features


@one_position
@pytest.mark.filterwarnings("ignore")
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    vit = model(**OPTIONS[name])
    path = tmp_path / "vit.onnx"
    torch.onnx.export(vit, (images(2),), dynamic_shapes=ANY_BATCH, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: images(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), vit(images(batch)).dense_features, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inductor():
    vit = model(**OPTIONS["rope"])
    compiled = torch.compile(vit, fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(images(2)).dense_features, vit(images(2)).dense_features)


@pytest.mark.slow
def test_inductor_training():
    vit = model(**OPTIONS["rope"], **TRAINING).train()
    torch.compile(vit, fullgraph=True)(images(4)).dense_features.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vit.parameters() if p.requires_grad)
