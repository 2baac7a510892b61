"""A detector as a recorded CUDA graph, whose frames cost the host one launch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reimplementation.models.sparsedrive.detector import METAS, SparseDrive
from reimplementation.ops.checks import check_shape

WARM_UP = 3  # frames before the recording, in which libraries choose their kernels


class ReplayedDetector:
    """A detector that remembers instances from frame to frame, as a graph that is recorded once and replayed.

    It is called as the model is, without a state: ``outputs = replayed(images, metas)``. Its outputs are overwritten by
    the next call.

    Args:
        model: in evaluation, on a GPU; best its form for inference. Later changes of its parameters in place are seen.
        images: (bs, num_cams, 3, H, W), of the shape and the dtype that all frames will have; on the model's GPU.
        metas: of `SparseDrive.forward`; likewise.
        every_layer: whether the layers that nothing follows from predict classes too.

    Raises:
        ValueError: the images are not on a GPU.
        RuntimeError: the model is in training.
    """

    def __init__(
        self, model: SparseDrive, images: Tensor, metas: Mapping[str, Tensor], every_layer: bool = False
    ) -> None:
        if images.device.type != "cuda":
            raise ValueError(f"a graph is recorded on a GPU; images are on {images.device}")
        if model.training:
            raise RuntimeError("a graph is recorded of a model in evaluation; call eval() first")
        self._model = model
        self._every_layer = every_layer
        self._images = images.clone()
        self._metas = {name: metas[name].clone() for name in METAS}
        self._state = model.initial_state(len(images))
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device(images.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._outputs = self._step()
        self.reset()

    @torch.no_grad()
    def __call__(self, images: Tensor, metas: Mapping[str, Tensor]) -> dict:
        """The outputs of a frame, as of the model. The next call overwrites them.

        Raises:
            KeyError: ``metas`` lacks an entry.
            ValueError: a shape is not that of the recording.
        """
        for name, kept, given in (("images", self._images, images), *((n, self._metas[n], metas[n]) for n in METAS)):
            check_shape(name, given, tuple(kept.shape), {})
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the instances of earlier frames."""
        self._remember(self._model.initial_state(len(self._images)))

    def _step(self) -> dict:
        outputs, state = self._model(self._images, self._metas, state=self._state, every_layer=self._every_layer)
        self._remember(state)
        return outputs

    def _remember(self, state: Mapping) -> None:
        for name, kept in self._state.items():
            for old, new in zip(kept, state[name], strict=True):
                old.copy_(new)
