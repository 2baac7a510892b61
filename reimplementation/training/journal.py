"""What a training writes down of its steps: a line of JSON each, and some for TensorBoard, where that is installed."""

from __future__ import annotations

import json
from pathlib import Path

METRICS = "metrics.jsonl"
BOARD_EVERY = 10  # steps: a hundred numbers for TensorBoard take longer than a line for the file


class Journal:
    """The record of a training in its folder.

    Args:
        folder: of the training; it exists.
        first_step: where the training goes on. What an interrupted run wrote of this step and later ones is dropped, as
            they come again.
    """

    def __init__(self, folder: Path, first_step: int):
        path = folder / METRICS
        kept = [row for row in read(folder) if row["step"] < first_step]
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        unfinished.replace(path)
        self._file = path.open("a", buffering=1)  # by lines: who reads along sees whole ones
        self._board = _tensorboard(folder, first_step)

    def write(self, row: dict) -> None:
        """Write a step down: ``step`` and numbers."""
        self._file.write(json.dumps(row) + "\n")
        if self._board is not None and (row["step"] % BOARD_EVERY == 0 or "mAP" in row):
            for name in row.keys() - {"step"}:
                self._board.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(folder: Path) -> list[dict]:
    """The rows of a training's journal; a last line that was cut off is left out, as its step comes again."""
    path = folder / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _tensorboard(folder: Path, first_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step)
