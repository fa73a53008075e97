"""What there is, by name: read from sources and registries without importing torch."""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Literal

from fedtail.algorithms import ALGORITHMS
from fedtail.errors import ConfigError

Kind = Literal["algorithms", "losses", "models", "teachers", "datasets", "partitions"]


def listing(what: Kind) -> dict[str, str]:
    """Returns a line for each known name of a kind."""
    if what == "algorithms":
        return {name: _first_line(ast.get_docstring(_source(target))) for name, target in ALGORITHMS.items()}
    if what == "losses":
        return {name: _first_line(ast.get_docstring(_class(_source(t), t))) for name, t in _losses().items()}
    if what == "models":
        from fedtail.models.specs import MODELS

        return {name: _first_line(spec.__doc__) for name, spec in MODELS.items()}
    if what == "teachers":
        from fedtail.teachers.specs import TEACHERS

        return {name: _first_line(spec.__doc__) for name, spec in TEACHERS.items()}
    if what == "datasets":
        from fedtail.data.catalog import REGISTRY

        return {name: entry.summary for name, entry in REGISTRY.items()}
    from fedtail.data.partition import PARTITIONS

    return {name: _first_line(spec.__doc__) for name, spec in PARTITIONS.items()}


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _source(target: str) -> ast.Module:
    """Parses the source of "module:Class" without importing it, nor the package that it is in."""
    path = Path(__file__).parent.joinpath(*target.partition(":")[0].split(".")[1:])
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def _class(module: ast.Module, target: str) -> ast.ClassDef:
    """Finds the class that "module:Class" names in its parsed module."""
    name = target.partition(":")[2]
    return next(n for n in ast.walk(module) if isinstance(n, ast.ClassDef) and n.name == name)


def _losses() -> dict[str, str]:
    """Reads the registry of losses, whose module imports torch, from its source."""
    body = _source("fedtail.losses:Loss").body
    return next(
        ast.literal_eval(n.value)
        for n in body
        if isinstance(n, ast.AnnAssign) and n.value and ast.unparse(n.target) == "LOSSES"
    )


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
    """Returns an algorithm's or a loss's page: citation, equations, differences, options; both for a name of both.

    Raises:
        ConfigError: there is no such algorithm and no such loss.
    """
    shared = {"optimizer": ("SGD()", "What a client steps with (every algorithm has it).")}
    pages: list[str] = []
    if name in ALGORITHMS:
        module = _source(ALGORITHMS[name])
        pages.append(_page(name, ast.get_docstring(module), [_class(module, ALGORITHMS[name])], shared))
    if (target := _losses().get(name)) is not None:
        node = _class(_source(target), target)
        also = f"The loss {name}, for other algorithms:\n\n" if pages else ""
        pages.append(also + _page(name, ast.get_docstring(node), [node], {}))
    if pages:
        return "\n\n".join(pages)
    from fedtail.algorithm import Algorithm
    from fedtail.config import resolve

    cls = resolve(Algorithm, name)
    line = [base for base in cls.__mro__ if dataclasses.is_dataclass(base) and base is not Algorithm]
    modules = [_written(base, name) for base in line]
    nodes = [_class(module, f":{base.__name__}") for module, base in zip(modules, line, strict=True)]
    return _page(name, ast.get_docstring(modules[0]), nodes[::-1], shared)


def _written(cls: type, name: str) -> ast.Module:
    """Parses the file that defines a class of a user."""
    file = inspect.getsourcefile(cls)
    if file is None:
        raise ConfigError(f"the source of {name!r} cannot be found.")
    return ast.parse(Path(file).read_text())


def _page(name: str, text: str | None, line: list[ast.ClassDef], shared: dict[str, tuple[str, str]]) -> str:
    """Returns a text and the table of a class's options, those that it inherits first; `line` ends with the class."""
    known = dict(shared)
    for field, default, meaning in (option for cls in line for option in option_docs(cls)):
        known[field] = (default, meaning or known.get(field, ("", ""))[1])
    options = [f"  {field:20}{default:15} {meaning}" for field, (default, meaning) in known.items()]
    found = [n for cls in line for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "shares_counts"]
    revealed = [f"Clients reveal their class counts: {_first_line(ast.get_docstring(n))}" for n in found[-1:]]
    head = f"Options of {name} (name, default, meaning):" if options else f"{name} has no options."
    return "\n".join([text or "", "", head, *options, *revealed])
