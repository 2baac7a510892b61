"""What `import reimplementation` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_package_brings_ops_and_models_when_they_are_asked_for():
    code = (
        "import sys, reimplementation; print(any(name in sys.modules for name in ('torch', 'numpy')))\n"
        "print(reimplementation.ops.ms_deform_attn.__name__, reimplementation.models.MSDeformAttn.__name__)"
    )
    assert python(code) == "False\nms_deform_attn MSDeformAttn\n"


def test_a_name_that_is_not_there():
    code = "import reimplementation\ntry:\n    reimplementation.op\nexcept AttributeError as error:\n    print(error)"
    assert python(code) == "module 'reimplementation' has no attribute 'op'\n"


def test_models_are_found_beside_each_other():
    from reimplementation import models
    from reimplementation.models import deformable

    for name in ("DeformableFeatureAggregation", "SparseBox3DKeyPointsGenerator", "SparsePoint3DKeyPointsGenerator"):
        assert getattr(models, name) is getattr(deformable, name)
