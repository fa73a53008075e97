"""Drawing images from what a generative method has learned, and pictures of them.

A mixture of generators is sampled by quotas: of N images the generator k makes N_k, its share of N rounded by largest
remainders, from latents of a stream of its own, so that neither the order nor the number of generators changes an image.
A run folder is enough to draw from; the training data are not needed.
"""

import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedtail import config, gan, trees
from fedtail.algorithm import Algorithm, Context, Mixture, Phase, Round
from fedtail.checkpoint import load_checkpoint
from fedtail.engines.base import Setting, blame, one_thread
from fedtail.errors import CheckpointError, ConfigError
from fedtail.federation import check_device
from fedtail.files import write_atomic
from fedtail.local import overlay
from fedtail.losses import one_hot
from fedtail.models.gan import with_label
from fedtail.seeds import Stream, generator
from fedtail.task import Task, Variables, build_task
from fedtail.trees import Tree

Array = np.ndarray[Any, Any]

PIECE = 500
"""Images that are made at once."""
GRID = 64
"""Images in a round's picture."""


class Samples(NamedTuple):
    """Images and where they come from."""

    images: Tensor  # [N, channels, height, width] in [-1, 1], on the CPU
    generators: Array  # (N,) int64, which generator of the mixture
    labels: Array  # (N,) int64, the class that was asked for; -1: the pair is told no class


def quotas(shares: Array, count: int) -> Array:
    """Rounds count * shares to integers that sum to count, by largest remainders; ties go to the lower index.

    Args:
        shares: >= 0, not all 0; normalised here.
        count: >= 0.

    Returns:
        int64, of the same shape.

    >>> quotas(np.array([0.5, 0.25, 0.25]), 6).tolist()
    [3, 2, 1]
    """
    exact = count * (shares / shares.sum()).ravel()
    found = np.floor(exact + 1e-9).astype(np.int64)  # 0.29 * 100 is 28.99...
    order = np.argsort(-(exact - found).round(9), kind="stable")
    found[order[: count - found.sum()]] += 1
    return found.reshape(shares.shape)


@dataclass(frozen=True)
class Sampler:
    """A mixture of generators, ready to draw from.

    Args:
        task: the pair.
        mixture: what is drawn from.
        seed: of the experiment; equal seeds give equal images.
    """

    task: Task
    mixture: Mixture
    seed: int

    @property
    def conditional(self) -> bool:
        """Says whether the pair is told a class."""
        return bool(self.task.module.conditional)

    def quota(self, count: int, label: int | None = None) -> Array:
        """Returns how many images of each class (one column if the pair is told none) each generator makes, int64."""
        shares = self.mixture.shares.double().numpy(force=True)
        if label is not None:
            if not self.conditional:
                raise ConfigError("these generators are told no class, so none can be asked for. Train with "
                                  "model.conditional = true (and algorithm.weights = 'classes' for effgan).")  # fmt: skip
            if not 0 <= label < shares.shape[1] or not shares[:, label].sum():
                raise ConfigError(
                    f"class {label}: no generator makes it; there are classes 0 to {shares.shape[1] - 1}."
                )
            shares = shares * (np.arange(shares.shape[1]) == label)
        return quotas(shares if self.conditional else shares.sum(1, keepdims=True), count)

    def draw(self, count: int, label: int | None = None, shuffle: bool = True) -> Samples:
        """Draws images, in evaluation mode.

        Args:
            count: number of images, >= 1.
            label: the class, for pairs that are told one; None: every class by its share.
            shuffle: mix the generators' images; else they stand in order of generator and class.
        """
        if count < 1:
            raise ConfigError(f"count must be >= 1, got {count}.")
        quota = self.quota(count, label)
        parts = [self._of(k, row) for k, row in enumerate(quota) if row.sum()]
        images = torch.cat([p.images for p in parts])
        makers, labels = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
        order = generator(self.seed, Stream.SAMPLES).permutation(count) if shuffle else np.arange(count)
        return Samples(images[torch.from_numpy(order)], makers[order], labels[order])

    def _of(self, number: int, row: Array) -> Samples:
        """Draws from one generator so many images of each class."""
        count = int(row.sum())
        labels = np.repeat(np.arange(len(row)), row) if self.conditional else np.full(count, -1)
        return Samples(self.images(number, self.latents(number, row)), np.full(count, number), labels)

    def latents(self, number: int, row: Array) -> Tensor:
        """Returns the latents of a generator for so many images of each class, with their codes where it is told one."""
        task, rng = self.task, generator(self.seed, Stream.SAMPLES, number)
        drawn = rng.standard_normal((int(row.sum()), gan.latent_size(task)))
        z = torch.from_numpy(drawn).to(task.device, task.dtype)
        if not self.conditional:
            return z
        labels = torch.from_numpy(np.repeat(np.arange(len(row)), row)).to(task.device)
        return with_label(z, one_hot(labels, task.num_classes, task.dtype))

    def images(self, number: int, z: Tensor) -> Tensor:
        """Returns one generator's images of latents [N, latent (+ C)], on the CPU."""
        network: Variables = trees.tree_map(lambda t: t[number], self.mixture.networks)
        variables, worker = overlay(self.task.initial, network), self.task.worker()
        with torch.no_grad(), one_thread():
            parts = [worker.apply(variables, part, part="generator", train=False)[0].cpu() for part in z.split(PIECE)]
        return torch.cat(parts)


