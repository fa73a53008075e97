"""What users and contributors may rely on: the public names, who imports whom, and what is imported at all."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedtail
from fedtail import config
from fedtail.algorithm import Algorithm
from fedtail.optim import Optimizer

SOURCE = Path(fedtail.__file__).parent

# From the bottom to the top: a module imports from its own layer or from lower ones.
LAYERS = [
    {"errors", "seeds", "trees", "files", "schedule", "metrics", "quality", "optim", "userfile", "states", "checkpoint",
     "stopping", "quantiles"},
    {"models", "teachers", "teachers.specs", "models.specs", "models.branches", "models.gan", "models.layers",
     "models.small", "models.resnet", "models.user"},
    {"task"},
    {"affine", "algorithm", "costs", "distillation", "drift", "etf", "gan", "geometry", "heads", "local", "losses",
     "losses.alignment", "losses.base", "losses.logits", "losses.weighted", "transplant"},
    {"algorithms", "algorithms.fedavg", "algorithms.fedprox", "algorithms.scaffold", "algorithms.fedgrab",
     "algorithms.climb", "algorithms.fedrl", "algorithms.eqlv2", "algorithms.lightweight",
     "algorithms.fednova", "algorithms.fedopt", "algorithms.feddyn",
     "algorithms.crt", "algorithms.ccvr", "algorithms.creff", "algorithms.posthoc", "algorithms.fedloge",
     "algorithms.fedga", "algorithms.fedlc", "algorithms.fedrs", "algorithms.fedntd", "algorithms.moon",
     "algorithms.feddecorr", "algorithms.fedsam",
     "algorithms.fedper", "algorithms.fedrep", "algorithms.lg_fedavg", "algorithms.fedbn", "algorithms.fedbabu",
     "algorithms.fedetf",
     "algorithms.server_distillation", "algorithms.client_distillation", "algorithms.feddf", "algorithms.fedmd",
     "algorithms.fedgan", "algorithms.effgan", "algorithms.mdgan", "algorithms.uagan",
     "algorithms.ditto", "algorithms.pfedme", "algorithms.apfl", "algorithms.fedrod", "algorithms.fedproto"},
    {"data", "data.augment", "data.base", "data.catalog", "data.dataset", "data.dirichlet", "data.entries",
     "data.federated", "data.fetch", "data.formats", "data.hub", "data.images", "data.lazy", "data.legacy",
     "data.longtail", "data.members", "data.partition", "data.plan", "data.skews", "data.statistics",
     "data.svhn"},
    {"teachers.heads", "teachers.loading", "teachers.store"},
    {"engines", "engines.base", "engines.choice", "engines.distributed", "engines.local_models",
     "engines.loop", "engines.parallel", "engines.processes", "engines.vmap"},
    {"personalise", "evaluate"},
    {"config"},
    {"extractors", "federation", "generation", "runs"},
    {"experiment", "teaching"},
    {"flower", "flower.tls", "flower.wire", "flower.privacy", "flower.roster", "flower.engine", "flower.sites", "flower.node",
     "flower.server", "flower.deploy"},
    {"assessment", "catalogue", "course", "export", "methods", "report", "drawing", "overview", "plots", "asymmetry", "html",
     "inspection", "terminal", "demo", "tracking", "sweep", "tables", "watch", "workers", "student", "checks", "checks.agree",
     "checks.copes", "checks.pair", "checks.problems", "checks.pure", "checks.returns", "checks.rule", "checks.source"},
    {"cli", "options", "verbs", "__main__"},
]  # fmt: skip
LAYER = {f"fedtail.{name}": i for i, layer in enumerate(LAYERS) for name in layer}

# Every package that is not the standard library's, and the only modules that may import it; None: any.
PACKAGES = {
    "torch": None,
    "numpy": None,
    "safetensors": {
        "checkpoint",
        "etf",
        "export",
        "extractors",
        "states",
        "teachers.loading",
        "teachers.store",
        "teaching",
    },
    "tomli_w": {"config", "flower.deploy"},
    "PIL": {"data.formats", "data.images", "generation"},
    "tyro": {"cli", "options", "verbs"},
    "rich": {"tables", "inspection", "terminal"},
    "matplotlib": {"drawing", "overview", "plots", "html", "asymmetry"},
}


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(tree):
    """Yields (imported module, whether only when a function runs or for type checkers) of all import statements."""

    def visit(node, lazy):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield (whole if whole in MODULES else child.module), lazy
            later = isinstance(child, ast.FunctionDef) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            yield from visit(child, lazy or later)

    yield from visit(tree, False)


# Public names ---------------------------------------------------------------------------------------------------------


def order(name):
    """CONSTANTS, then Classes, then functions, each by name (what ruff's RUF022 wants)."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_complete_sorted_and_small():
    assert fedtail.__all__ == sorted(set(fedtail.__all__), key=order)
    assert set(fedtail.__all__) == set(fedtail._WHERE)
    assert len(fedtail.__all__) <= 40
    assert dir(fedtail) == sorted([*fedtail.__all__, "__version__"])
    with pytest.raises(AttributeError, match="has no attribute 'FedAverage'"):
        fedtail.FedAverage  # noqa: B018


def test_type_checkers_see_the_same_names():
    [block] = [n for n in TREES["fedtail"].body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"fedtail.{where}" for name, where in fedtail._WHERE.items()}


@pytest.mark.parametrize("name", fedtail.__all__)
def test_every_public_name_exists_and_is_documented(name):
    found = getattr(fedtail, name)
    assert found.__module__ == f"fedtail.{fedtail._WHERE[name]}" or found.__module__.startswith(
        f"fedtail.{fedtail._WHERE[name]}."
    )
    text = vars(found).get("__doc__") if isinstance(found, type) else found.__doc__
    assert text
    assert not text.startswith(f"{name}("), "a generated docstring says nothing"
    if isinstance(found, type):
        for key, member in vars(found).items():
            if inspect.isfunction(member) and not key.startswith("_") and member.__qualname__.startswith(name):
                assert member.__doc__, f"{name}.{key}"


def test_the_version_is_that_of_the_package():
    with open(SOURCE.parents[1] / "pyproject.toml", "rb") as file:
        assert fedtail.__version__ == tomllib.load(file)["project"]["version"]


def options():
    """All classes whose fields are options of an experiment."""
    found = [
        config.Experiment,
        config.Data,
        config.Participation,
        config.Evaluation,
        fedtail.Finetune,
        fedtail.LocalWork,
        fedtail.EngineOptions,
    ]
    for base, registry in config.REGISTRIES.items():
        found += [config.resolve(base, name) for name in registry]
    return found


@pytest.mark.parametrize("cls", options(), ids=lambda c: c.__name__)
def test_every_option_is_frozen_documented_and_keyword_only(cls):
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    for owner in (c for c in cls.__mro__ if c.__module__.startswith("fedtail")):
        node = next(n for n in TREES[owner.__module__].body if isinstance(n, ast.ClassDef) and n.name == owner.__name__)
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                documented = (
                    isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)
                    and isinstance(below.value.value, str)
                )
                assert documented, f"{owner.__name__}.{ast.unparse(field.target)}"


