"""From an experiment to data that carry a teacher's outputs: who is asked about which images, and its head.

The columns `teacher` [N, classes] and `teacher_features` [N, d] hold what the frozen teacher says of the un-augmented
images: of the server's for methods that learn there, of the clients' for methods whose clients hold the teacher.
"""

import contextlib
import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedtail import config
from fedtail.config import Experiment
from fedtail.data.federated import FederatedData
from fedtail.data.lazy import Column, PartColumn
from fedtail.engines.base import one_thread
from fedtail.errors import ConfigError
from fedtail.federation import Predictor, federate
from fedtail.files import cache_folder, write_atomic
from fedtail.models.specs import MLP
from fedtail.optim import SGD
from fedtail.teachers import heads, loading, store
from fedtail.teachers.loading import Loaded, Preprocessing
from fedtail.teachers.specs import Encoder, NoTeacher, Trained

TEACHER = ("teacher", "teacher_features")


class Head(NamedTuple):
    """From features to class scores."""

    weight: Tensor  # A [classes, d]
    bias: Tensor  # (classes,)


def furnish(experiment: Experiment) -> FederatedData:
    """Returns the experiment's data; with the teacher's outputs, if its algorithm has a use for them.

    Raises:
        FedtailError: the data or the teacher cannot be had; the algorithm needs a teacher and there is none.
    """
    data = federate(experiment.data, experiment.seed, experiment.device, experiment.teacher.probe_images)
    algorithm = experiment.algorithm
    local, server = (set(columns) & set(TEACHER) for columns in (algorithm.columns, algorithm.server_columns))
    if not local | server:
        return data
    name = config.name_of(algorithm)
    if isinstance(experiment.teacher, NoTeacher):
        raise ConfigError(f'algorithm {name} needs a teacher: set teacher.name, for example "efficientnet_lite0".')
    if local and data.augmentation != "none":
        raise ConfigError(f"algorithm {name} has the teacher's outputs of un-augmented images, but its clients' images are "
                          f"augmented ({data.augmentation}). Set data.augmentation = \"none\".")  # fmt: skip
    work = algorithm.server_work
    held = data.server_rows(work.images if work else 0) if server and len(data.server) else data.server[:0]
    rows = np.unique(np.concatenate([held, *(data.owners if local else [])]))
    if not len(rows):  # without server data the algorithm is refused later
        return data
    columns = Teaching(experiment, data).columns(rows)
    if missing := (local | server) - columns.keys():
        raise ConfigError(f"algorithm {name} wants the teacher's features, but this teacher gives class scores alone "
                          f"({', '.join(sorted(missing))}). Set lam_feat = 0, or use another teacher.")  # fmt: skip
    sources = (*data.sources, f"teacher: {experiment.teacher!r}")
    return dataclasses.replace(data, columns={**data.columns, **columns}, sources=sources)


