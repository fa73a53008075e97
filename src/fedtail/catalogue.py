"""What there is, by name: read from sources and registries without importing torch."""

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Literal

from fedtail.algorithms import ALGORITHMS
from fedtail.errors import ConfigError

Kind = Literal["algorithms", "models", "datasets", "partitions"]


def listing(what: Kind) -> dict[str, str]:
    """Returns a line for each known name of a kind."""
    if what == "algorithms":
        return {name: _first_line(ast.get_docstring(_source(target))) for name, target in ALGORITHMS.items()}
    if what == "models":
        from fedtail.models.specs import MODELS

        return {name: _first_line(spec.__doc__) for name, spec in MODELS.items()}
    if what == "datasets":
        from fedtail.data.catalog import REGISTRY

        return {name: entry.summary for name, entry in REGISTRY.items()}
    from fedtail.data.partition import PARTITIONS

    return {name: _first_line(spec.__doc__) for name, spec in PARTITIONS.items()}


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _source(target: str) -> ast.Module:
    """Parses the source of "module:Class" without importing it."""
    spec = importlib.util.find_spec(target.partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text())


def option_docs(cls: ast.ClassDef) -> list[tuple[str, str, str]]:
    """Returns (name, default, description) of the fields of a dataclass: a string below a field describes it."""
    found: list[tuple[str, str, str]] = []
    for field, below in zip(cls.body, [*cls.body[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if not ast.unparse(field.annotation).startswith("ClassVar"):  # a declaration, no option
            text = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = inspect.cleandoc(str(below.value.value))
            found.append((field.target.id, ast.unparse(field.value) if field.value else "", text))
    return found


def show(name: str) -> str:
    """Returns an algorithm's page: citation, equations, differences, options.

    Raises:
        ConfigError: there is no such algorithm.
    """
    if name in ALGORITHMS:
        module, class_name = _source(ALGORITHMS[name]), ALGORITHMS[name].partition(":")[2]
    else:
        from fedtail.algorithm import Algorithm
        from fedtail.config import resolve

        cls = resolve(Algorithm, name)
        file = inspect.getsourcefile(cls)
        if file is None:
            raise ConfigError(f"the source of {name!r} cannot be found.")
        module, class_name = ast.parse(Path(file).read_text()), cls.__name__
    node = next(n for n in ast.walk(module) if isinstance(n, ast.ClassDef) and n.name == class_name)
    options = [f"  {field:20}{default:16}{text}" for field, default, text in option_docs(node)]
    shared = "  optimizer           SGD()           What a client steps with (every algorithm has it)."
    return "\n".join(
        [ast.get_docstring(module) or "", "", f"Options of {name} (name, default, meaning):", shared, *options]
    )
