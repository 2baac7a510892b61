"""Checkpoint files of the public models."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SHOWN = 8  # names of each kind that a report lists


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True) -> str:
    """Load an mmcv checkpoint of SparseDrive or Sparse4D: a dict with the parameters under ``state_dict``.

    Only tensors and plain values are unpickled (``weights_only=True``): nothing in a file can run.

    Args:
        model: whose parameters have the checkpoint's names, as `sparsedrive_small` and `sparse4d_v3` build it.
        path: the file. A bare dict of tensors will do too.
        strict: missing, unknown and differently shaped parameters are an error. False: what fits is loaded.

    Returns:
        A report: how many parameters were loaded, which the file lacks, which it has beyond the model's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or damaged, or holds objects other than tensors and plain values; or, if
            ``strict``, it does not fit.
    """
    found = _read(Path(path))
    wanted = model.state_dict()
    fitting = {name: tensor for name, tensor in found.items() if name in wanted and _fits(tensor, wanted[name])}
    report = _report(
        loaded=len(fitting),
        missing=[name for name in wanted if name not in found],
        unknown=[name for name in found if name not in wanted],
        misshapen=[
            f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in wanted
            if name in found and name not in fitting
        ],
    )
    if not fitting or (strict and (len(fitting) < len(wanted) or len(found) > len(wanted))):
        raise ValueError(f"{path} does not fit {type(model).__name__}: {report}")
    model.load_state_dict(fitting, strict=False)
    return report


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is no checkpoint: {reason[0] if reason else error}"
        ) from None
    except Exception as error:  # damaged archives raise whatever their reader stumbles over
        raise ValueError(f"{path} is no checkpoint that can be read, or is damaged: {error}") from None
    parameters = document.get("state_dict", document) if isinstance(document, Mapping) else None
    if not isinstance(parameters, Mapping) or not all(isinstance(value, Tensor) for value in parameters.values()):
        raise ValueError(f"{path} must hold a dict of tensors, alone or under 'state_dict'; got {_kind(document)}")
    return {str(name): value for name, value in parameters.items()}


def _fits(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and found.is_floating_point() == wanted.is_floating_point()


def _report(loaded: int, missing: list[str], unknown: list[str], misshapen: list[str]) -> str:
    parts = [f"{loaded} parameters loaded"]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen)):
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}")
    return "; ".join(parts)


def _kind(document: object) -> str:
    if isinstance(document, Mapping):
        return f"a dict with the keys {', '.join(map(str, list(document)[:SHOWN]))}"
    return f"a {type(document).__name__}"
