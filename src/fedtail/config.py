"""The experiment as one tree of frozen dataclasses, and its TOML form.

Where a field can hold one of several classes, the TOML table has a key `name` that picks it from a registry, for example
`[algorithm] name = "fedprox"`. Unknown keys and names are errors that name the nearest known one.
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from fedtail.algorithm import Algorithm
from fedtail.algorithms import ALGORITHMS
from fedtail.algorithms.fedavg import FedAvg
from fedtail.data.augment import Augmentation
from fedtail.data.longtail import LONGTAILS, Exponential, LongTail
from fedtail.data.partition import PARTITIONS, DirichletMultinomial, Partition
from fedtail.data.plan import LocalWork, Participation
from fedtail.engines import EngineOptions
from fedtail.errors import ConfigError, did_you_mean
from fedtail.evaluate import Evaluation
from fedtail.losses import LOSSES, Loss
from fedtail.metrics import GROUP_RULES, GroupRule
from fedtail.models.specs import MLP, MODELS, ModelSpec, UserModel
from fedtail.optim import OPTIMIZERS, Optimizer
from fedtail.schedule import SCHEDULES, Constant, Schedule
from fedtail.teachers.specs import TEACHERS, NoTeacher, Teacher
from fedtail.userfile import run_file, split_target, user_module


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which examples, cut how, given to whom."""

    name: str = "digits"
    """A known data set (fedtail list datasets), an .npz file or a folder of images."""
    folder: str = ""
    """Where its files are; empty: fedtail's cache ($FEDTAIL_DATA)."""
    longtail: LongTail = Exponential(factor=10.0)
    """The cut that makes the union long-tailed."""
    partition: Partition = DirichletMultinomial(clients=8, alpha=0.5)
    """Who holds what."""
    normalise: bool = True
    """Inputs have mean 0 and deviation 1 by channel; false: they are scaled to 0..1 alone, as in FedGA's experiments."""
    augmentation: Augmentation = "none"
    """Random crop (padding 4) and flip of training images."""
    validation: int = 0
    """Images of each class kept out of training for model selection, taken before the long-tail cut."""
    server: int = 0
    """Images of each class given to the server, taken before the long-tail cut; for methods that have server data."""
    server_from: str = ""
    """A data set whose training images, without labels, the server gets: `server` for each class; empty: held out."""
    client_validation: float = 0.0
    """Share of each client's examples that it keeps out of training for methods that validate there, in [0, 1)."""
    image_size: int = 0
    """Height and width that images in files of their own are resized to; 0 = a folder's common size, 224 for lists, 64 for
    tiny_imagenet."""
    cache_mib: int = 1024
    """Most MiB of decoded images to remember, for sets that are decoded when they are used."""
    decode_threads: int = 0
    """Threads that decode them; 0 = as many as there are cores."""

    def __post_init__(self) -> None:
        if min(self.image_size, self.cache_mib, self.decode_threads) < 0:
            raise ConfigError("data.image_size, data.cache_mib and data.decode_threads must be >= 0, got "
                              f"{self.image_size}, {self.cache_mib} and {self.decode_threads}.")  # fmt: skip
        if self.validation < 0 or self.server < 0:
            raise ConfigError(f"data.validation and data.server must be >= 0, got {self.validation} and {self.server}.")
        if not 0 <= self.client_validation < 1:
            raise ConfigError(f"data.client_validation must be in [0, 1), got {self.client_validation}.")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that determines a run."""

    seed: int = 0
    """Determines every random number of the run, >= 0."""
    rounds: int = 20
    """Number of rounds, >= 1."""
    teacher: Teacher = NoTeacher()
    """A frozen network that methods distil from; its outputs are computed once."""
    start: str = ""
    """Folder of a finished run whose generic model is the initial one ("{seed}" stands for the seed); empty: none."""
    algorithm: Algorithm = FedAvg()
    """The method."""
    data: Data = Data()
    """The federation's data."""
    model: ModelSpec = MLP()
    """The network."""
    local: LocalWork = LocalWork()
    """A client's work in a round."""
    participation: Participation = Participation()
    """Who takes part."""
    schedule: Schedule = Constant()
    """The learning rate over rounds."""
    evaluation: Evaluation = Evaluation()
    """When and how the model is judged."""
    engine: EngineOptions = EngineOptions()
    """How a cohort is computed."""
    checkpoint_every: int = 1
    """Rounds between two checkpoints, >= 1; a killed run repeats the rounds since the last one."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters and inputs."""
    autocast: bool = False
    """Runs the network in bfloat16 where torch's autocast does so: faster on some machines, other results."""
    device: str = "cpu"
    """Where training happens: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        if self.seed < 0 or self.rounds < 1 or self.checkpoint_every < 1:
            raise ConfigError("seed must be >= 0, rounds and checkpoint_every >= 1; "
                              f"got {self.seed}, {self.rounds}, {self.checkpoint_every}.")  # fmt: skip
        if self.autocast and self.dtype == "float64":
            raise ConfigError('autocast makes bfloat16 of float32, not of dtype = "float64". Set one of the two.')
        if self.evaluation.keep == "best" and not self.data.validation:
            raise ConfigError('evaluation.keep = "best" needs a validation split: set data.validation, for example 20.')
        judged = self.evaluation
        if self.algorithm.generative and (judged.keep == "best" or judged.local_models or judged.finetune.epochs):
            raise ConfigError("evaluation.keep, local_models and finetune judge predictions, and "
                              f"{name_of(self.algorithm)} makes images. Leave them at their defaults.")  # fmt: skip


REGISTRIES: dict[type, Mapping[str, Any]] = {
    Algorithm: ALGORITHMS,
    Optimizer: OPTIMIZERS,
    Loss: LOSSES,
    LongTail: LONGTAILS,
    Partition: PARTITIONS,
    ModelSpec: MODELS,
    GroupRule: GROUP_RULES,
    Schedule: SCHEDULES,
    Teacher: TEACHERS,
}
"""For each abstract field type, the names that a configuration may use."""
SWEEP = {"row", "rows", "base", "grid"}
"""Keys that say that a file is meant as a sweep (fedtail.sweep): an experiment has none of them."""


def resolve(base: type, name: str) -> type:
    """Returns the class behind a name, or behind "file.py:Name" for a user's own algorithm."""
    registry = REGISTRIES[base]
    if name in registry:
        target = registry[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return target
    if base is Algorithm and ".py:" in name:
        return user_class(name)
    words: dict[type, str] = {ModelSpec: "model", LongTail: "longtail", GroupRule: "groups"}
    what = words.get(base, base.__name__.lower())
    hint = did_you_mean(name, registry)
    own = ', and "file.py:Name" for your own' if base in (Algorithm, ModelSpec) else ""
    raise ConfigError(f"unknown {what} {name!r}{hint} Known are {', '.join(registry)}{own}.")


def user_class(target: str) -> type:
    """Imports "file.py:Name", a user's own Algorithm, under a module name that depends on the path alone."""
    path, attribute = split_target(target)
    file = Path(path).resolve()
    module = sys.modules.get(user_module(file)) or run_file("algorithm", target, file)
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError(f"algorithm: {file} has no Algorithm named {attribute!r}.")
    found.fedtail_name = target  # type: ignore[attr-defined]
    return found


def name_of(value: object) -> str | None:
    """Returns the configuration name of a polymorphic value, None for a plain dataclass."""
    if isinstance(value, UserModel):
        return value.target
    for base, registry in REGISTRIES.items():
        if isinstance(value, base):
            cls = type(value)
            named = {n: t if isinstance(t, str) else f"{t.__module__}:{t.__qualname__}" for n, t in registry.items()}
            own = f"{cls.__module__}:{cls.__qualname__}"
            return next((n for n, t in named.items() if t == own), None) or _own_name(cls)
    return None


def _own_name(cls: type) -> str:
    """Returns "file.py:Name" of a user's class, however it was imported."""
    if hasattr(cls, "fedtail_name"):
        return cls.fedtail_name  # type: ignore[attr-defined]
    try:
        return f"{inspect.getsourcefile(cls)}:{cls.__qualname__}"
    except TypeError:  # typed into a prompt: it works, but cannot be found again
        return f"{cls.__module__}:{cls.__qualname__}"


def to_dict(value: Any) -> Any:
    """Returns a tree of plain values; polymorphic nodes carry their `name`; None is left out (TOML has none)."""
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}  # type: ignore[misc]
    if not dataclasses.is_dataclass(value):
        return [to_dict(v) for v in value] if isinstance(value, tuple | list) else value
    name = name_of(value)
    fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, UserModel):
        del fields["target"]
    plain = {k: v for k, v in fields.items() if v is not None}
    return {"name": name, **plain} if name else plain


