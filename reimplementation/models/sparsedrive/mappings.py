"""Between dataclasses and plain mappings, as a YAML file holds them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping


def read_dataclass(cls: type, values: typing.Any, where: str = "") -> typing.Any:
    """The dataclass that a mapping describes, at any depth: sequences become tuples, mappings the field's dataclass.

    Args:
        cls: a dataclass whose fields are numbers, texts, tuples, dataclasses, or one of these or None.
        values: the mapping; what it leaves out has its default.
        where: what the mapping is called in an error.

    Raises:
        ValueError: a key is unknown, or one without a default is missing.
        TypeError: a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{where or 'the configuration'} must be a mapping; got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = [str(key) for key in values if key not in hints]
    if unknown:
        of = f" of {where}" if where else ""
        raise ValueError(f"unknown keys{of}: {', '.join(unknown)}; known are {', '.join(hints)}")
    missing = [field.name for field in dataclasses.fields(cls) if _is_required(field) and field.name not in values]
    if missing:
        raise ValueError(f"{where or 'the configuration'} must hold {', '.join(missing)}; got {', '.join(values)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()})


def write_dataclass(value: typing.Any) -> typing.Any:
    """What `read_dataclass` reads: plain dicts, lists, numbers and texts."""
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """A value as the field's type wants it."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (choice for choice in typing.get_args(hint) if choice is not type(None))
    if hasattr(hint, "from_dict"):  # the form may be one of its own
        return hint.from_dict(value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{where} must be a list; got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError(f"{where} must be of type {hint.__name__}; got {value!r}")
    return value


def _plain(value: typing.Any) -> typing.Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return write_dataclass(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
