"""A second copy of the compiled library in one process: an error of its import, and the first one's operators go on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reimplementation import ops

LOADS = {
    "as a Python module": """
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_C", second, loader=ExtensionFileLoader("_C", second))
try:
    spec.loader.exec_module(module_from_spec(spec))
except ImportError as error:
    assert "another copy" in str(error), error
else:
    raise AssertionError("the import succeeded")
""",
    "as a library of operators": "torch.ops.load_library(second)",
}
CALLS = """
anchor = torch.tensor([[[1.0, 2, 3, 0, 0, 0, 0, 1]]])
assert torch.ops.reimplementation.box_key_points(anchor, torch.zeros(1, 3), None).tolist() == [[[[1, 2, 3]]]]
"""


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_the_first_copy_goes_on(load, tmp_path):
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the extension is not built")
    first = next(Path(ops.__file__).parents[1].glob("_C.abi3.so"))
    second = shutil.copy(first, tmp_path / "second.so")
    program = f"import torch\nfirst, second = {str(first)!r}, {str(second)!r}\ntorch.ops.load_library(first)\n"
    done = subprocess.run([sys.executable, "-c", program + load + CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