def from_dict(cls: type, table: Mapping[str, Any], where: str = "") -> Any:
    """Builds a dataclass from plain values.

    Args:
        cls: the dataclass, or the abstract type of a polymorphic field.
        table: its fields; a polymorphic node needs `name`.
        where: the dotted path, for messages.

    Raises:
        ConfigError: an unknown key or name, a wrong type, an impossible value.
    """
    table, polymorphic = dict(table), cls in REGISTRIES
    if polymorphic:
        name = table.pop("name", None)
        if not isinstance(name, str):
            got = "is missing" if name is None else f"must be a string, got {name!r}"
            raise ConfigError(f"{where}: the key `name` {got}. Known names are {', '.join(REGISTRIES[cls])}.")
        if cls is ModelSpec and ".py:" in name:
            table["target"] = name
            cls = UserModel
        else:
            cls = resolve(cls, name)
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    path = f"{where}." if where else ""
    for key in table:
        if key not in known:
            words = [*(["name"] if polymorphic else []), *known]
            raise ConfigError(f"unknown option {path + key!r}{did_you_mean(key, words)} Known are {', '.join(words)}.")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]  # both are MISSING
    if missing := [key for key in required if key not in table]:
        raise ConfigError(f"option {path + missing[0]!r} is missing, and has no default. Add it to the file.")
    values = {k: _value(known[k], v, path + k) for k, v in table.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """Checks and converts one plain value to a field's type."""
    if isinstance(hint, type) and (hint in REGISTRIES or dataclasses.is_dataclass(hint)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}.")
        return from_dict(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}; got {value!r}.")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}.")
        return {k: _value(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}. Write [{value!r}] for a list of one.")
        return origin(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is Any:
        return value
    kind: type = next(a for a in (*arguments, hint) if a is not type(None))  # of "int | None": int
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, accepted):
        raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r}.")
    return float(value) if kind is float else value


