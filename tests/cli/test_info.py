"""`info` tells what is there, without any extra."""

from __future__ import annotations

import json
import signal
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


def test_a_forced_backend_is_shown(capsys, monkeypatch):
    monkeypatch.delenv("REIMPLEMENTATION_BACKEND", raising=False)
    assert main(["info"]) == 0
    assert "forced" not in capsys.readouterr().out
    monkeypatch.setenv("REIMPLEMENTATION_BACKEND", "grid_sample")
    assert main(["info"]) == 0
    assert "forced backend    grid_sample (REIMPLEMENTATION_BACKEND)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("supported", "asked", "used"),
    [
        ("AVX512", "", "avx512"),
        ("AVX512", "avx2", "avx2"),
        ("AVX2", "avx512", "avx2"),
        ("DEFAULT", "avx2", "default"),
        ("SVE256", "", "default"),
        ("AVX2", "sse", "sse, which REIMPLEMENTATION_CPU_CAPABILITY asks for, is none of default, avx2, avx512"),
    ],
)
def test_the_instruction_set_of_the_cpu(capsys, monkeypatch, supported, asked, used):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: supported)
    monkeypatch.setenv("REIMPLEMENTATION_CPU_CAPABILITY", asked)
    assert main(["info"]) == 0
    assert f"cpu instructions  {used}\n" in capsys.readouterr().out


def test_a_reader_that_goes_is_no_error():
    """As before `| head -1`: no trace, and nothing on stderr."""
    command = [sys.executable, "-m", "reimplementation", "info"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], text=True, **pipe) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 128 + signal.SIGPIPE


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"reimplementation {reimplementation.__version__}\n"


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