@pytest.mark.parametrize("base", [b for b in config.REGISTRIES if b is not Optimizer], ids=lambda b: b.__name__)
def test_a_registry_names_classes_of_its_kind(base):
    for name in config.REGISTRIES[base]:
        cls = config.resolve(base, name)
        assert issubclass(cls, base)
        assert name == name.lower()
        assert config.name_of(cls()) == name


# Who imports whom -----------------------------------------------------------------------------------------------------


def test_every_module_has_its_layer():
    assert set(MODULES) - {"fedtail"} == set(LAYER), "put a new module in LAYERS, as low as it belongs"


@pytest.mark.parametrize("name", [m for m in MODULES if m != "fedtail"])
def test_imports_point_downwards(name):
    for imported, lazy in imports(TREES[name]):
        if imported.startswith("fedtail."):
            assert LAYER[imported] <= LAYER[name], f"{name} imports {imported}, which is above it"
        elif imported == "fedtail":
            assert lazy, f"{name} imports the package itself"
            assert LAYER[name] == len(LAYERS) - 1, f"{name} imports the package itself"


@pytest.mark.parametrize("name", MODULES)
def test_packages_are_imported_where_they_belong(name):
    for imported, lazy in imports(TREES[name]):
        top = imported.partition(".")[0]
        if top == "fedtail" or top in sys.stdlib_module_names:
            assert top not in ("pickle", "shelve", "random"), f"{name} imports {top}"
            continue
        assert top in PACKAGES, f"{name} imports {top}, which is no dependency"
        allowed = PACKAGES[top]
        assert allowed is None or name.removeprefix("fedtail.") in allowed, f"{name} imports {top}"
        assert top != "matplotlib" or lazy, f"{name} imports matplotlib before it draws"


