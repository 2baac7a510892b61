"""`accelerate` on stand-ins for other people's modules, of their form and with the formula in plain PyTorch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reimplementation import integrations, ops
from reimplementation.integrations import accelerate, accelerated
from reimplementation.models import DeformableFeatureAggregation as OurAggregation
from reimplementation.models import MSDeformAttn as OurAttention
from tests import reference
from tests.reference import TOLERANCE, relative_error

CHANNELS, HEADS, LEVELS, POINTS = 16, 2, 2, 3
SHAPES = [(4, 6), (2, 3)]


def plain(value, shapes, locations, weights):
    """The formula, from a value (N, S, M, D)."""
    tensors = torch.as_tensor(shapes)
    return reference.ms_deform_attn(value, tensors, ops.level_start_index(tensors), locations, weights).to(value.dtype)


class MSDeformAttn(nn.Module):
    """Of Deformable DETR's form."""

    def __init__(self):
        super().__init__()
        self.n_heads, self.n_levels, self.n_points = HEADS, LEVELS, POINTS
        self.sampling_offsets = nn.Linear(CHANNELS, HEADS * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(CHANNELS, HEADS * LEVELS * POINTS)
        self.value_proj = nn.Linear(CHANNELS, CHANNELS)
        self.output_proj = nn.Linear(CHANNELS, CHANNELS)

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
    ):
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value * ~input_padding_mask[..., None]
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, LEVELS, POINTS, 2))
        weights = self.attention_weights(query).unflatten(-1, (HEADS, -1)).softmax(-1).unflatten(-1, (LEVELS, POINTS))
        points = reference_points[:, :, None, :, None]
        if points.shape[-1] == 2:
            locations = points + offsets / input_spatial_shapes.flip(-1)[:, None]
        else:
            locations = points[..., :2] + offsets / POINTS * points[..., 2:] / 2
        return self.output_proj(plain(value.unflatten(-1, (HEADS, -1)), input_spatial_shapes, locations, weights))


class WithNumbers(MSDeformAttn):
    """Of RF-DETR's form, which gets the shapes as numbers too."""

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
        input_spatial_shapes_hw=None,
    ):
        return super().forward(
            query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask
        )


class CudaAlone(MSDeformAttn):
    """As its own repository has it: its op has no kernel for a CPU."""

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
    ):
        raise NotImplementedError("Not implemented on the CPU")


class Another(MSDeformAttn):
    """Of the same form, and computes something else."""

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
    ):
        output = super().forward(
            query,
            1 - reference_points,
            input_flatten,
            input_spatial_shapes,
            input_level_start_index,
            input_padding_mask,
        )
        return output


class MSDeformableAttention(nn.Module):
    """Of D-FINE's form."""

    def __init__(self, method="default", by_height=True, num_points=(4, 2)):
        super().__init__()
        self.embed_dim, self.num_heads, self.method, self.by_height = CHANNELS, HEADS, method, by_height
        self.num_points_list, self.offset_scale = list(num_points), 0.5
        self.register_buffer("num_points_scale", torch.tensor([1 / n for n in num_points for _ in range(n)]))
        self.sampling_offsets = nn.Linear(CHANNELS, HEADS * sum(num_points) * 2)
        self.attention_weights = nn.Linear(CHANNELS, HEADS * sum(num_points))

    def forward(self, query, reference_points, value, value_spatial_shapes):
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, -1, 2))
        weights = self.attention_weights(query).unflatten(-1, (HEADS, -1)).softmax(-1)
        boxes = reference_points[:, :, None]
        scale = self.num_points_scale.to(query.dtype)[:, None] * self.offset_scale
        places = (boxes[..., :2] + offsets * scale * boxes[..., 2:]).split(self.num_points_list, 3)
        output = 0
        parts = zip(value, value_spatial_shapes, places, weights.split(self.num_points_list, 3))
        for rows, (height, width), place, weight in parts:
            image = rows.flatten(0, 1).unflatten(-1, (height, width))
            place = place.transpose(1, 2).flatten(0, 1)
            if self.method == "default":
                sampled = F.grid_sample(image, 2 * place - 1, align_corners=False)
            else:
                x, y = (place * place.new_tensor([width, height]) + 0.5).long().unbind(-1)
                x, y = x.clamp(0, (height if self.by_height else width) - 1), y.clamp(0, height - 1)
                sampled = image[torch.arange(len(image))[:, None, None], :, y, x].permute(0, 3, 1, 2)
            output = output + (sampled * weight.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return output.unflatten(0, (-1, HEADS)).permute(0, 3, 1, 2).flatten(2)


class DeformableFeatureAggregation(nn.Module):
    """Of SparseDrive's form; its op is compiled, and is not here."""

    def __init__(self):
        super().__init__()
        made = OurAggregation(use_camera_embed=True, embed_dims=32, num_levels=2, num_cams=2, attn_drop=0.0)
        for name, value in vars(made).items():
            setattr(self, name, value)
        self.use_deformable_func = False

    def forward(self, instance_feature, anchor, anchor_embed, feature_maps, metas, **kwargs):
        raise NotImplementedError


def call_of(module, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = uniform(2, 30, CHANNELS) - 0.5
    if isinstance(module, MSDeformableAttention):
        value = rows.unflatten(-1, (HEADS, -1)).permute(0, 2, 3, 1).split([24, 6], -1)
        return uniform(2, 5, CHANNELS), uniform(2, 5, 1, 4), value, SHAPES
    shapes = torch.tensor(SHAPES)
    return uniform(2, 5, CHANNELS), uniform(2, 5, LEVELS, 2), rows, shapes, ops.level_start_index(shapes)


def results_of(module, dtype):
    module.zero_grad()
    output = module(*call_of(module, dtype))
    output.square().sum().backward()
    return [output.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])]


