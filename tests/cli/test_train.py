"""`train` and `evaluate`, as docs/training.md types them, and what they say where something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from reimplementation.cli import main
from reimplementation.cli.train import asked_to_stop
from reimplementation.training import config, journal
from reimplementation.training.config import TrainingConfig
from tests.markdown import ROOT, commands
from tests.training.tiny import ALIKE, TINY, numbers, written

pytest.importorskip("scipy")
pytest.importorskip("rich")
pytest.importorskip("yaml")
EXAMPLES = sorted((ROOT / "examples" / "train").glob("*.yaml"))


def test_the_page_as_it_is_typed(tmp_path, monkeypatch, capsys):
    """With a smaller detector in the file's place, since only its commands are tried here."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "PRESETS", tmp_path)
    written(TINY, tmp_path / "tiny.yaml")
    by_first_option = {words[3]: words[3:] for words in commands(ROOT / "docs" / "training.md")[:2]}
    train, evaluate = by_first_option["train"], by_first_option["evaluate"]
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "step 4 of 4: finished" in said and re.search("before: mAP 0.0.*after: mAP ", said, re.DOTALL)
    assert main(train[: train.index("--show")]) == 0
    assert "going on after step 4 of 4" in capsys.readouterr().out
    assert main(evaluate) == 0
    said = capsys.readouterr().out
    assert "mAP" in said and "NDS" in said and "map lines" in said
    document = json.loads((tmp_path / "work" / "tiny.json").read_text())
    assert document["step"] == 4 and set(document["boxes"]["classes"]) == set(TINY.model.det.classes)
    for name in ("tiny.png", "frame.png", "tiny/shown.png"):
        assert (tmp_path / "work" / name).read_bytes().startswith(b"\x89PNG")


def test_files_as_it_is_typed(tmp_path, monkeypatch, capsys):
    """With few and small images: `make-dataset`, and the two commands on its folder."""
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    few = dataclasses.replace(TINY, num_steps=1, model=dataclasses.replace(TINY.model, map=None))
    written(few, tmp_path / "files.yaml")
    (tmp_path / "work").mkdir()
    typed = [words[3:] for words in commands(ROOT / "docs" / "training.md") if "work/town" in words]
    make_dataset = next(words for words in typed if words[0] == "make-dataset")
    assert main([*make_dataset, "--frames", "2", "--width", "96", "--height", "48"]) == 0
    for words in typed:
        assert words == make_dataset or main(words) == 0
    said = capsys.readouterr().out
    assert len(typed) == 3 and "step 1 of 1: finished" in said and "mAP" in said


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_trainings(path):
    described = TrainingConfig.from_yaml(path)
    assert described == TrainingConfig.from_dict(described.to_dict())


def test_presets(tmp_path, capsys):
    assert TrainingConfig.preset("tiny").model.depth == 18
    assert main(["train", "--preset", "huge", "--work-dir", str(tmp_path)]) == 2
    assert "there is no preset 'huge', but tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_the_preset_learns(tmp_path, capsys):
    """Two short drives by heart, of which it knew nothing before."""
    picture = str(tmp_path / "both.png")
    assert main(["train", "--preset", "tiny", "--work-dir", str(tmp_path), "--show", picture]) == 0
    before, after = map(float, re.findall(r"(?:before|after): mAP ([\d.]+)", capsys.readouterr().out))
    assert before < 0.05 and after > 0.5


@pytest.mark.slow
def test_sigterm_and_on(tmp_path):
    """A process that SIGTERM stops, and one that goes on, write what one process writes.

    The signal goes to a whole group of processes, as a terminal or a batch system sends it: to those that read, too.
    """
    command = [sys.executable, "-m", "reimplementation", "train", "--work-dir"]
    data = dataclasses.replace(TINY.data, num_workers=1)
    path = written(dataclasses.replace(TINY, num_steps=40, data=data), tmp_path / "tiny.yaml")
    subprocess.run([*command, tmp_path / "whole", "--config", path], check=True, cwd=ROOT)
    parts = [*command, tmp_path / "parts", "--config", path]
    process = subprocess.Popen(parts, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while len(journal.read(tmp_path / "parts")) < 3 and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0 and "stopped; the same command goes on from there" in said
    assert len(journal.read(tmp_path / "parts")) < 40
    subprocess.run(parts, check=True, cwd=ROOT)
    whole, parts = ([row["loss"] for row in journal.read(tmp_path / name)] for name in ("whole", "parts"))
    assert len(whole) == 40 and parts == whole


@pytest.mark.slow
def test_torchrun_as_it_is_typed(tmp_path):
    """On the CPU, with gloo: two processes, whose halves of a batch are alike, see the losses of one."""
    (words,) = (words for words in commands(ROOT / "docs" / "training.md") if words[0] == "torchrun")
    written(ALIKE, tmp_path / "drives.yaml")
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:-1], "cpu"]
    subprocess.run(torchrun, check=True, cwd=tmp_path, env=surroundings)
    alone = [sys.executable, *words[words.index("-m") : -3], tmp_path / "alone"]
    subprocess.run(alone, check=True, cwd=tmp_path, env=surroundings)
    ours, theirs = numbers(tmp_path / "work" / "drives"), numbers(tmp_path / "alone")
    assert len(ours) == len(theirs) == ALIKE.num_steps
    assert ours[0]["det_loss_cls_0"] == pytest.approx(theirs[0]["det_loss_cls_0"], rel=1e-5)
    for row, expected in zip(ours, theirs):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.02)


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
