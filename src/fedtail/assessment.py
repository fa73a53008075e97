"""What a finished generative run is worth: its images against the test set, in features of one's choice.

Several readings of one run are judged, each by as many images: "model", what the method draws from; for an ensemble also
"averaged", the one generator that FedGAN would have made of the experts, "recalibrated", the same with batch statistics
measured anew on its own images, and "common", the generator that was fine-tuned.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail import config, extractors, generation, quality
from fedtail.algorithm import Mixture
from fedtail.data.catalog import load
from fedtail.data.dataset import Dataset
from fedtail.data.federated import FederatedData
from fedtail.extractors import Array, Classifier, Feature, FeatureNet, scaled
from fedtail.federation import federate
from fedtail.generation import Sampler, Samples
from fedtail.seeds import Stream, generator
from fedtail.task import Variables
from fedtail.trees import tree_map

NEIGHBOURS = 5000
"""Images of each kind of which distances are computed for precision, recall, density and coverage."""
EACH = 1000
"""Images of each expert."""


def readings(found: Sampler) -> dict[str, Sampler]:
    """Returns the ways to draw from a run: "model", and for ensembles "averaged", "recalibrated" (BatchNorm), "common"."""
    ways, mixture = {"model": found}, found.mixture
    if len(mixture.shares) == 1 or not float(mixture.shares[1:].sum()):
        return ways
    first: Variables = tree_map(lambda t: t[:1], mixture.networks)
    common = Mixture(mixture.shares.sum(0, keepdim=True), first)
    ways["averaged"] = Sampler(found.task, generation.averaged(mixture), found.seed)
    if found.task.batch_statistics:
        ways["recalibrated"] = generation.recalibrated(ways["averaged"])
    return {**ways, "common": Sampler(found.task, common, found.seed)}


def assess(
    folder: str | Path, feature: Feature = "classifier", count: int = 10_000, weights: str = "", full: bool = True,
    only: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Judges a run's checkpoint.

    Args:
        folder: the run.
        feature: the network that distances are measured in.
        count: images of each reading and of the test set, no more than that has; compare only equal counts.
        weights: file of the feature "inception".
        full: also what needs the clients' data: experts one by one, nearest training images, training on the images.
        only: names of the readings to judge besides "model"; none: all.

    Returns:
        Plain values: "feature", "count", "floor" (the Frechet distance of real training images), "judge" (the classifier
        that names classes, its accuracy on the test set) and scores by reading; with `full` "experts", "memory", "use".

    Raises:
        CheckpointError: it is not a run of a generative method.
    """
    found, options = generation.load(folder), config.load(folder)
    data = options.data
    real = real_images(data.name, data.folder, data.image_size, feature, weights, count)
    judge, count = real.judge, len(real.features)
    clients = federate(data, options.seed)
    held, rng = clients.counts(), generator(options.seed, Stream.QUALITY)
    ways = {name: way for name, way in readings(found).items() if not only or name in {"model", *only}}
    drawn = {name: way.draw(count) for name, way in ways.items()}
    result: dict[str, Any] = {
        "feature": real.net.name, "count": count, "floor": real.floor,
        "judge": {"name": judge.name, "accuracy": real.accuracy},
        "readings": {name: _scores(samples, real, held.sum(0), rng) for name, samples in drawn.items()},
    }  # fmt: skip
    if len(found.mixture.shares) == 1 + len(held):  # a generator a client, behind the common one
        samples = drawn["model"]
        pure = quality.purity(judge.labels(samples.images), samples.generators - 1, held)
        result["readings"]["model"]["purity"] = float(np.nanmean(pure))
        if full:
            result["experts"] = experts(found, real.net, judge, real.features, held)
            result["memory"] = memory(found, clients, real.images, real.labels)
    if full:
        test = real.dataset.test
        accurate = use(drawn["model"], judge, scaled(test.array), test.y, real.dataset.num_classes)
        result["use"] = {"accuracy": accurate, "gap": real.accuracy - accurate}
    return result


class Real(NamedTuple):
    """Test images that generated ones are compared with, and what judges both."""

    dataset: Dataset
    net: FeatureNet
    judge: Classifier
    images: Tensor  # [count, channels, height, width] in [-1, 1]
    labels: Array  # (count,) int64
    features: Array  # [count, d]
    moments: quality.Moments
    floor: float  # Frechet distance of as many training images
    accuracy: float  # of the judge, on the whole test set


@lru_cache(maxsize=4)  # the runs of a sweep share them
def real_images(name: str, folder: str, size: int, feature: Feature, weights: str, count: int) -> Real:
    """Returns the real images of a data set's test split, the same for every run of it: `count` of them, or all."""
    dataset = load(name, folder or None, size=size or None)
    judge = extractors.classifier(dataset)
    net: FeatureNet = judge if feature == "classifier" else extractors.feature_net(feature, dataset, weights)
    rng, count = generator(extractors.SEED, Stream.QUALITY, 1), min(count, len(dataset.test))
    rows = rng.permutation(len(dataset.test))[:count]
    images = scaled(dataset.test.array[rows])
    train = scaled(dataset.train.array[rng.permutation(len(dataset.train))[:count]])
    features = net.features(images)
    moments = quality.moments(features)
    floor = quality.frechet(quality.moments(net.features(train)), moments, net.ridge)
    accurate = accuracy(judge, scaled(dataset.test.array), dataset.test.y)
    return Real(dataset, net, judge, images, dataset.test.y[rows], features, moments, floor, accurate)


