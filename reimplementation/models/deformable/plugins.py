"""Modules within the module that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .key_points import (
    Sparse4DBox3DKeyPointsGenerator,
    SparseBox3DKeyPointsGenerator,
    SparsePoint3DKeyPointsGenerator,
)

PLUGINS: dict[str, Callable[..., nn.Module]] = {
    "SparseBox3DKeyPointsGenerator": SparseBox3DKeyPointsGenerator,
    "SparsePoint3DKeyPointsGenerator": SparsePoint3DKeyPointsGenerator,
    "Sparse4DBox3DKeyPointsGenerator": Sparse4DBox3DKeyPointsGenerator,
}


def build(
    argument: str,
    config: Mapping | nn.Module,
    defaults: Mapping | None = None,
    overrides: Mapping | None = None,
) -> nn.Module:
    """The module that a dict describes; the dict itself is left alone. A module is returned as it is.

    Args:
        argument: what errors call it.
        config: the module, or its arguments with its class, or the name of one of `PLUGINS`, under ``"type"``.
        defaults: arguments that the dict need not hold.
        overrides: arguments that hold whatever the dict says.

    Raises:
        TypeError: it is neither a module nor a dict with a type.
        ValueError: there is no plugin of that name.
    """
    if isinstance(config, nn.Module):
        return config
    if not isinstance(config, Mapping) or "type" not in config:
        raise TypeError(f"{argument} must be an nn.Module, or a dict with the key 'type'; got {config!r}")
    settings = {**(defaults or {}), **config, **(overrides or {})}
    plugin = settings.pop("type")
    if isinstance(plugin, str):
        if plugin not in PLUGINS:
            raise ValueError(f"{argument}['type'] must be a class or one of {', '.join(PLUGINS)}; got {plugin!r}")
        plugin = PLUGINS[plugin]
    return plugin(**settings)
