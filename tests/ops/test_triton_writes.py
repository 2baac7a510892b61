"""To PyTorch's compiler, the Triton kernels overwrite what they are there to write, and nothing else.

Were it to hold an operand for overwritten, `torch.compile` would refuse an operator that claims to change none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain

import pytest

from reimplementation.ops.backends import triton

pytest.importorskip("triton", minversion=".".join(map(str, triton.OLDEST)))


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.triton_writes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "assuming every input is mutated" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_overwrite_their_results_alone(reports):
    assert {report["kernel"].partition(".")[0] for report in reports} >= set(triton.OPS)
    for report in reports:
        assert report["written"] and not set(report["written"]) & set(report["operands"]), report
    results, written = (set(chain.from_iterable(report[key] for report in reports)) for key in ("others", "written"))
    assert written == results
