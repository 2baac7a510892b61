"""Weights, inputs and outputs as files, and what is wrong with such files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reimplementation.models.backbones.vit import HeadConfig, dinov3_config
from reimplementation.models.backbones.vit.export import check_package, export_package, load_package
from reimplementation.models.backbones.vit.files import load_weights, read_images, read_tensor, write_tensor
from reimplementation.models.backbones.vit.initialization import wake_branches

from . import vit_formulas as formulas
from .test_vit_dinov3 import FFN, HIDDEN, state_dict

CONFIG = formulas.config(dtype=torch.float32)


class TestWeights:
    def test_our_own(self, tmp_path):
        source = formulas.fill(CONFIG.instantiate())
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        model = CONFIG.instantiate()
        load_weights(model, tmp_path / "weights.pt")
        assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), source.state_dict().values()))

    def test_dinov3_keeps_the_heads(self, tmp_path):
        small = {"depth": 2, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 2}
        model = dinov3_config("vits16").replace(**small, heads={"a": HeadConfig()}).instantiate()
        head = model.heads["a"].proj.weight.clone()
        torch.save(state_dict(swiglu=False), tmp_path / "dinov3.pth")
        load_weights(model, tmp_path / "dinov3.pth")
        assert torch.equal(model.heads["a"].proj.weight, head)
        assert torch.equal(model.cls_tokens, state_dict(swiglu=False)["cls_token"])

    def test_of_another_model(self, tmp_path):
        torch.save(CONFIG.replace(depth=2).instantiate().state_dict(), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="weights.pt holds the weights of another model: .*blocks.1"):
            load_weights(CONFIG.instantiate(), tmp_path / "weights.pt")

    def test_half_of_dinov3(self, tmp_path):
        state = state_dict(swiglu=True)
        del state["blocks.0.mlp.w2.weight"]
        torch.save(state, tmp_path / "dinov3.pth")
        with pytest.raises(ValueError, match="dinov3.pth holds the weights of another model: .*mlp.w2.weight"):
            load_weights(dinov3_config("vits16plus").replace(depth=2).instantiate(), tmp_path / "dinov3.pth")

    @pytest.mark.parametrize("content", [torch.zeros(3), {"a": 3}])
    def test_no_state_dict(self, content, tmp_path):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="must hold a state dict, tensors by name"):
            load_weights(CONFIG.instantiate(), tmp_path / "weights.pt")


class TestTensors:
    @pytest.mark.parametrize("name", ["x.npy", "x.pt"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_there_and_back(self, name, dtype, tmp_path):
        tensor = torch.randn(2, 3).to(dtype)
        write_tensor(tmp_path / name, tensor)
        found = read_tensor(tmp_path / name)
        assert torch.equal(found.to(dtype), tensor)
        assert found.dtype == (torch.float32 if (name, dtype) == ("x.npy", torch.bfloat16) else dtype)

    def test_another_ending(self, tmp_path):
        for call in (lambda: read_tensor(tmp_path / "x.txt"), lambda: write_tensor(tmp_path / "x", torch.ones(1))):
            with pytest.raises(ValueError, match="ends in .npy or .pt"):
                call()

    @pytest.mark.parametrize("name", ["x.npy", "x.pt"])
    @pytest.mark.parametrize("content", [b"", b"no tensor at all", b"\x80\x02cposix\nsystem\n."])
    def test_no_such_file_inside(self, name, content, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_tensor(tmp_path / name)

    def test_objects_are_not_read(self, tmp_path):
        np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
        with pytest.raises(ValueError, match="is no .npy file of numbers"):
            read_tensor(tmp_path / "x.npy")
        np.save(tmp_path / "y.npy", np.array(["text"]))
        with pytest.raises(ValueError, match="is no .npy file of numbers"):
            read_tensor(tmp_path / "y.npy")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(OSError, match="x.npy"):
            read_tensor(tmp_path / "x.npy")


class TestImages:
    def test_become_the_models_dtype(self, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros((2, 3, 64, 96)))
        assert read_images(tmp_path / "x.npy", CONFIG).dtype == torch.float32

    @pytest.mark.parametrize(
        "array",
        [np.zeros((3, 64, 96)), np.zeros((1, 4, 64, 96)), np.zeros((1, 3, 64, 96), int), np.zeros((0, 3, 8, 8))],
    )
    def test_no_images(self, array, tmp_path):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=r"must hold floating-point images, such as \(B, 3, 64, 96\)"):
            read_images(tmp_path / "x.npy", CONFIG)

    def test_a_package_has_its_size(self, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros((1, 3, 32, 32)))
        assert read_images(tmp_path / "x.npy", CONFIG).shape == (1, 3, 32, 32)
        with pytest.raises(ValueError, match=r"images of its own size, \(64, 96\); got \(32, 32\)"):
            read_images(tmp_path / "x.npy", CONFIG, any_size=False)


class TestPackage:
    def test_what_does_not_fit(self, tmp_path):
        with pytest.raises(ValueError, match="the name of a package ends in .pt2"):
            export_package(CONFIG.instantiate().eval(), tmp_path / "x.so")
        with pytest.raises(ValueError, match="call eval"):
            export_package(CONFIG.instantiate(), tmp_path / "x.pt2")
        with pytest.raises(ValueError, match="there is no package .*x.pt2; write it with: python -m"):
            load_package(tmp_path / "x.pt2")

    def test_another_computation_is_an_error(self):
        model = CONFIG.instantiate().eval()
        with pytest.raises(RuntimeError, match="relative L2 error 1.0e-01"):
            check_package(model, lambda images: 1.1 * model(images).dense_features)

    def test_the_check_sees_the_layers(self):
        """A fresh model's layers are the identity: a package without them would pass."""
        model = CONFIG.instantiate().eval()
        wake_branches(model)
        with pytest.raises(RuntimeError, match="does not compute"):
            check_package(model, lambda images: model.output_norm(model.stem(images)))

    @pytest.mark.slow
    @pytest.mark.parametrize("pos_enc", ["rope", "learnable"])
    def test_same_numbers_for_every_batch(self, pos_enc, tmp_path):
        model = CONFIG.replace(pos_enc=pos_enc, num_cls_tokens=1).instantiate().eval()
        wake_branches(model)
        export_package(model, tmp_path / "vit.pt2")
        errors = check_package(model, load_package(tmp_path / "vit.pt2"))
        assert list(errors) == [2, 1, 3] and max(errors.values()) < 1e-5
        for images in (torch.zeros(2, 3, 64, 88), torch.zeros(2, 3, 64, 96, dtype=torch.bfloat16)):
            with pytest.raises(RuntimeError):
                load_package(tmp_path / "vit.pt2")(images)

    def test_no_package(self, tmp_path):
        (tmp_path / "vit.pt2").write_bytes(b"no package at all")
        with pytest.raises(RuntimeError):
            load_package(tmp_path / "vit.pt2")
