"""Feature networks that images are judged with: a small classifier trained in place, an ImageNet encoder, a user's Inception.

All take images [N, C, H, W] in [-1, 1], as generators make them, and give features [N, d]. Each says what it is, with the
SHA-256 of its weights: distances in different features cannot be compared.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from fedtail.data.dataset import Dataset
from fedtail.engines.base import one_thread
from fedtail.errors import ConfigError
from fedtail.files import cache_folder, write_atomic
from fedtail.optim import Adam, Params
from fedtail.seeds import Stream, generator
from fedtail.task import Variables, build_task
from fedtail.teachers.loading import load as load_teacher
from fedtail.teachers.specs import EfficientNetLite0

Array = np.ndarray[Any, Any]
Feature = Literal["classifier", "efflite0", "inception", "pixels"]
PIECE = 25
"""Images that go through a network at once: few, so that its maps stay in a core's cache; with
the channels last in the weights this is three to four times as fast as 250 in the plain layout."""
EPOCHS, BATCH, SEED = 4, 128, 0
"""Of the small classifier's training, the same for every experiment."""


class FeatureNet(ABC):
    """What turns images into features."""

    name: str
    """What it is, for reports; with the beginning of its weights' hash."""
    ridge: float = 0.0
    """What `quality.frechet` adds to the covariances' diagonals."""

    @abstractmethod
    def features(self, images: Tensor) -> Array:
        """Returns features [N, d], float64, of images [N, C, H, W] in [-1, 1]."""


def in_pieces(function: Any, images: Tensor) -> Array:
    """Applies a function to pieces of the images and joins what it returns."""
    with torch.no_grad():
        return torch.cat([function(part).double() for part in images.float().split(PIECE)]).numpy()


