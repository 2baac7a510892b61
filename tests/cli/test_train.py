"""`train` and `evaluate`, as docs/training.md types them, and what they say where something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from reimplementation.cli import main
from reimplementation.cli.train import asked_to_stop
from reimplementation.training import journal
from reimplementation.training.config import TrainingConfig
from tests.markdown import ROOT, commands
from tests.training.tiny import TINY, written

pytest.importorskip("scipy")
pytest.importorskip("rich")
pytest.importorskip("yaml")
EXAMPLE = ROOT / "examples" / "train" / "tiny.yaml"


def test_the_page_as_it_is_typed(tmp_path, monkeypatch, capsys):
    """With a smaller detector in the file's place, since only its commands are tried here."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    written(TINY, tmp_path / "examples" / "train" / "tiny.yaml")
    train, evaluate, _torchrun, _make_dataset = (words[3:] for words in commands(ROOT / "docs" / "training.md"))
    assert main(train) == 0
    assert "step 4 of 4: finished" in capsys.readouterr().out
    assert main(train) == 0
    assert "going on after step 4 of 4" in capsys.readouterr().out
    assert main(evaluate) == 0
    said = capsys.readouterr().out
    assert "mAP" in said and "NDS" in said and "map lines" in said
    document = json.loads((tmp_path / "work" / "tiny.json").read_text())
    assert document["step"] == 4 and set(document["boxes"]["classes"]) == set(TINY.model.det.classes)
    assert (tmp_path / "work" / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_is_a_training():
    config = TrainingConfig.from_yaml(EXAMPLE)
    assert config == TrainingConfig.from_dict(config.to_dict())
    assert config.model.depth == 18


@pytest.mark.slow
def test_the_example_learns(tmp_path):
    assert main(["train", "--config", str(EXAMPLE), "--work-dir", str(tmp_path)]) == 0
    losses = [row["loss"] for row in journal.read(tmp_path)]
    assert sum(losses[-24:]) < 0.7 * sum(losses[:24])  # every drive is seen anew in each of these


@pytest.mark.slow
def test_sigterm_and_on(tmp_path):
    """A process that SIGTERM stops, and one that goes on, write what one process writes."""
    command = [sys.executable, "-m", "reimplementation", "train", "--work-dir"]
    config = ["--config", str(written(dataclasses.replace(TINY, num_steps=40), tmp_path / "tiny.yaml"))]
    subprocess.run([*command, tmp_path / "whole", *config], check=True, cwd=ROOT)
    process = subprocess.Popen([*command, tmp_path / "parts", *config], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while len(journal.read(tmp_path / "parts")) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 0 and "stopped; the same command goes on from there" in said
    assert len(journal.read(tmp_path / "parts")) < 40
    subprocess.run([*command, tmp_path / "parts", *config], check=True, cwd=ROOT)
    whole, parts = ([row["loss"] for row in journal.read(tmp_path / name)] for name in ("whole", "parts"))
    assert len(whole) == 40 and parts == whole


def test_signals_only_ask():
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_stop() as is_stopped:
        assert not is_stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_steps: 0", "num_steps must be at least 1; got 0"),
        ("batch_size: 2", "the configuration must hold num_steps"),
        ("num_steps: 1\nspeed: 2", "unknown keys: speed"),
        ("num_steps: 1\ndata: {image_wh: [16, 16]}", "image_wh must be a width and a height of at least 32 pixels"),
        ("num_steps: 1\nprecision: float8", "precision must be one of float32, bfloat16; got 'float8'"),
        ("num_steps: many", "num_steps must be of type int; got 'many'"),
        ("num_steps: [", "while parsing"),
    ],
)
def test_errors_are_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--work-dir", str(tmp_path / "work")]) == 2
    err = capsys.readouterr().err
    assert message in err and str(path) in err and err.count("\n") == 1


def test_nothing_to_evaluate(tmp_path, capsys):
    assert main(["evaluate", "--work-dir", str(tmp_path)]) == 2
    assert "holds no checkpoint of a training" in capsys.readouterr().err