def read_toml(file: Path) -> dict[str, Any]:
    """Returns the table of a TOML file.

    Raises:
        ConfigError: no such file, not UTF-8, or not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the experiment {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not a text file in UTF-8: {error.reason} at byte {error.start}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}.") from error


def load(path: str | Path) -> Experiment:
    """Reads an experiment from a TOML file or from a run folder's config.toml.

    Raises:
        ConfigError: no such file, not TOML, or wrong content.
    """
    file = Path(path)
    file = file / "config.toml" if file.is_dir() else file
    table = read_toml(file)
    if SWEEP & table.keys():
        raise ConfigError(f"{file} is a sweep, not one experiment. `fedtail run {file} --dry-run` lists its run folders; each "
                          "one that is there can stand in its place.")  # fmt: skip
    try:
        return from_dict(Experiment, merged(to_dict(Experiment()), table))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def merged(default: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Lays a table over the defaults; where it picks another `name`, that node's own defaults hold instead."""
    out = dict(default)
    for key, value in table.items():
        below = default.get(key)
        other = isinstance(value, Mapping) and "name" in value and key not in ("data", "engine")
        nested = isinstance(value, Mapping) and isinstance(below, Mapping) and not other
        out[key] = merged(below, value) if nested else value  # type: ignore[arg-type]
    return out


def shared(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns what an algorithm takes over from the options of another one: the classes that both have (optimizer, loss)."""
    hints = get_type_hints(resolve(Algorithm, name))
    return {key: value for key, value in options.items() if hints.get(key) in REGISTRIES}


def pick_names(table: dict[str, Any], arguments: list[str]) -> list[str]:
    """Takes `--algorithm.name fedprox` and its like out of command-line arguments and applies them to a table.

    Of an algorithm that is replaced, the options that are classes (see `shared`) are kept.

    Returns:
        The remaining arguments.
    """
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        path = flag.removeprefix("--").split(".")
        node: Any = table
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        polymorphic = isinstance(node, dict) and "name" in node and path[:-1] != ["data"] and path[:-1] != ["engine"]
        if not (flag.startswith("--") and path[-1] == "name" and polymorphic):
            rest.append(word)
            continue
        name = value if equals else next(words, "")
        if name != node["name"]:
            kept = shared(node, name) if path == ["algorithm", "name"] else {}
            node.clear()
            node.update({"name": name, **kept})
    return rest


def dumps(experiment: Experiment) -> str:
    """Returns the TOML text of an experiment, complete with every default."""
    return tomli_w.dumps(to_dict(experiment))


def fingerprint(experiment: Experiment | Mapping[str, Any]) -> str:
    """Returns a hash of everything that determines the run, of an experiment or of the table in a run folder's config.toml.

    The two are equal but where the run is older than an option: its table, and so the hash in its checkpoints, lacks it.
    """
    table = to_dict(experiment) if isinstance(experiment, Experiment) else experiment
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