def accuracy(judge: Classifier, x: Tensor, y: Array) -> float:
    """Returns the share of images [N, ...] that a classifier gives the class y (N,)."""
    return float((judge.labels(x) == y).mean())


def _scores(samples: Samples, real: Real, target: Array, rng: np.random.Generator) -> dict[str, float]:
    """Returns the scores of one reading's images; the clients' pooled class counts are the target of their classes."""
    fake, judge = real.net.features(samples.images), real.judge
    probabilities = judge.judged(fake if real.net is judge else judge.features(samples.images))
    kernel, kernel_spread = quality.kernel_distance(real.features, fake, rng)
    score, score_spread = quality.classifier_score(probabilities)
    some = real.features[:NEIGHBOURS], fake[:NEIGHBOURS]
    return {
        "fid": quality.frechet(real.moments, quality.moments(fake), real.net.ridge),
        "kid": kernel, "kid_spread": kernel_spread, "score": score, "score_spread": score_spread,
        **quality.precision_recall(*some), **quality.density_coverage(*some),
        **quality.modes(probabilities.argmax(1), target),
        "confidence": float(probabilities.max(1).mean()),
    }  # fmt: skip


def experts(found: Sampler, net: FeatureNet, judge: Classifier, real: Array, held: Array) -> dict[str, list[Any]]:
    """Returns scores of every expert by itself and, as the last entry, of the ensemble, from equally many images.

    Args:
        found: an ensemble.
        net: the feature network.
        judge: names classes.
        real: features of real images.
        held: class counts [clients, classes].
    """
    rows: list[Mapping[str, Any]] = []
    for k, own in enumerate(held):
        if not float(found.mixture.shares[1 + k].sum()):
            continue
        only = torch.zeros_like(found.mixture.shares)
        only[1 + k] = found.mixture.shares[1 + k] / found.mixture.shares[1 + k].sum()
        images = Sampler(found.task, Mixture(only, found.mixture.networks), found.seed).draw(EACH).images
        labels = judge.labels(images)
        pure = float((own[labels] > 0).mean())
        rows.append({"client": k, "purity": pure, **_near(net, images, real), **quality.modes(labels, own)})
    images = found.draw(EACH).images
    rows.append({"client": -1, "purity": None, **_near(net, images, real),
                 **quality.modes(judge.labels(images), held.sum(0))})  # fmt: skip
    return {name: [row[name] for row in rows] for name in rows[0]}


def _near(net: FeatureNet, images: Tensor, real: Array) -> dict[str, float]:
    fake = net.features(images)
    some = real[: len(fake)]
    return {**quality.precision_recall(some, fake), **quality.density_coverage(some, fake)}


def memory(found: Sampler, clients: FederatedData, test: Tensor, labels: Array) -> dict[str, float]:
    """Returns whether experts repeat their clients' images: pixel distances to the nearest one, medians over images.

    "generated": of an expert's images; "held_out": of real images that it has not seen, of the classes of its client;
    "ratio": the first over the second, well below 1 if it repeats; "closer": share of generated images that are nearer
    to a training image than 99 of 100 held-out ones are (.01 is expected of fresh images).

    Args:
        found: an ensemble.
        clients: what its clients hold.
        test: real images that nobody holds, [N, channels, height, width] in [-1, 1].
        labels: their classes, (N,).
    """
    makes, real, closer = list[Array](), list[Array](), list[float]()
    for k, rows in enumerate(clients.owners):
        shares = found.mixture.shares[1 + k]
        if not float(shares.sum()):
            continue
        only = torch.zeros_like(found.mixture.shares)
        only[1 + k] = shares / shares.sum()
        images = Sampler(found.task, Mixture(only, found.mixture.networks), found.seed).draw(200).images
        seen = scaled(clients.columns["x"].index_select(0, torch.from_numpy(rows)).numpy(force=True))
        own = np.flatnonzero(clients.counts_of([k])[0] > 0)
        held_out = test[torch.from_numpy(np.isin(labels, own))][:200]
        makes.append(quality.nearest(_flat(images), _flat(seen)))
        real.append(quality.nearest(_flat(held_out), _flat(seen)))
        closer.append(float((makes[-1] < np.quantile(real[-1], 0.01)).mean()))
    first, second = (float(np.median(np.concatenate(found))) for found in (makes, real))
    return {"generated": first, "held_out": second, "ratio": first / second, "closer": float(np.mean(closer))}


def _flat(images: Tensor) -> Array:
    return images.flatten(1).double().numpy()


def use(samples: Samples, judge: Classifier, x: Tensor, y: Array, classes: int) -> float:
    """Trains a classifier on images alone and returns its accuracy on real ones, x [N, ...] of classes y (N,).

    Labels are those that were asked for, or, of a pair that is told no class, the judge's: then only the diversity of the
    images is measured.
    """
    labels = samples.labels if samples.labels.min() >= 0 else judge.labels(samples.images)
    return accuracy(extractors.fit(samples.images.float(), labels, classes), x, y)