class Teaching:
    """An experiment's teacher with its head, ready to be asked about images of the experiment's data."""

    def __init__(self, experiment: Experiment, data: FederatedData):
        self.experiment, self.data, self.teacher = experiment, data, experiment.teacher
        if isinstance(self.teacher, NoTeacher):
            raise ConfigError("the experiment has no teacher: set teacher.name.")
        self._loaded: Loaded | None = None
        self._head: Head | None = None

    @property
    def loaded(self) -> Loaded:
        """The teacher itself; made at the first use."""
        if self._loaded is None:
            if isinstance(self.teacher, Trained):
                self._loaded = self._trained(self.teacher)
            else:
                assert isinstance(self.teacher, Encoder)
                self._loaded = loading.load(self.teacher, self.data.class_names)
        return self._loaded

    def raw(self, x: Tensor) -> dict[str, Tensor]:
        """Returns what the teacher says of raw inputs [n, ...], before the head."""
        size = getattr(self.teacher, "batch_size", 64)
        with torch.no_grad():
            parts = [self.loaded.encode(self.loaded.preprocessing(part.cpu())) for part in x.split(size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def ask(self, x: Column, rows: np.ndarray[Any, Any]) -> dict[str, Tensor]:
        """Returns what the teacher says of rows of a column of raw inputs, before the head; computed once, then kept."""
        loaded = self.loaded
        place = store.folder(loaded.identity, dataclasses.asdict(loaded.preprocessing), (x.dtype, tuple(x.shape[1:])))
        return store.outputs(place, x, torch.from_numpy(rows).to(x.device), self.raw)

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Returns class scores [n, classes] of what the teacher said."""
        if "logits" in outputs:
            return outputs["logits"]
        if (text := self.loaded.text) is not None:
            return heads.zero_shot(outputs["features"], text.embeddings, text.scale)
        return heads.linear(outputs["features"], *self.head)

    @property
    def head(self) -> Head:
        """The linear head; fitted at the first use."""
        if self._head is None:
            assert isinstance(self.teacher, Encoder)
            self._head = self._federated_probe() if self.teacher.head == "federated_probe" else self._linear_probe()
        return self._head

    def columns(self, rows: np.ndarray[Any, Any]) -> dict[str, PartColumn]:
        """Returns the teacher's columns for these training rows; asked for others they raise DataError."""
        outputs = self.ask(self.data.columns["x"], rows)
        values = {"teacher": self.scores(outputs)}
        if "features" in outputs:
            values["teacher_features"] = outputs["features"]
        total, dtype = len(self.data.columns["y"]), getattr(torch, self.experiment.dtype)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise ConfigError(f"the teacher's column {name} is not finite. Look at its weights and preprocessing.")
        if values["teacher"].shape != (len(rows), self.data.num_classes):
            raise ConfigError(f"the teacher gives scores of shape {tuple(values['teacher'].shape)} for {len(rows)} images, not "
                              f"{(len(rows), self.data.num_classes)}.")  # fmt: skip
        device = self.experiment.device
        return {k: PartColumn(v.to(device, dtype), torch.from_numpy(rows), total, k) for k, v in values.items()}

    def _labels(self, rows: np.ndarray[Any, Any]) -> Tensor:
        return self.data.columns["y"][torch.from_numpy(rows).to(self.data.columns["y"].device)].cpu()

    def _linear_probe(self) -> Head:
        assert isinstance(self.teacher, Encoder)
        outputs = self.ask(self.data.columns["x"], self.data.probe)
        if "features" not in outputs or outputs["features"].dim() != 2:
            raise ConfigError("a linear probe needs features [N, d] of the teacher.")
        with one_thread():
            return Head(*heads.fit_probe(outputs["features"], self._labels(self.data.probe), self.data.num_classes,
                                         self.teacher.probe_decay))  # fmt: skip

    def _federated_probe(self) -> Head:
        """Fits the head by FedAvg: clients hold the encoder, and the head alone travels."""
        from fedtail.experiment import Federation

        assert isinstance(self.teacher, Encoder)
        held = np.unique(np.concatenate(list(self.data.owners)))
        features = self.ask(self.data.columns["x"], held)["features"]
        mean, std = heads.standardisation(features)
        whole = torch.zeros(len(self.data.columns["y"]), features.shape[1])
        whole[torch.from_numpy(held)] = ((features.double() - mean) / std).float()
        columns = {"x": whole, "y": self.data.columns["y"].cpu()}
        data = dataclasses.replace(
            self.data, columns=columns, test={"x": whole[:1], "y": columns["y"][:1]}, local_tests=[], mean=(), std=(),
            augmentation="none", server=np.zeros(0, np.int64),
        )  # fmt: skip
        experiment = Experiment(seed=self.experiment.seed, rounds=self.teacher.probe_rounds, model=MLP(hidden=()),
                                local=self.experiment.local, participation=self.experiment.participation)  # fmt: skip
        with contextlib.closing(Federation(experiment, data)) as running:
            while running.round < experiment.rounds:
                running.advance(running.step())
            params = running.variables().params
        a = params["head.weight"].double() / std
        return Head(a.float(), (params["head.bias"].double() - a @ mean).float())

    def _trained(self, teacher: Trained) -> Loaded:
        """Trains fedtail's own network at one place, or reads it where an earlier run has kept it."""
        from fedtail.experiment import Federation

        rows = self.data.probe if teacher.on == "probe" else np.sort(np.concatenate(list(self.data.owners)))
        experiment = Experiment(
            seed=self.experiment.seed, rounds=1, model=teacher.model,
            algorithm=config.FedAvg(optimizer=SGD(lr=teacher.lr, momentum=0.9, clip=5.0)),
            local=config.LocalWork(epochs=teacher.epochs, batch_size=teacher.batch_size,
                                   min_batch=min(2, teacher.batch_size)),
        )  # fmt: skip
        x = self.data.columns["x"]
        digest = hashlib.sha256(b"".join(store.digests(x, torch.from_numpy(rows).to(x.device))))
        digest.update(self._labels(rows).numpy().tobytes() + config.fingerprint(experiment).encode())
        digest.update(repr((self.data.mean, self.data.std)).encode())  # by data.normalise the network sees other inputs
        file = cache_folder() / "teachers" / f"trained-{digest.hexdigest()[:24]}.safetensors"
        none = np.zeros(0, np.int64)
        data = dataclasses.replace(
            self.data, owners=[rows], local_tests=[none], held=(), augmentation="none", server=none
        )
        with contextlib.closing(Federation(experiment, data)) as running:
            network = running.module().network
            if file.is_file():
                network.load_state_dict(load_file(file))
            else:
                running.step()
                network = running.module().network
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, save({k: v.contiguous() for k, v in network.state_dict().items()}))
        return _own(network.cpu(), self.data, f"trained {digest.hexdigest()}")


def _own(network: nn.Module, data: FederatedData, identity: str) -> Loaded:
    """Returns a network of fedtail's as a teacher: it sees raw images with the data's own scaling."""
    module = loading.frozen(Predictor(network, data.mean, data.std))

    def encode(x: Tensor) -> dict[str, Tensor]:
        z = module(x)
        h = getattr(network, "features", None)
        return {"logits": z} if h is None else {"logits": z, "features": h(data.prepare(x, torch.float32))}

    return Loaded(identity, _Unchanged(), encode, module)


@dataclasses.dataclass(frozen=True)
class _Unchanged(Preprocessing):
    """Nothing: the network has its scaling inside."""

    def __call__(self, x: Tensor) -> Tensor:
        return x
