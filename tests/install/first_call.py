"""Run by an installation's interpreter: both ops and their gradients against the formula of tests/reference.py.

Arguments: the project's folder, then the backends that CPU tensors must have, best first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import reimplementation
from reimplementation import ops


def main(project: Path, backends: list[str]) -> None:
    package = Path(reimplementation.__file__).resolve().parent
    assert package.parent != project, "the project's own folder was imported, not what was installed"
    found = ops.available_backends("cpu")
    assert found == backends, f"expected the backends {backends} for CPU tensors; got {found}: {ops.build_info()}"

    sys.path.append(str(project))  # behind the installed package
    from tests import reference
    from tests.ops.agreement import assert_agrees
    from tests.ops.inputs import random_attention_inputs, rig_inputs

    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for op, formula, inputs in (
            (ops.deformable_aggregation_function, reference.deformable_aggregation, rig_inputs()),
            (ops.ms_deform_attn, reference.ms_deform_attn, random_attention_inputs()),
        ):
            assert_agrees(op, formula, inputs, device, torch.float32)
    print(f"both ops agree with the formula: {package}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
