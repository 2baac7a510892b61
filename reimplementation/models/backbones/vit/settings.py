"""Dataclasses of settings: from plain mappings and back, with every field checked by its annotation."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from numbers import Real
from reprlib import Repr
from typing import Any

_SHORT = Repr()
_SHORT.maxlevel = 2  # YAML's aliases can nest a few lines into gigabytes


def from_mapping(kind: Any, mapping: Any, where: str) -> Any:
    """An instance of the dataclass ``kind`` from a mapping of its fields; ``where`` names the mapping in messages.

    Raises:
        TypeError: it is no mapping.
        ValueError: a key is unknown or missing.
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{where} must be a mapping of settings; got {shown(mapping)}")
    known = [field.name for field in fields(kind)]
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in mapping]:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    return kind(**mapping)


def check_fields(settings: Any) -> None:
    """Check the types of a frozen dataclass's fields, and bring sequences to tuples and numbers to floats.

    A text such as ``"1e-5"`` counts as a float where one belongs: YAML 1.1 reads an exponent without a point as text.

    Raises:
        TypeError: a field has a value of another type; the message names the field.
    """
    for field in fields(settings):
        kinds = field.type.split(" | ")
        converters = [_CONVERTERS[kind] for kind in kinds if kind in _CONVERTERS]
        if len(converters) < len(kinds):
            continue  # a field of its own kind, which the dataclass checks itself
        value = getattr(settings, field.name)
        found = [converted for convert in converters if (converted := convert(value)) is not _NO]
        if not found:
            raise TypeError(f"{field.name} must be {_spelled(kinds)}; got {shown(value)}")
        object.__setattr__(settings, field.name, found[0])


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}; got {shown(value)}{did_you_mean(value, choices)}"
        )


def check_range(name: str, value: float, least: float, below: float = float("inf")) -> None:
    """Raise ValueError unless ``least <= value < below``."""
    if not least <= value < below:
        limits = f"at least {least:g}" if below == float("inf") else f"in [{least:g}, {below:g})"
        raise ValueError(f"{name} must be {limits}; got {value:g}")


def shown(value: Any) -> str:
    """A value in short, for a message."""
    return _SHORT.repr(value)


def did_you_mean(word: Any, choices: Sequence[str]) -> str:
    """What to append to a message: the choice that is spelled most like the word, if one is."""
    close = difflib.get_close_matches(word, choices, n=1) if isinstance(word, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


_NO = object()


def _int(value: Any) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) else _NO


def _float(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return _NO
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else _NO


def _ints(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence) or any(_int(entry) is _NO for entry in value):
        return _NO
    return tuple(value)


_CONVERTERS = {
    "int": _int,
    "float": _float,
    "bool": lambda value: value if isinstance(value, bool) else _NO,
    "str": lambda value: value if isinstance(value, str) else _NO,
    "Sequence[int]": _ints,
    "None": lambda value: value if value is None else _NO,
}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Sequence[int]": "a list of whole numbers",
    "None": "none",
}


def _spelled(kinds: Sequence[str]) -> str:
    return " or ".join(_WORDS[kind] for kind in kinds)
