"""A network of the user's own: load it from a file, call it with what it asks for, and find its classifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from fedtail.errors import ConfigError, did_you_mean
from fedtail.userfile import describe_error, run_file, split_target


def load_model(target: str, input_shape: tuple[int, ...], num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Load a class or function from a file and make a network with it.

    It is called with keyword arguments only: those of `input_shape`, `num_classes` and `in_channels` (the first axis of
    an example) that its signature accepts, and all options. A signature with **kwargs accepts everything. Layers of
    `torch.nn.Dropout` stay as they are; see `fedtail.models.layers.replace_dropout`.

    Args:
        target: "file.py:Name", the path relative to the working directory; Name is a class derived from
            torch.nn.Module, or a callable that returns a module. The file is run anew on each call.
        input_shape: Shape of one example.
        num_classes: C, number of logits.
        options: Further keyword arguments.

    Returns:
        The module.

    Raises:
        ConfigError: No such file or name, a file or a constructor that fails, an option that is unknown or missing, or
            something that is not a network; the message says which.
    """
    path_text, name = split_target(target)
    path = Path(path_text).expanduser().resolve()
    factory = _factory(target, run_file("model", target, path), name)
    known = {"input_shape": input_shape, "num_classes": num_classes, "in_channels": input_shape[0]}
    arguments = _arguments(target, factory, known, options)
    try:
        model = factory(**arguments)
    except Exception as error:
        raise ConfigError(f"model '{target}' could not be built: {describe_error(error, path)}.") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model '{target}' returned a {type(model).__name__}, not a torch.nn.Module. "
            "Name a class derived from torch.nn.Module, or a function that returns a module."
        )
    return model


def find_classifier(module: nn.Module, num_classes: int) -> str | None:
    """The name of the linear layer that gives the logits.

    Args:
        module: Any network.
        num_classes: C, number of logits.

    Returns:
        What the module's attribute `classifier` says, if that is a string that names an `nn.Linear`; else "head", if
        that is an `nn.Linear` with C outputs; else the last registered `nn.Linear` with C outputs; else None.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    declared: object = getattr(module, "classifier", None)
    if isinstance(declared, str) and declared in linear:
        return declared
    fitting = [name for name, layer in linear.items() if layer.out_features == num_classes]
    if "head" in fitting:
        return "head"
    return fitting[-1] if fitting else None


def _factory(target: str, module: ModuleType, name: str) -> Callable[..., object]:
    """What the user named: a class derived from nn.Module, or another callable that is not a class."""
    found: object = getattr(module, name, None)
    if found is None:
        networks = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
        ]
        raise ConfigError(
            f"model '{target}': {module.__file__} has no '{name}'{did_you_mean(name, networks)} "
            f"Networks there: {', '.join(networks) or 'none'}."
        )
    is_factory = issubclass(found, nn.Module) if isinstance(found, type) else callable(found)
    # A network that the file has already built is callable too, but each run needs a fresh one.
    if not is_factory or isinstance(found, nn.Module):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise ConfigError(
            f"model '{target}' is {what}, not a network. "
            "Name a class derived from torch.nn.Module, or a function that returns a module."
        )
    return cast("Callable[..., object]", found)


def _arguments(
    target: str, factory: Callable[..., object], known: Mapping[str, object], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments for the factory: what it accepts of `known`, and all options."""
    parameters = inspect.signature(factory).parameters.values()
    by_name = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option in known:
            raise ConfigError(f"model '{target}': option '{option}' comes from the data set. Leave it out.")
        if option not in by_name and not accepts_all:
            near = did_you_mean(option, [name for name in by_name if name not in known])
            raise ConfigError(f"model '{target}' has no option '{option}'{near}")
    arguments = {key: value for key, value in known.items() if key in by_name or accepts_all} | dict(options)
    missing = [p.name for p in by_name.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ConfigError(
            f"model '{target}' needs {', '.join(missing)}, which fedtail does not supply. "
            "Give them as options, or give them a default."
        )
    return arguments
