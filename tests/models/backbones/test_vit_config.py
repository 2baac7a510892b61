"""The settings of a ViT: their YAML, and what is wrong with them said for people."""

from __future__ import annotations

import pytest
import torch

from reimplementation.models.backbones.vit import (
    AttentivePoolHeadConfig,
    HeadConfig,
    TransposedConv2dHeadConfig,
    UpsampleHeadConfig,
    ViTConfig,
)

from . import vit_formulas as formulas

yaml = pytest.importorskip("yaml")

PLAIN = """
type: ViT
in_channels: 3
patch_size: [16, 16]
img_size: [224, 224]
depth: 12
hidden_size: 768
ffn_hidden_size: 3072
num_attention_heads: 12
"""
HEADS = """
heads:
  cls: {type: Head, out_features: 10}
  pool: {type: AttentivePoolHead, out_features: 10, num_queries: 2}
  up: {type: UpsampleHead, out_features: 3, hidden_features: [64, 32, 16]}
  conv: {type: TransposedConv2dHead, out_features: 5, dropout: 0.5}
"""


class TestYaml:
    def test_defaults(self):
        config = ViTConfig.from_yaml(PLAIN)
        assert config == ViTConfig(3, (16, 16), (224, 224), 12, 768, 3072, 12)
        assert (config.activation, config.pos_enc, config.dtype) == ("srelu", "rope", torch.bfloat16)
        assert (config.tokenized_size, config.sequence_length, config.head_dim) == ((14, 14), 196, 64)

    def test_heads(self):
        config = ViTConfig.from_yaml(PLAIN + HEADS)
        assert config.heads == {
            "cls": HeadConfig(out_features=10),
            "pool": AttentivePoolHeadConfig(out_features=10, num_queries=2),
            "up": UpsampleHeadConfig(out_features=3, hidden_features=(64, 32, 16)),
            "conv": TransposedConv2dHeadConfig(out_features=5, dropout=0.5),
        }

    @pytest.mark.parametrize("more", ["", HEADS, "dtype: float32\nlayer_scale: 0.5\nnum_cls_tokens: 1\n"])
    def test_there_and_back(self, more, tmp_path):
        config = ViTConfig.from_yaml(PLAIN + more)
        text = config.to_yaml()
        assert "!!" not in text and ViTConfig.from_yaml(text) == config
        path = tmp_path / "vit.yaml"
        path.write_text(text)
        assert ViTConfig.from_yaml(path) == ViTConfig.from_yaml(str(path)) == config

    def test_an_exponent_without_a_point_is_a_number(self):
        """YAML 1.1 reads 1e-5 as text."""
        assert ViTConfig.from_yaml(PLAIN + "layer_scale: 1e-5\nrope_base: 100").layer_scale == 1e-5

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (PLAIN + "deptth: 3", "the YAML: unknown key 'deptth'; did you mean 'depth'"),
            (PLAIN + "dtype: float31", "the YAML: dtype must be one of float32, .* did you mean 'float32'"),
            (PLAIN + "activation: swigl", "the YAML: activation must be one of .* did you mean 'swiglu'"),
            (PLAIN.replace("depth: 12", ""), "the YAML: missing depth"),
            (PLAIN.replace("type: ViT", "type: ResNet"), "type must be ViT; got 'ResNet'"),
            (PLAIN + "heads: {a: {out_features: 3}}", "heads.a must be a mapping with a type, one of Head, "),
            (PLAIN + "heads: {a: {type: Hea}}", "heads.a: type must be one of .*; did you mean 'Head'"),
            (PLAIN + "heads: {a: {type: [Head]}}", r"heads.a: type must be one of .*; got \['Head'\]"),
            (PLAIN + "heads: {a: {type: Head, width: 3}}", "heads.a: unknown key 'width'"),
            (PLAIN + "heads: {a: {type: Head, out_features: 0}}", "heads.a: out_features must be at least 1; got 0"),
            (PLAIN + "heads: {a.b: {type: Head}}", "the name of a head must be an identifier"),
            (PLAIN + "a: [", "the YAML is not plain YAML"),
            (PLAIN + "heads: !!python/object:vit.HeadConfig {}", "not plain YAML: could not determine a constructor"),
            (PLAIN.replace("[16, 16]", "!!python/tuple [16, 16]"), "not plain YAML: could not determine"),
        ],
    )
    def test_what_is_wrong(self, text, message):
        with pytest.raises(ValueError, match=message):
            ViTConfig.from_yaml(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- 1\n- 2\n", "the YAML must be a mapping"),
            (PLAIN.replace("depth: 12", "depth: twelve"), "the YAML: depth must be a whole number; got 'twelve'"),
            (PLAIN.replace("[16, 16]", "16"), "patch_size must be a list of whole numbers; got 16"),
            (PLAIN + "mlp_bias: 1", "mlp_bias must be true or false; got 1"),
            (PLAIN + "layer_scale: small", "layer_scale must be a number or none; got 'small'"),
            (PLAIN + "heads: [Head]", "heads must be a mapping from names"),
            (PLAIN + "heads: {a: {type: Head, bias: 3}}", "heads.a: bias must be true or false; got 3"),
        ],
    )
    def test_of_another_type(self, text, message):
        with pytest.raises(TypeError, match=message):
            ViTConfig.from_yaml(text)

    def test_a_value_of_gigabytes_is_shown_in_short(self):
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        with pytest.raises(ValueError, match="unknown key 'a0'"):
            ViTConfig.from_yaml(PLAIN + "\n".join(lines))
        bomb = "\n".join(lines).replace("a11: &a11", "patch_size: &a11")
        with pytest.raises((TypeError, ValueError)) as error:
            ViTConfig.from_dict({**yaml.safe_load(PLAIN), "patch_size": yaml.safe_load(bomb)["patch_size"]})
        assert len(str(error.value)) < 1000

    def test_a_missing_file_is_named(self):
        with pytest.raises(OSError, match="no-such.yaml"):
            ViTConfig.from_yaml("no-such.yaml")

    def test_no_bytes_of_text(self, tmp_path):
        path = tmp_path / "vit.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="is not plain YAML"):
            ViTConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": (64, 100)}, r"img_size must be a positive multiple .* got \[64, 100\] and \[8, 8\]"),
        ({"img_size": (64, 0)}, "positive multiple"),
        ({"patch_size": (8, 0)}, "positive multiple"),
        ({"patch_size": (8, 8, 8)}, "must both have two axes, or three"),
        ({"patch_size": (8,), "img_size": (64,)}, "must both have two axes, or three"),
        ({"hidden_size": 62}, "multiple of num_attention_heads=4; got 62"),
        ({"hidden_size": 72}, r"multiple of 4 \* num_attention_heads=16 for pos_enc rope; got 72"),
        ({"hidden_size": 15, "num_attention_heads": 3, "pos_enc": "fourier"}, "hidden_size must be even"),
        ({"patch_size": (8, 8, 8), "img_size": (8, 8, 8)}, "for volumes take fourier"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"num_cls_tokens": -1}, "num_cls_tokens must be at least 0; got -1"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must be in \[0, 1\); got 1"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate must be in"),
        ({"rope_jitter_coords": 0.5}, "rope_jitter_coords must be at least 1; got 0.5"),
        ({"rope_base": 0.0}, "rope_base must be at least 1; got 0"),
        ({"rope_normalize_coords": "both"}, "rope_normalize_coords must be one of min, max, separate"),
        ({"rope_shift_coords": 0.1, "pos_enc": "none"}, "no effect with pos_enc none"),
        ({"glu_limit": 7.0}, "glu_limit has no effect with activation srelu"),
        ({"glu_limit": -1.0, "activation": "swiglu"}, "glu_limit must be positive; got -1"),
        ({"layer_scale": float("inf")}, "layer_scale must be finite"),
        ({"norm_type": "batchnorm"}, "norm_type must be one of rmsnorm, layernorm"),
        ({"heads": {"a": AttentivePoolHeadConfig(in_features=30)}}, "heads.a: in_features must be a multiple of"),
        ({"heads": {"a": TransposedConv2dHeadConfig(groups=3)}}, "heads.a: groups must divide"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        formulas.config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "dtype must be one of torch's float32"),
        ({"dtype": torch.int8}, "dtype must be one of torch's float32"),
        ({"heads": {"a": {"type": "Head"}}}, "heads.a must be settings of a head"),
    ],
)
def test_of_another_type(changes, message):
    with pytest.raises(TypeError, match=message):
        formulas.config(**changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UpsampleHeadConfig(hidden_features=[8, 4]), r"a width for each stage but the last, 3; got \[8, 4\]"),
        (lambda: UpsampleHeadConfig(hidden_features=0), "hidden_features must be at least 1; got 0"),
        (lambda: UpsampleHeadConfig(num_upsample_stages=0), "num_upsample_stages must be at least 1"),
        (lambda: AttentivePoolHeadConfig(num_queries=0), "num_queries must be at least 1"),
        (lambda: TransposedConv2dHeadConfig(output_padding=2), r"output_padding must be in \[0, 2\); got 2"),
        (lambda: HeadConfig(dropout=1), r"dropout must be in \[0, 1\); got 1"),
    ],
)
def test_heads(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_do_not_change():
    config = formulas.config()
    with pytest.raises(AttributeError):
        config.depth = 3
    assert config.replace(depth=3).depth == 3 and config.depth == 1


def test_another_dtype_when_built():
    assert formulas.config().instantiate(dtype=torch.float16).stem.patch.weight.dtype == torch.float16