class SmallNet(nn.Module):
    """Twice 3x3 convolution (32, 64 channels), BatchNorm, ReLU, max-pool; a hidden layer of 128; a head.

    Args:
        shape: (channels, height, width) of an image.
        classes: C.
    """

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * (shape[1] // 4) * (shape[2] // 4), 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits [B, C]."""
        return self.head(self.body(x))


class Classifier(FeatureNet):
    """A small classifier; its 128 hidden units are the features, and it says which class an image shows.

    Args:
        network: a `SmallNet`, trained.
        digest: SHA-256 of its weights.
    """

    ridge = 1e-6  # a unit may never be active

    def __init__(self, network: SmallNet, digest: str) -> None:
        self.network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.digest = digest
        self.name = f"small classifier {digest[:12]}"

    def features(self, images: Tensor) -> Array:
        """Returns the hidden units, [N, 128]."""
        return in_pieces(self.network.body, images)

    def judged(self, features: Array) -> Array:
        """Returns the probabilities of the classes, [N, C], of images with such hidden units [N, 128]."""
        with torch.no_grad():
            return self.network.head(torch.from_numpy(features).float()).softmax(1).double().numpy()

    def probabilities(self, images: Tensor) -> Array:
        """Returns the probabilities of the classes, [N, C]."""
        return self.judged(self.features(images))

    def labels(self, images: Tensor) -> Array:
        """Returns the most probable classes, int64 (N,)."""
        return self.probabilities(images).argmax(1)


def scaled(x: Array) -> Tensor:
    """Returns uint8 images [N, C, H, W] as floats in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(x)).float() / 127.5 - 1


def fit(x: Tensor, y: Array, classes: int, epochs: int = EPOCHS, seed: int = SEED) -> Classifier:
    """Trains the small classifier, on one core, so that the same images give the same weights.

    Args:
        x: images [N, C, H, W] in [-1, 1].
        y: int64 (N,).
        classes: C.
        epochs: passes over the images, in batches of 128 with Adam(1e-3).
        seed: of initial weights and order.
    """
    shape = tuple(x.shape[1:])
    task, adam, target = (
        build_task(lambda: SmallNet(shape, classes), classes, shape, seed=seed),
        Adam(),
        torch.from_numpy(y),
    )
    worker, rng = task.worker(donate=False), generator(seed, Stream.QUALITY)
    variables, state = task.initial, adam.init(task.initial.params)

    def loss(params: Params) -> tuple[Tensor, Any]:
        logits, new = worker.apply(Variables(params, variables.buffers), x[rows])
        return F.cross_entropy(logits, target[rows]), new.buffers

    with one_thread():
        for _ in range(epochs):
            for rows in torch.from_numpy(rng.permutation(len(y))).split(BATCH):
                if len(rows) > 1:  # BatchNorm
                    _, buffers, grads = worker.value_and_grad(loss, variables.params)
                    params, state = worker.update(adam, grads, state, variables.params)
                    variables = Variables(params, buffers)
    return _classifier(shape, classes, {**variables.params, **variables.buffers})


def _classifier(shape: tuple[int, ...], classes: int, weights: dict[str, Tensor]) -> Classifier:
    network = SmallNet(shape, classes)
    network.load_state_dict(weights)
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return Classifier(network, digest.hexdigest())


def classifier(dataset: Dataset) -> Classifier:
    """Returns the small classifier of a data set's whole training split: from the cache, or trained now and kept there."""
    train = dataset.train
    key = hashlib.sha256(f"SmallNet {EPOCHS} {BATCH} {SEED}".encode())
    key.update(np.ascontiguousarray(train.array).tobytes())
    key.update(train.y.tobytes())
    path = cache_folder() / "judges" / f"{key.hexdigest()[:32]}.safetensors"
    if path.is_file():
        return _classifier(dataset.input_shape, dataset.num_classes, load_file(path))
    found = fit(scaled(train.array), train.y, dataset.num_classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({k: v.contiguous() for k, v in found.network.state_dict().items()}))
    return found


class Pixels(FeatureNet):
    """The first principal components of the real images' pixels: no network at all, a check on the others.

    Args:
        images: real ones, [N, C, H, W] in [-1, 1].
        size: number of components.
    """

    def __init__(self, images: Tensor, size: int = 64) -> None:
        flat = images.flatten(1).double()
        self.mean = flat.mean(0)
        _, vectors = torch.linalg.eigh((flat - self.mean).mT @ (flat - self.mean))
        self.axes = vectors.flip(1)[:, :size]
        self.name = f"{size} principal components of pixels"

    def features(self, images: Tensor) -> Array:
        """Returns the components, [N, size]."""
        return ((images.flatten(1).double() - self.mean) @ self.axes).numpy()


class Encoder(FeatureNet):
    """A packaged ImageNet encoder (extra `teachers`), as methods that distil have it.

    Raises:
        ConfigError: the extra is not installed.
        DataError: its file is another one.
    """

    def __init__(self, teacher: EfficientNetLite0) -> None:
        self.loaded = load_teacher(teacher)
        name, digest = self.loaded.identity.split()
        self.name = f"{name}, ImageNet, {teacher.pixels} pixels, {digest[:12]}"

    def features(self, images: Tensor) -> Array:
        """Returns the means of the last maps, [N, 1280]."""
        return in_pieces(lambda part: self.loaded.encode(self.loaded.preprocessing(_bytes(part)))["features"], images)


def _bytes(images: Tensor) -> Tensor:
    """Returns images as uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Inception(FeatureNet):
    """The Inception network of the published distances, from a file of the user's, in the TorchScript form.

    Args:
        file: `inception-2015-12-05.pt`; takes uint8 images and `return_features=True`, gives [N, 2048].

    Raises:
        ConfigError: no such file, or not TorchScript.
    """

    def __init__(self, file: str | Path) -> None:
        path = Path(file)
        try:
            self.network: Any = torch.jit.load(str(path), map_location="cpu").eval()
        except (ValueError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            raise ConfigError(f"feature weights: {path} is not a TorchScript file: {why}") from error
        self.name = f"Inception of {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"

    def features(self, images: Tensor) -> Array:
        """Returns the pooled features."""

        def one(part: Tensor) -> Tensor:
            pixels = _bytes(part)
            return self.network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels, return_features=True)

        return in_pieces(one, images)


def feature_net(kind: Feature, dataset: Dataset, weights: str = "") -> FeatureNet:
    """Returns a feature network by name.

    Args:
        kind: "classifier" (trained on the data set's training split), "efflite0", "inception" or "pixels".
        dataset: real images.
        weights: the file of "inception".
    """
    if kind == "classifier":
        return classifier(dataset)
    if kind == "efflite0":
        return Encoder(EfficientNetLite0(pixels=128))  # 224, its own, takes three times as long
    if kind == "pixels":
        return Pixels(scaled(dataset.train.array[:10_000]))
    if not weights:
        raise ConfigError('feature "inception" needs its file: --weights inception-2015-12-05.pt')
    return Inception(weights)
