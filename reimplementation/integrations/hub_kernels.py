"""Our op by the door that transformers has for kernels: the mapping of the package `kernels`.

transformers 5 marks its op as a layer that a kernel may stand in for. With this mapping `kernelize` puts ours there.
That reaches the models whose op is a layer. RT-DETRv2, D-FINE, DEIMv2, Mask2Former and OneFormer are reached by
`accelerate` alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from reimplementation import ops

LAYER = "MultiScaleDeformableAttention"


class MultiScaleDeformableAttention(nn.Module):
    """transformers' layer. It has no parameters, and the package `kernels` wants its class to have nothing else."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return ops.ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


class Repository:
    """What the package `kernels` takes for a place to load a layer from."""

    layer_name = LAYER

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention


def kernel_mapping(*devices: str) -> dict[str, dict[str, Repository]]:
    """The mapping for `kernels.use_kernel_mapping` or `kernels.register_kernel_mapping`.

    Args:
        devices: kinds of devices, as `kernels` names them. Default: "cuda" and "cpu".
    """
    return {LAYER: {device: Repository() for device in devices or ("cuda", "cpu")}}
