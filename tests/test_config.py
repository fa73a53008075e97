import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtail
from fedtail import config, teachers
from fedtail.affine import Affine
from fedtail.algorithm import Algorithm
from fedtail.algorithms import fedga, fedlc, fedrs
from fedtail.algorithms.apfl import APFL
from fedtail.algorithms.ccvr import CCVR
from fedtail.algorithms.client_distillation import ClientDistillation
from fedtail.algorithms.climb import CLIMB
from fedtail.algorithms.creff import CReFF
from fedtail.algorithms.crt import CRT
from fedtail.algorithms.ditto import Ditto
from fedtail.algorithms.effgan import EFFGAN
from fedtail.algorithms.eqlv2 import EQLv2
from fedtail.algorithms.fedbabu import FedBABU
from fedtail.algorithms.fedbn import FedBN
from fedtail.algorithms.feddecorr import FedDecorr
from fedtail.algorithms.feddf import FedDF
from fedtail.algorithms.feddyn import FedDyn
from fedtail.algorithms.fedetf import FedETF
from fedtail.algorithms.fedgan import FedGAN
from fedtail.algorithms.fedloge import FedLoGe
from fedtail.algorithms.fedmd import FedMD
from fedtail.algorithms.fednova import FedNova
from fedtail.algorithms.fedntd import FedNTD
from fedtail.algorithms.fedopt import FedOpt
from fedtail.algorithms.fedper import FedPer
from fedtail.algorithms.fedproto import FedProto
from fedtail.algorithms.fedrep import FedRep
from fedtail.algorithms.fedrl import FedRL
from fedtail.algorithms.fedrod import FedROD
from fedtail.algorithms.fedsam import FedSAM
from fedtail.algorithms.lg_fedavg import LGFedAvg
from fedtail.algorithms.lightweight import Lightweight
from fedtail.algorithms.mdgan import MDGAN
from fedtail.algorithms.moon import MOON
from fedtail.algorithms.pfedme import PFedMe
from fedtail.algorithms.posthoc import PostHoc
from fedtail.algorithms.server_distillation import ServerDistillation
from fedtail.algorithms.uagan import UAGAN
from fedtail.config import REGISTRIES, Data, Evaluation, Experiment, Participation, from_dict, to_dict
from fedtail.data import longtail, partition
from fedtail.errors import ConfigError
from fedtail.losses import (
    LDAM,
    BalancedSoftmax,
    ClassWeighted,
    FedGA,
    FedIR,
    FedLC,
    FedRS,
    Focal,
    LabelSmoothing,
    LogitAdjustment,
    Loss,
)
from fedtail.metrics import OLTR, Cumulative, Explicit, Thirds
from fedtail.models import specs
from fedtail.optim import OPTIMIZERS, SGD, Adam, Nadam, Optimizer, Partition
from fedtail.schedule import Constant, Cosine, StepDecay