MODULES = {
    "Deformable DETR": MSDeformAttn,
    "D-FINE": MSDeformableAttention,
    "D-FINE discrete": lambda: MSDeformableAttention("discrete"),
    "D-FINE discrete in bounds": lambda: MSDeformableAttention("discrete", by_height=False),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_results_are_as_before(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(MODULES[name]().to(dtype))
    expected = results_of(model[0], dtype)
    report = accelerate(model)
    assert [replaced.path for replaced in report.replaced] == ["0"]
    assert "replaced 1 x" in str(report) and "same results as before" in str(report)
    for one, other in zip(results_of(model[0], dtype), expected, strict=True):
        assert relative_error(one, other) <= 10 * TOLERANCE[dtype]


def test_shapes_as_numbers_too():
    torch.manual_seed(0)
    module = WithNumbers().double()
    call, mask = call_of(module), torch.rand(2, 30) < 0.3
    expected = module(*call, mask)
    with accelerated(nn.Sequential(module)):
        for shapes in (None, SHAPES):
            assert relative_error(module(*call, mask, shapes), expected) <= TOLERANCE[torch.float64]


class TestInPlace:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return nn.ModuleDict({"first": MSDeformAttn(), "second": MSDeformAttn(), "other": nn.Linear(3, 3)}).double()

    def test_the_same_objects_under_the_same_names(self, model):
        modules, names = list(model.modules()), list(model.state_dict())
        report = accelerate(model)
        assert list(model.modules()) == modules and list(model.state_dict()) == names
        assert [replaced.path for replaced in report.replaced] == ["first", "second"]
        assert isinstance(model["first"], MSDeformAttn) and type(model["first"]).__name__ == "MSDeformAttn"

    def test_other_instances_stay(self, model):
        accelerate(model["first"])
        assert type(model["second"]) is MSDeformAttn and type(MSDeformAttn()) is MSDeformAttn

    def test_undo(self, model):
        report = accelerate(model)
        copied = copy.deepcopy(model)
        report.undo()
        assert type(model["first"]) is type(model["second"]) is MSDeformAttn
        assert type(copied["first"]) is not MSDeformAttn  # a copy is nobody's business
        report.undo()

    def test_for_a_while(self, model):
        with pytest.raises(RuntimeError, match="in between"), accelerated(model) as report:
            assert len(report.replaced) == 2 and type(model["first"]) is not MSDeformAttn
            raise RuntimeError("in between")
        assert type(model["first"]) is MSDeformAttn

    def test_again(self, model):
        accelerate(model["first"])
        report = accelerate(model)
        assert report.already == ["first"] and [replaced.path for replaced in report.replaced] == ["second"]
        assert accelerate(model).already == ["first", "second"]
        assert "2 modules run on our ops already" in str(accelerate(model))

    def test_copies_and_pickles(self, model):
        accelerate(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        expected = model["first"](*call_of(model["first"]))
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert type(other["first"]) is type(model["first"])
            assert torch.equal(other["first"](*call_of(other["first"])), expected)
            assert other["first"].value_proj.weight is not model["first"].value_proj.weight

    def test_hooks_and_random_numbers_stay(self, model):
        seen = []
        model["first"].register_forward_hook(lambda *call: seen.append(call))
        state = torch.get_rng_state()
        accelerate(model)
        assert torch.equal(torch.get_rng_state(), state) and not seen
        model["first"](*call_of(model["first"]))
        assert len(seen) == 1

    def test_compiled_and_exported(self, model):
        accelerate(model)
        module, call = model["first"], call_of(model["first"])
        expected = module(*call)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(*call), expected)
        torch.testing.assert_close(torch.export.export(module, call).module()(*call), expected)

    def test_on_meta(self):
        """A model without memory is replaced too; nothing can be compared."""
        with torch.device("meta"):
            model = MSDeformAttn()
        (replaced,) = accelerate(model).replaced
        assert "no copy can be made of it" in replaced.unchecked


class TestRefusals:
    def test_nothing_is_known(self):
        with pytest.raises(ValueError, match=r"Linear is left as it was: none of its modules .* transformers 5\.\d+"):
            accelerate(nn.Linear(3, 3))
        report = accelerate(nn.Linear(3, 3), strict=False)
        assert not report.replaced and str(report) == "nothing was replaced"

    def test_not_a_module(self):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module; got type"):
            accelerate(nn.Linear)

    def test_computes_something_else(self):
        model = nn.Sequential(MSDeformAttn(), Another())
        with pytest.raises(ValueError, match="(?s)Another: it computes something else than what is known: relative"):
            accelerate(model)
        assert type(model[0]) is MSDeformAttn
        report = accelerate(model, strict=False)
        assert [replaced.path for replaced in report.replaced] == ["0"] and [left.path for left in report.left] == ["1"]

    def test_lacks_an_attribute(self):
        model = MSDeformAttn()
        del model.n_points
        with pytest.raises(ValueError, match="it has no n_points"):
            accelerate(model)

    def test_forward_of_the_instance(self):
        """Ours would be hidden behind it."""
        model = MSDeformAttn()
        model.forward = lambda *call: None
        with pytest.raises(ValueError, match="its forward has been replaced on the instance"):
            accelerate(model)

    def test_the_original_does_not_run_here(self):
        (replaced,) = (report := accelerate(CudaAlone())).replaced
        assert "NotImplementedError: Not implemented on the CPU" in replaced.unchecked
        assert "not compared: its forward does not run on this CPU" in str(report)


def test_modules_of_ours_are_left_alone():
    model = nn.ModuleList([OurAttention(16, 2, 2, 2), OurAggregation()])
    assert accelerate(model).already == ["0", "1"]


def test_aggregation_of_sparsedrive():
    theirs = DeformableFeatureAggregation()
    ours = OurAggregation(use_camera_embed=True, embed_dims=32, num_levels=2, num_cams=2, use_deformable_func=True)
    theirs.load_state_dict(ours.state_dict())
    (replaced,) = (report := accelerate(theirs)).replaced
    assert "its plain path samples beyond the borders" in replaced.unchecked
    assert theirs.use_deformable_func
    generator = torch.Generator().manual_seed(0)
    feature, embed = torch.randn(2, 1, 5, 32, generator=generator)
    anchor = torch.randn(1, 5, 11, generator=generator)
    maps = [torch.randn(1, 2, 32, *shape, generator=generator) for shape in SHAPES]
    metas = {"projection_mat": torch.randn(1, 2, 4, 4, generator=generator), "image_wh": torch.full((1, 2, 2), 64.0)}
    assert torch.equal(theirs(feature, anchor, embed, maps, metas), ours(feature, anchor, embed, maps, metas))
    report.undo()
    assert type(theirs) is DeformableFeatureAggregation and not theirs.use_deformable_func


def test_public_names():
    assert set(integrations.__all__) <= set(vars(integrations))
