"""`info` tells what is there, without any extra."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reimplementation
from reimplementation import ops
from reimplementation.cli import main


def test_text(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert reimplementation.__version__ in said and torch.__version__ in said and "grid_sample" in said


def test_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["devices"][0]["backends"] == ops.available_backends("cpu")
    assert facts["extension"] == ops.build_info()


def test_missing_extension_is_explained(capsys, monkeypatch):
    facts = {"cpu": False, "cuda": False, "architectures": [], "file": None}
    facts["reasons"] = {"cpu": "no compiler", "cuda": "nvcc not found"}
    monkeypatch.setattr(ops, "build_info", lambda: facts)
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "missing: no compiler" in said and "missing: nvcc not found" in said


def test_a_gpu_that_the_extension_was_not_built_for(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(ops.backends, "why_missing", lambda device: "built for 9.0. To build it: …")
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "Old Card, compute capability 6.1; backends:" in said and "built for 9.0. To build it: …" in said


def test_needs_no_extra():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'matplotlib', 'PIL')));"
        "from reimplementation.cli import main; sys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "command" in capsys.readouterr().err