# One value of every class that a configuration can name, with other than default options where it has any.
CHOICES = [
    fedtail.FedAvg(server_lr=0.5, optimizer=SGD(lr=0.1, momentum=0.0, clip=5.0)),
    fedtail.FedProx(mu=0.5, optimizer=Adam(lr=1e-4, decoupled=True, weight_decay=1e-3)),
    fedtail.Scaffold(server_lr=0.7),
    fedtail.FedGraB(kp=3.0, gate="none", warm=0, frozen_classifier=True),
    FedNova(optimizer=SGD(lr=0.1, momentum=0.0)),  # both mu and the momentum can be changed from here, one by one
    FedOpt(server="avgm", server_lr=0.3, beta1=0.8, beta2=0.9, tau=0.01),
    FedDyn(alpha=0.1, by_size=False),
    CLIMB(lr_dual=0.5, eps=0.01, period=2, weighting="examples"),
    FedRL(alpha=0.5, beta=0.2, cap=50.0),
    EQLv2(gamma=6.0, mu=0.5, alpha=2.0),
    FedGAN(persist_optimizer=True, weighting="kl", kl_sign=-1, optimizer=SGD(lr=0.1)),
    EFFGAN(finetune_epochs=3, weights="classes"),
    MDGAN(swap_every=7),
    UAGAN(aggregate="soft", sharpness=3.0, scale=1.0, penalty=1.0),
    PostHoc(prediction="logit_adjustment", tau=0.5, prior="given", given=(3.0, 2.0, 1.0)),
    CRT(retrain_rounds=3),
    CCVR(per_class=50, retrain_lr=0.01, retrain_steps=7),
    FedLoGe(
        sparsity=0.5,
        norm=0.2,
        etf_steps=5,
        etf_lr=0.01,
        fixed_bias=True,
        generic_head="raw",
        personal_head="private",
        constant=1.7,
        bias="keep",
        personal_bias="private",
    ),
    fedga.FedGA(form="exact", counts="client", strength=0.5, weights="size"),
    fedlc.FedLC(tau=0.5),
    fedrs.FedRS(alpha=0.3, soft=True),
    FedNTD(beta=0.5, tau=3.0),
    MOON(mu=1.0, tau=0.2),
    FedDecorr(beta=0.05, loss=FedGA(form="exact", counts="client", strength=0.5)),
    FedSAM(rho=0.1),
    FedPer(share_private=True),
    FedRep(head_share=0.25, share_private=True),
    LGFedAvg(share_private=True),
    FedBN(share_private=True),
    FedBABU(tune="all"),
    FedETF(dimension=16, temperature=10.0, tune_share=0.2, loss=BalancedSoftmax(gamma=0.5)),
    Ditto(lam=1.0),
    PFedMe(lam=5.0, inner_steps=3, lr_shared=0.1, server_lr=0.5),
    APFL(mix=0.25, adaptive="batch"),
    FedROD(loss=Focal(gamma=1.0)),
    FedProto(lam=0.1, prediction="classifier"),
    ServerDistillation(
        lam_kd=0.5,
        lam_feat=0.2,
        lam_ce=0.1,
        temperature=4.0,
        server_steps=7,
        server_images=3,
        server_batch=9,
        server_optimizer=SGD(lr=0.2),
        server_cosine=False,
        clients=False,
    ),
    FedMD(public_batches=3, public_batch=8),
    ClientDistillation(lam=0.3, temperature=1.5),
    FedDF(
        temperature=2.0,
        server_steps=3,
        server_images=2,
        server_batch=9,
        server_optimizer=Adam(lr=0.01),
        server_cosine=False,
    ),
    Lightweight(
        optimizer=Nadam(lr=0.01, beta1=0.8, beta2=0.99, eps=1e-6, clip=1.0),
        final=SGD(lr=0.1, weight_decay=0.1, decoupled=True),
        loss=BalancedSoftmax(gamma=0.5),
        augment=Affine(rotate=0.2, zoom=0.1, shift=0.1, brightness=0.3, composed=True),
        schedule="notebook",
        heads="first",
        refit="kfold-continue",
        moments="averaged",
        dual_rounds=3,
        unfreeze_rounds=(1, 2),
        final_rounds=4,
        patience=2,
        final_patience=3,
        min_delta=0.01,
        ignored=1,
    ),
    CReFF(features_per_class=9, match_lr=0.2, match_steps=8, retrain_lr=0.02, retrain_steps=6),
    fedtail.FedAvg(loss=Focal(gamma=1.0)),
    fedtail.FedAvg(loss=ClassWeighted(by="effective", beta=0.99)),
    fedtail.FedProx(loss=FedIR()),
    fedtail.FedAvg(loss=LDAM(max_margin=0.3, scale=10.0, drw=True, counts="shared")),
    fedtail.Scaffold(loss=BalancedSoftmax(gamma=0.5)),
    fedtail.FedAvg(loss=LogitAdjustment(prior="given", given=(0.5, 0.3, 0.2))),
    fedtail.FedAvg(loss=LabelSmoothing(epsilon=0.2)),
    fedtail.FedAvg(loss=FedLC(tau=0.1)),
    fedtail.FedAvg(loss=FedRS(alpha=0.9, soft=True)),
    longtail.NoTail(),
    longtail.Exponential(factor=50.0, num_max=100, legacy_seed=0),
    longtail.Step(factor=3.0, head_share=0.3),
    partition.IID(clients=3, legacy_seed=7),
    partition.DirichletMultinomial(clients=4, alpha=0.3, legacy_seed=3407),
    partition.DirichletProportional(clients=5, alpha=1.5, min_size=2, cap=True),
    partition.Shards(clients=6, shards_per_client=3),
    partition.ClassSpecific(clients=10, classes_per_client=2),
    partition.DirichletEqualSize(clients=7, alpha=0.2, min_size=3),
    partition.QuantitySkew(clients=8, alpha=0.7, min_size=2),
    partition.RotatedTails(clients=20, factor=5.0),
    partition.Natural(min_size=4),
    teachers.NoTeacher(),
    teachers.EfficientNetLite0(head="federated_probe", probe_rounds=3, pixels=128),
    teachers.EfficientNetLite2(probe=9, probe_decay=0.1, batch_size=7),
    teachers.Timm(model="resnet18", weights="a.safetensors", sha256="ab", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
    teachers.DINOv2(weights="b.pth"),
    teachers.OpenCLIP(prompts=("{class}",), class_names=("cat", "dog")),
    teachers.CLIP(head="linear_probe", model="RN50-quickgelu"),
    teachers.UserTeacher(target="nets/mine.py:Net", version="2", head="linear_probe", mean=(0.1,), std=(0.2,)),
    teachers.Trained(model=specs.LeNet(), on="pooled", epochs=3, lr=0.1),
    specs.MLP(hidden=(), dropout=0.25),
    specs.MLP(hidden=(64, 32)),
    specs.LeNet(padding=2),
    specs.BranchCNN(),
    specs.Unified(branch=specs.MLP(hidden=(7,)), width=16, dropout=0.25),
    specs.ResNet8(norm="batch"),
    specs.ResNet20(norm="group"),
    specs.ResNet18(),
    specs.ResNet34(norm="group"),
    specs.ResNet50(norm="group"),
    specs.DCGAN28(width=32, latent=64, conditional=True),
    specs.DCGAN32(norm="group"),
    specs.UserModel(target="nets/mine.py:Net", options={"width": 3, "act": "relu", "deep": [1, 2]}),
    Cumulative(head=0.5, medium=0.9, of="train"),
    OLTR(many=50, few=5),
    Thirds(of="train"),
    Explicit(head=(0, 3), medium=(1,), tail=(2,)),
    Constant(),
    Cosine(final=0.1, warmup=5),
    StepDecay(every=7, factor=0.5),
]
PLACES = {
    longtail.LongTail: ("data", "longtail"),
    partition.Partition: ("data", "partition"),
    specs.ModelSpec: ("model",),
    config.GroupRule: ("evaluation", "groups"),
    config.Schedule: ("schedule",),
    Algorithm: ("algorithm",),
    teachers.Teacher: ("teacher",),
}


def placed(value):
    """The default experiment with the value where it belongs."""
    path = next(path for base, path in PLACES.items() if isinstance(value, base))
    return replaced(Experiment(), path, value)


def replaced(node, path, value):
    inner = value if len(path) == 1 else replaced(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: inner})