def test_every_dependency_is_declared():
    with open(SOURCE.parents[1] / "pyproject.toml", "rb") as file:
        declared = {d.partition(">=")[0].replace("-", "_") for d in tomllib.load(file)["project"]["dependencies"]}
    assert declared == {"pillow" if name == "PIL" else name for name in PACKAGES}


def loaded_after(code):
    """The packages of PACKAGES that a fresh process has imported after some code."""
    script = f"{code}\nimport sys\nprint([p for p in {list(PACKAGES)} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_importing_fedtail_imports_nothing():
    assert loaded_after("import fedtail; dir(fedtail)") == set()
    assert loaded_after("from fedtail.algorithms import ALGORITHMS; from fedtail.models import MODELS") == set()


def test_an_experiment_needs_no_picture_and_no_terminal():
    assert loaded_after("import fedtail; fedtail.run").isdisjoint({"matplotlib", "rich", "tyro"})


# Rules for algorithms -------------------------------------------------------------------------------------------------

METHODS = [name for name in MODULES if name.startswith("fedtail.algorithms.")]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_the_rules(name):
    """Final, no base but Algorithm, no super(), no torch.func or autograd of its own, nothing read off a tensor."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute):
            assert node.attr not in (
                "item",
                "tolist",
                "numpy",
                "backward",
                "autograd",
                "func",
                "manual_seed",
                "no_grad",
            ), ast.unparse(node)
        if isinstance(node, ast.Name):
            assert node.id not in ("super", "functional_call"), f"{name}, line {node.lineno}"
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            assert bases in ({"Algorithm"}, {"NamedTuple"}), node.name
    found = [c for _, c in inspect.getmembers(importlib.import_module(name), inspect.isclass)]
    assert [c.__bases__ for c in found if issubclass(c, Algorithm) and c is not Algorithm] == [(Algorithm,)]
    text = ast.get_docstring(TREES[name]) or ""
    assert "Differences from" in text, "a method says where it differs from the paper"


def test_no_hidden_randomness_and_no_pickled_objects():
    """Global generators are seeded in one place alone (a network's constructor), and restored there."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if call == "torch.load":  # weights of others, without pickle's power
                    assert name == "fedtail.teachers.loading"
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert call not in (
                    "torch.save",
                    "np.random.seed",
                    "np.random.rand",
                    "np.random.permutation",
                ), name
                assert call != "torch.manual_seed" or name == "fedtail.task", name
                if call == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), name
                if call in ("np.load", "numpy.load"):
                    assert any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords), name


# House style ----------------------------------------------------------------------------------------------------------


def code_lines(node):
    """Lines of a function without its docstring."""
    whole = node.end_lineno - node.lineno + 1
    first = node.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return whole - (first.end_lineno - first.lineno + 1 if text else 0)


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_stay_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= 400
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= 40, f"{name}.{node.name}"
