"""Classes in a user's own file, named "file.py:Name"."""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from fedtail.errors import ConfigError


def split_target(target: str) -> tuple[str, str]:
    """Cut "file.py:Name" in two.

    Args:
        target: Path of a Python file, a colon, and a name defined in that file.

    Returns:
        The path and the name.

    Raises:
        ConfigError: The form is another one.

    >>> split_target("nets/wide.py:WideNet")
    ('nets/wide.py', 'WideNet')
    """
    # From the right: a Windows path has a colon of its own.
    path, _, name = target.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"a class of your own is given as 'file.py:Name', got '{target}'.")
    return path, name


def user_module(path: Path) -> str:
    """Returns the module name of a user's file: it depends on the path alone, so that another process finds it again."""
    return "fedtail_user_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]


def run_file(what: str, target: str, path: Path) -> ModuleType:
    """Runs a user's file as a module of a name that no other file has.

    Args:
        what: "model" or "algorithm", for messages.
        target: "file.py:Name", for messages.
        path: the file.

    Raises:
        ConfigError: there is no such file, or it fails.
    """
    if not path.is_file():
        raise ConfigError(
            f"{what} '{target}': there is no file {path}. A relative path starts at the working directory, {Path.cwd()}."
        )
    # An algorithm's classes must stay the same objects, also when the file's network is loaded anew.
    name = user_module(path) if what == "algorithm" else f"{user_module(path)}_{what}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a path that ends in .py always has both
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints in the file look their own module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{what} '{target}': the file {path} could not be run: {describe_error(error, path)}."
        ) from error
    return module


def describe_error(error: Exception, path: Path) -> str:
    """Returns the error and the last line of the user's file that it passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f" (line {lines[-1]} of {path})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"