def name(value):
    return type(value).__name__


EXPERIMENTS = [
    Experiment(),
    Experiment(
        seed=2**40, rounds=7, data=Data(validation=3, server=2, augmentation="flip", folder="else"),
        participation=Participation(fraction=0.1, clients=3), evaluation=Evaluation(every=3, keep="best", local=False),
        engine=fedtail.EngineOptions(name="vmap", chunk=3), dtype="float64", device="cuda:1", checkpoint_every=4,
        local=fedtail.LocalWork(steps=7, batch_size=3, min_batch=2),
    ),
    *map(placed, CHOICES),
]  # fmt: skip


# ---- to plain values and back


def test_every_name_is_tried():
    for base, registry in REGISTRIES.items():
        used = {config.name_of(value) for value in CHOICES if isinstance(value, base)}
        if base is Optimizer:
            used = {config.name_of(value.optimizer) for value in CHOICES if isinstance(value, Algorithm)} | {
                "partition"
            }
        if base is Loss:
            used = {config.name_of(value.loss) for value in CHOICES if hasattr(value, "loss")}
        assert set(registry) - used == set(), base


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: f"{name(e.algorithm)}-{name(e.model)}")
def test_round_trip(experiment, tmp_path):
    table = to_dict(experiment)
    assert from_dict(Experiment, table) == experiment
    assert json.loads(json.dumps(table)) == table  # nothing but plain values
    text = config.dumps(experiment)
    assert from_dict(Experiment, tomllib.loads(text)) == experiment
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    for place in (tmp_path, tmp_path / "config.toml", str(tmp_path)):
        assert config.load(place) == experiment
    assert config.fingerprint(config.load(tmp_path)) == config.fingerprint(experiment)


