"""TensorBoard's files are written where its package is: here a stand-in for it."""

import sys
import types

from reimplementation.training import journal


class Writer:
    """Remembers what it is told, as `torch.utils.tensorboard.SummaryWriter` takes it."""

    made: list = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.is_open = folder, purge_step, [], True
        self.made.append(self)

    def add_scalar(self, name, value, step):
        assert self.is_open
        self.scalars.append((name, value, step))

    def close(self):
        self.is_open = False


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    record = journal.Journal(tmp_path, first_step=10)
    record.write({"step": 10, "loss": 2.5, "lr": 0.1})
    record.write({"step": 11, "loss": 2.25, "lr": 0.1})
    record.close()
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.is_open) == (str(tmp_path), 10, False)
    assert sorted(writer.scalars) == [("loss", 2.5, 10), ("lr", 0.1, 10)]  # every tenth step
    assert [row["loss"] for row in journal.read(tmp_path)] == [2.5, 2.25]


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it could not be imported
    record = journal.Journal(tmp_path, first_step=0)
    record.write({"step": 0, "loss": 1.0})
    record.close()
    assert [path.name for path in tmp_path.iterdir()] == [journal.METRICS]
