"""What PyTorch's compiler takes the Triton kernels to overwrite, printed as JSON, two lines a kernel: as this
release asks, and as earlier ones did.

It goes by Triton's intermediate code, which is made without a GPU, but not where kernels are interpreted: this is run
in a process of its own. A line has the kernel's name, its tensors that are operands, its others, and those overwritten.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget

from reimplementation.ops.backends import triton as backend
from tests.ops import table


def written(kernel, arguments: dict) -> set[str]:
    """By the name that the release of PyTorch at hand has for the question."""
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, dict(arguments), {})
        return {dependency.name for dependency in accesses.read_writes.writes}
    return set(triton_kernel_wrap.identify_mutated_tensors(kernel, dict(arguments), {}))


@contextmanager
def numbers_as_constants(kernel, arguments: dict) -> Iterator[None]:
    """Releases before 2.13 ask so: numbers are Python's then, which have no type of Triton's to convert from."""
    numbers = [param for param in kernel.params if not isinstance(arguments[param.name], torch.Tensor)]
    with ExitStack() as stack:
        for param in numbers:
            stack.enter_context(mock.patch.object(param, "is_constexpr", True))
            stack.enter_context(mock.patch.object(param, "do_not_specialize", False))
        yield


def report(kernel, operands: set[int], *arguments, **options) -> None:
    names = inspect.signature(kernel.fn).parameters
    bound = dict(zip(names, arguments)) | {name: options[name] for name in names if name in options}
    tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
    of_call = {name for name, tensor in tensors.items() if tensor.data_ptr() in operands}
    for asking in (nullcontext(), numbers_as_constants(kernel, bound)):
        with asking:
            print(
                json.dumps(
                    {
                        "kernel": f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}",
                        "operands": sorted(of_call),
                        "others": sorted(tensors.keys() - of_call),
                        "written": sorted(written(kernel, bound)),
                    }
                )
            )


def launch_nothing(module, launch, *arguments):
    """Calls a launcher, and reports the kernels that it would have run."""
    operands = {tensor.data_ptr() for tensor in arguments if isinstance(tensor, torch.Tensor)}

    class Launch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: report(self.kernel, operands, *args, **options)

    with mock.patch.object(module, "wrap_triton", Launch):
        return launch(*arguments)


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    for op, optional in table.FORMS:
        if op.name in backend.OPS:
            module = import_module(f"{backend.__name__}.{op.name}")
            operands = op.on("cpu", torch.float32)
            operands = operands if optional else table.without_optional(op, operands)
            returned = launch_nothing(module, module.forward, *operands, *op.settings)
            output, *kept = returned if op.keeps else (returned,)
            needs = [True] * len(op.differentiable)
            launch_nothing(module, module.backward, torch.empty_like(output), *operands, *kept, *op.settings, *needs)


if __name__ == "__main__":
    main()
