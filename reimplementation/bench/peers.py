"""Other people's kernels for our ops, where they are installed: timed on the same inputs, once their numbers agree.

A peer is timed as users call it: its forward, and its backward after it through autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from reimplementation.bench.inputs import AttentionInputs, OpInputs
from reimplementation.bench.steps import Function, autograd_step, call, op_of

PEER_PASSES = ("forward", "training")
NATIVE_HALF_ATOMICS = (9, 0)  # the first compute capability that adds bfloat16 into memory in one instruction


@dataclass(frozen=True)
class Peer:
    """Kernels of another package.

    package: its name for pip.
    inputs: the operands of the op that they compute.
    load: for a device, a function of those operands, in our op's order. It raises ImportError or RuntimeError, which
        say why there is none.
    """

    package: str
    inputs: type[OpInputs]
    load: Callable[[torch.device], Function]


def _deformops(backend_name: str) -> Callable[[torch.device], Function]:
    """A backend of deformops 3 (https://pypi.org/project/deformops)."""

    def load(device: torch.device) -> Function:
        if device.type != "cuda":
            raise RuntimeError(f"its kernels are for CUDA; got {device}")
        from deformops.registry import Backend, msda

        backend = Backend[backend_name]
        msda.load(backend)
        # What its own choice takes. A GPU without these atomics would train in half precision on float32 sums.
        sums = torch.cuda.get_device_capability(device) < NATIVE_HALF_ATOMICS
        options = {"fp32acc": sums} if backend_name == "TRITON" else {}
        return lambda *operands: msda(*operands, backend=backend, **options)

    return load


PEERS: dict[str, Peer] = {
    "deformops-triton": Peer("deformops", AttentionInputs, _deformops("TRITON")),
    "deformops-cuda": Peer("deformops", AttentionInputs, _deformops("CUDA")),
}


def installed(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The names of the peers that run on a device, and why each of the others does not."""
    found, missing = [], {}
    for name, peer in PEERS.items():
        try:
            peer.load(device)
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed; try: pip install {peer.package}"
        except (ImportError, RuntimeError) as error:
            missing[name] = str(error)
        else:
            found.append(name)
    return found, missing


def versions(names: Iterable[str]) -> dict[str, str]:
    """The packages of these peers, with their versions."""
    return {package: metadata.version(package) for package in {PEERS[name].package for name in names}}


def peer_steps(name: str, inputs: list[OpInputs], passed: str) -> list[Callable[[], object]]:
    """The work of one of `PEER_PASSES` on each of the inputs.

    Raises:
        RuntimeError: the peer's numbers are not ours; it says by how much.
    """
    function = PEERS[name].load(next(iter(inputs[0])).device)
    require_agreement(function, inputs[0], gradients=passed == "training")
    return [autograd_step(function, each, passed) for each in inputs]


def require_agreement(function: Function, inputs: OpInputs, *, gradients: bool) -> None:
    """Raises RuntimeError unless a function gives our op's output, and its gradients too if they are asked for.

    They agree where their distance is small beside their length (both Euclidean). A coordinate is known to a float32's
    rounding of the longest side in pixels, and features to a few roundings of their dtype. The locations' gradient
    jumps from pixel to pixel: it is another for samples that round into the next one, a share of about that rounding.
    """
    features, shapes, *_ = inputs
    rounding = torch.finfo(torch.float32).eps * int(shapes.max())
    tolerance = 16 * torch.finfo(features.dtype).eps + rounding
    tolerances = {
        "output": tolerance,
        "gradient of the features": tolerance,
        "gradient of the locations": tolerance + 2 * rounding**0.5,
        "gradient of the weights": tolerance,
    }
    theirs, ours = (_numbers(f, inputs, gradients) for f in (function, op_of(inputs).function))
    for (what, allowed), their, our in zip(tolerances.items(), theirs, ours):
        if their.shape != our.shape:
            raise RuntimeError(f"its {what} has the shape {tuple(their.shape)}; ours has {tuple(our.shape)}")
        distance = ((their - our).norm() / our.norm()).item()
        if not distance <= allowed:  # nor where it is NaN
            raise RuntimeError(f"its {what} is {distance:.1e} of its length away from ours, more than {allowed:.1e}")


def _numbers(function: Function, inputs: OpInputs, gradients: bool) -> list[Tensor]:
    """In float64: the output of a function, and its gradients for a random gradient of the output, the same always."""
    forward, leaves = call(function, inputs, records=gradients)
    output = forward()
    if not gradients:
        return [output.double()]
    generator = torch.Generator(output.device).manual_seed(0)
    grad_output = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return [output.detach().double(), *(g.double() for g in torch.autograd.grad(output, leaves, grad_output))]