def test_round_trip_of_several_optimizers(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "partition", Partition)
    parts = Partition(parts={"": SGD(lr=0.5), "head.": Adam()})
    experiment = Experiment(algorithm=fedtail.FedAvg(optimizer=parts))
    table = tomllib.loads(config.dumps(experiment))
    assert table["algorithm"]["optimizer"]["parts"]["head."]["name"] == "adam"
    assert from_dict(Experiment, table) == experiment


@settings(deadline=None)
@given(
    lr=st.floats(1e-300, 1e300), momentum=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**63 - 1),
    hidden=st.lists(st.integers(1, 10**6), max_size=4), where=st.text(st.characters(exclude_categories=["Cs"])),
)  # fmt: skip
def test_round_trip_of_any_values(lr, momentum, seed, hidden, where):
    """Floats keep every bit, texts every sign."""
    experiment = Experiment(
        seed=seed, algorithm=fedtail.FedAvg(optimizer=SGD(lr=lr, momentum=momentum)),
        model=specs.MLP(hidden=tuple(hidden)), data=Data(folder=where),
    )  # fmt: skip
    again = from_dict(Experiment, tomllib.loads(config.dumps(experiment)))
    assert again == experiment
    assert config.fingerprint(again) == config.fingerprint(experiment)


def others(hint, value):
    """Other values of a field's type, near the given one, of which at least one should be possible."""
    if typing.get_origin(hint) is typing.Literal:
        return [v for v in typing.get_args(hint) if v != value]
    if isinstance(hint, types.UnionType):
        return [1, 2] if value is None else [None, value + 1]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 0.9, value + 0.1] if value else [0.1]
    if isinstance(value, str):
        return [value + "2"]
    if isinstance(value, dict):
        return [{**value, "another": 1}]
    if typing.get_args(hint)[0] is str:
        return [(*value, "a {class}")]
    return [(*value, 77), (*value, 0.5), value[1:]]  # a tuple


def variants(node, path=""):
    """Yields (dotted path, node with one field changed) for every field below."""
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, place = getattr(node, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            for where, inner in variants(value, f"{place}."):
                with_inner = possible(node, field.name, inner)
                if with_inner is not None:
                    yield where, with_inner
            continue
        found = [v for v in (possible(node, field.name, o) for o in others(hints[field.name], value)) if v is not None]
        if found:
            yield place, found[0]


def possible(node, field, value):
    try:
        return dataclasses.replace(node, **{field: value})
    except ConfigError:
        return None


def leaves(node, path=""):
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: f"{name(e.algorithm)}-{name(e.model)}")
def test_the_fingerprint_changes_with_every_field(experiment):
    changed = dict(variants(experiment))
    assert len({config.fingerprint(e) for e in (experiment, *changed.values())}) == 1 + len(changed)
    # No other value of these is possible beside the other fields: "best" without validation, scores of images, and so on.
    alone = {
        "evaluation.keep",
        "evaluation.finetune.epochs",
        "evaluation.local_models",
        "algorithm.optimizer.nesterov",
        "data.partition.min_size",
        "autocast",
        "teacher.mean",  # one without the other
        "teacher.std",
    }
    assert set(leaves(experiment)) - set(changed) <= alone
    for other in changed.values():
        assert from_dict(Experiment, to_dict(other)) == other


def test_the_fingerprint_tells_classes_with_equal_fields_apart():
    chosen = [specs.ResNet18(), specs.ResNet20(), specs.ResNet34(), specs.ResNet8(norm="batch")]
    assert len({config.fingerprint(Experiment(model=model)) for model in chosen}) == len(chosen)


def test_the_fingerprint_is_written_into_checkpoints():
    """It must depend on neither the order of a file's lines nor, between processes, on hash seeds: here is its value."""
    backwards = from_dict(Experiment, dict(reversed(to_dict(Experiment()).items())))
    assert config.fingerprint(backwards) == config.fingerprint(Experiment())
    text = json.dumps(to_dict(Experiment()), sort_keys=True)
    assert config.fingerprint(Experiment()) == hashlib.sha256(text.encode()).hexdigest()


# ---- files