def averaged(mixture: Mixture) -> Mixture:
    """Returns the one generator whose tensors are the means of the mixture's, weighted by their shares.

    Of EFFGAN's experts it is what FedGAN would have made of them. Integer counters are rounded.
    """
    weight = mixture.shares.sum(1)

    def mean(stack: Tensor) -> Tensor:
        found = torch.tensordot(weight.double(), stack.double(), dims=1)[None]
        return found.to(stack.dtype) if stack.is_floating_point() else found.round().to(stack.dtype)

    return Mixture(mixture.shares.sum(0, keepdim=True), trees.tree_map(mean, mixture.networks))


def recalibrated(found: Sampler, number: int = 0, count: int = 2000) -> Sampler:
    """Returns one generator of a mixture with batch statistics measured anew, on generated images alone.

    Averaged statistics need not fit an averaged generator; a server can repair them without data.

    Args:
        found: the mixture.
        number: which generator.
        count: latents that the statistics are of.
    """
    mixture, module = found.mixture, copy.deepcopy(found.task.module)
    network: Variables = trees.tree_map(lambda t: t[number], mixture.networks)
    whole = overlay(found.task.initial, network)
    module.load_state_dict({**whole.params, **whole.buffers})
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all pieces
    classes = mixture.shares.shape[1]
    z = found.latents(number, np.full(classes, count // classes))
    with torch.no_grad(), one_thread():
        for part in z.split(PIECE):
            module.train().get_submodule("generator")(part)
    buffers = {k: b[None] for k, b in module.named_buffers() if k in network.buffers}
    own = {k: v[number : number + 1] for k, v in mixture.networks.params.items()}
    return Sampler(found.task, Mixture(mixture.shares.sum(0, keepdim=True), Variables(own, buffers)), found.seed)


def sampler(algorithm: Algorithm, task: Task, constants: Tree, server: Tree, here: Round, seed: int) -> Sampler:
    """Returns what to draw from after the round `here`."""
    with torch.no_grad(), one_thread(), blame("generators"):
        return Sampler(task, algorithm.generators(Context(task.worker(), here, constants, None), server), seed)


def load(folder: str | Path, checkpoint: str = "checkpoint") -> Sampler:
    """Returns what a run has learned, from its folder alone: no training data are read.

    Raises:
        CheckpointError: it is not a run folder, or not one of a generative method.
    """
    path = Path(folder)
    if not (path / "config.toml").is_file():
        raise CheckpointError(f"{path} is not a run folder: it has no config.toml. `fedtail run` makes one.")
    experiment = config.load(path)
    if not experiment.algorithm.generative:
        raise CheckpointError(f"{path} is a run of {config.name_of(experiment.algorithm)}, which makes no images; "
                              "fedgan and effgan do.")  # fmt: skip
    check_device(experiment.device)
    snapshot = load_checkpoint(path / f"{checkpoint}.safetensors", config.fingerprint(experiment), experiment.device)
    meta = snapshot.meta
    task = build_task(
        lambda: experiment.model.build(tuple(meta["shape"]), meta["classes"]), meta["classes"], tuple(meta["shape"]),
        seed=experiment.seed, dtype=getattr(torch, experiment.dtype), device=experiment.device,
    )  # fmt: skip
    algorithm = experiment.algorithm
    task = algorithm.stage_task(task, meta["stage"])
    constants = algorithm.constants(task, generator(experiment.seed, Stream.CONSTANTS))
    here = Round(meta["round"] - 1, Phase(), 0, 0, experiment.rounds)
    return sampler(algorithm, task, constants, snapshot.server, here, experiment.seed)


def to_bytes(images: Tensor) -> Array:
    """Returns images [N, C, H, W] in [-1, 1] as uint8 [N, C, H, W]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def grid(images: Array, columns: int = 8) -> Array:
    """Lays uint8 images [N, C, H, W] side by side, with a white line between them; returns [height, width, C]."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 2) + 2, (i % columns) * (width + 2) + 2
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return sheet


def save_picture(path: Path, pixels: Array, scale: int = 1) -> None:
    """Writes uint8 pixels [height, width, 1 or 3] as a PNG, each `scale` times as wide."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, file.getvalue())


def round_picture(folder: Path, setting: Setting, server: Tree, here: Round) -> None:
    """Writes a round's picture, samples/round-0007.png for the eighth: 64 images, the generators one after another."""
    found = sampler(setting.algorithm, setting.task, setting.constants, server, here, setting.seed)
    images = to_bytes(found.draw(GRID, shuffle=False).images)
    save_picture(folder / "samples" / f"round-{here.index:04d}.png", grid(images), 2)