def test_a_file_needs_to_say_only_what_differs(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("")
    assert config.load(file) == Experiment()
    file.write_text(
        'rounds = 5\n[data.partition]\nclients = 20\n[algorithm]\nname = "fedprox"\n[algorithm.optimizer]\nlr = 0.5\n'
        'name = "sgd"\n[model]\nname = "lenet"\n'
    )
    loaded = config.load(file)
    # The same partition, but for what is named; another method and model with their own defaults.
    assert loaded.data.partition == partition.DirichletMultinomial(clients=20, alpha=0.5)
    assert loaded.algorithm == fedtail.FedProx(optimizer=SGD(lr=0.5))
    assert loaded.model == specs.LeNet()
    assert (
        dataclasses.replace(loaded, rounds=20, data=Data(), algorithm=fedtail.FedAvg(), model=specs.MLP())
        == Experiment()
    )


def test_a_file_from_windows(tmp_path):
    (tmp_path / "mine.toml").write_bytes("\ufeffrounds = 5\r\n[data]\r\nfolder = 'Übung'\r\n".encode())
    assert config.load(tmp_path / "mine.toml") == Experiment(rounds=5, data=Data(folder="Übung"))


def test_naming_another_class_drops_the_options_of_the_old_one(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[data.longtail]\nname = "step"\n[data.partition]\nname = "iid"\n')
    assert config.load(file).data.longtail == longtail.Step()  # not factor 10, the default experiment's
    assert config.load(file).data.partition == partition.IID()


def test_messages_name_the_file_the_option_and_the_nearest_name(tmp_path):
    file = tmp_path / "mine.toml"
    for text, message in [
        ("[data.partition]\nalfa = 1.0", r"mine\.toml: unknown option 'data\.partition\.alfa'; did you mean 'alpha'\?"),
        ("[algorithm.optimiser]\nlr = 1.0", r"unknown option 'algorithm\.optimiser'; did you mean 'optimizer'\?"),
        ("[local]\nzzz = 1", r"unknown option 'local\.zzz'\. Known are epochs, steps, batch_size, min_batch"),
        ("[engine]\nworkers = -1", r"engine: workers, states_mib and chunk must be >= 0, got -1"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            config.load(file)


@pytest.mark.parametrize(
    ("base", "wrong", "right", "what"),
    [
        (Algorithm, "FedGrab", "fedgrab", "algorithm"),
        (Optimizer, "sdg", "sgd", "optimizer"),
        (longtail.LongTail, "exponentail", "exponential", "longtail"),
        (partition.Partition, "shard", "shards", "partition"),
        (specs.ModelSpec, "resnet-20", "resnet20", "model"),
        (config.GroupRule, "olter", "oltr", "groups"),
        (config.Schedule, "const", "constant", "schedule"),
    ],
)
def test_unknown_names(base, wrong, right, what):
    with pytest.raises(ConfigError, match=rf"unknown {what} '{wrong}'; did you mean '{right}'\? Known are ") as caught:
        config.resolve(base, wrong)
    assert all(known in str(caught.value) for known in REGISTRIES[base])
    with pytest.raises(ConfigError, match=rf"unknown {what} 'zzzz'\. Known are "):
        config.resolve(base, "zzzz")


# ---- the flags that pick a class


def picked(*arguments, experiment=None):
    table = to_dict(experiment or Experiment())
    rest = config.pick_names(table, list(arguments))
    return from_dict(Experiment, table), rest


def test_pick_names():
    experiment, rest = picked("--rounds", "3", "--algorithm.name", "fedprox", "--algorithm.mu", "0.5")
    assert experiment.algorithm == fedtail.FedProx()
    assert rest == ["--rounds", "3", "--algorithm.mu", "0.5"]
    experiment, rest = picked("--model.name=resnet8", "--data.longtail.name", "none", "--evaluation.groups.name=oltr")
    assert (experiment.model, experiment.data.longtail) == (specs.ResNet8(), longtail.NoTail())
    assert experiment.evaluation.groups == OLTR()
    assert rest == []
    experiment, _ = picked("--model.name", "nets.py:Mine")
    assert experiment.model == specs.UserModel(target="nets.py:Mine")


def test_pick_names_leaves_what_is_not_a_class():
    words = ["--data.name", "mnist", "--engine.name", "loop", "--else.name", "x", "name", "-h"]
    experiment, rest = picked(*words)
    assert (experiment, rest) == (Experiment(), words)


def test_pick_names_keeps_what_old_and_new_class_share():
    start = Experiment(algorithm=fedtail.FedProx(mu=0.7, optimizer=SGD(lr=0.5)))
    experiment, _ = picked("--algorithm.name", "scaffold", experiment=start)
    assert experiment.algorithm == fedtail.Scaffold(optimizer=SGD(lr=0.5))
    experiment, _ = picked("--algorithm.name", "fedprox", experiment=start)  # the name it has: nothing changes
    assert experiment == start
    experiment, _ = picked("--algorithm.name", "fedavg", "--algorithm.optimizer.name", "adam", experiment=start)
    assert experiment.algorithm == fedtail.FedAvg(optimizer=Adam())
    start = Experiment(algorithm=fedtail.FedAvg(loss=Focal(gamma=1.0), optimizer=SGD(lr=0.5)))
    experiment, _ = picked("--algorithm.name", "fedprox", experiment=start)
    assert experiment.algorithm == fedtail.FedProx(loss=Focal(gamma=1.0), optimizer=SGD(lr=0.5))
    experiment, _ = picked("--algorithm.name", "fedgrab", experiment=start)  # which has no loss to choose
    assert experiment.algorithm == fedtail.FedGraB(optimizer=SGD(lr=0.5))
    experiment, _ = picked("--algorithm.loss.name", "ldam", experiment=start)
    assert experiment.algorithm == fedtail.FedAvg(loss=LDAM(), optimizer=SGD(lr=0.5))


def test_pick_names_without_a_known_name():
    with pytest.raises(ConfigError, match=r"unknown algorithm 'fedporx'; did you mean 'fedprox'\?"):
        picked("--algorithm.name", "fedporx")
    with pytest.raises(ConfigError, match="unknown model ''"):
        picked("--model.name")


# ---- classes of the user's own

MINE = """
from dataclasses import dataclass
from fedtail import FedAvg, Algorithm

@dataclass(frozen=True, kw_only=True)
class Mine(Algorithm):
    speed: float = 1.0

    def local_init(self, ctx, message, client): ...
    def local_step(self, ctx, message, client, local, batch): ...
    def local_final(self, ctx, message, client, local): ...
    def server_update(self, ctx, server, mean, total): ...

other = 3
"""


def test_an_algorithm_of_one_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    cls = config.resolve(Algorithm, "mine.py:Mine")
    assert config.resolve(Algorithm, "mine.py:Mine") is cls  # imported once
    assert config.resolve(Algorithm, f"{tmp_path}/mine.py:Mine") is cls  # the path decides, not how it is written
    config.resolve(Algorithm, "mine.py:Mine")
    experiment = Experiment(algorithm=cls(speed=0.5))
    assert to_dict(experiment)["algorithm"]["name"] == "mine.py:Mine"
    assert from_dict(Experiment, to_dict(experiment)) == experiment
    Path("bare.py").write_text(MINE.replace(" = 1.0", ""))  # an option without a default
    with pytest.raises(
        ConfigError, match=r"option 'algorithm\.speed' is missing, and has no default\. Add it to the file"
    ):
        from_dict(Experiment, {"algorithm": {"name": "bare.py:Mine"}})
    assert from_dict(Experiment, {"algorithm": {"name": "bare.py:Mine", "speed": 0.5}}).algorithm.speed == 0.5
    with pytest.raises(ConfigError, match=r"unknown option 'algorithm\.sped'; did you mean 'speed'\?"):
        from_dict(Experiment, {"algorithm": {"name": "mine.py:Mine", "sped": 1.0}})
    for target, message in [
        ("mine.py:Other", r"mine\.py has no Algorithm named 'Other'"),
        ("mine.py:other", r"mine\.py has no Algorithm named 'other'"),
        ("else.py:Mine", r"algorithm 'else\.py:Mine': there is no file .*else\.py"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config.resolve(Algorithm, target)
    Path("broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"broken\.py could not be run: ModuleNotFoundError"):
        config.resolve(Algorithm, "broken.py:Mine")
    Path("broken.py").write_text(MINE)  # mended: a failed import leaves nothing behind
    assert config.resolve(Algorithm, "broken.py:Mine").__name__ == "Mine"


# ---- participation


@pytest.mark.parametrize(
    ("options", "population", "size"),
    [
        ({}, 8, 8),
        ({"fraction": 0.5}, 8, 4),
        ({"fraction": 0.5}, 9, 4),  # floor
        ({"fraction": 0.01}, 8, 1),  # at least one
        ({"fraction": 0.29}, 100, 29),  # though 0.29 * 100 = 28.999999999999996
        ({"fraction": 0.57}, 100, 57),
        ({"clients": 3}, 8, 3),
        ({"clients": 30}, 8, 8),  # all there are
        ({"clients": 3, "fraction": 0.9}, 8, 3),  # the number counts
    ],
)
def test_cohort_size(options, population, size):
    assert Participation(**options).size(population) == size
