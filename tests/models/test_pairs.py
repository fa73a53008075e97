"""Pairs of generator and discriminator: counts, shapes, initial values, the class that a conditional pair is told."""

import dataclasses

import pytest
import torch
from torch import nn

from fedtail.errors import ConfigError
from fedtail.models import DCGAN28, DCGAN32, MODELS
from fedtail.models.gan import is_pair, with_label
from fedtail.task import build_task

HALF = DCGAN28(width=32, latent=64)


def sizes(module):
    return [sum(p.numel() for p in part.parameters()) for part in (module.generator, module.discriminator)]


def statistics(module):
    parts = (module.generator, module.discriminator)
    return [sum(b.numel() for b in part.buffers() if b.is_floating_point()) for part in parts]


@pytest.mark.parametrize(
    ("spec", "shape", "parameters", "buffers"),
    [
        (DCGAN28(), (1, 28, 28), [759_680, 138_624], [384, 256]),
        (HALF, (1, 28, 28), [234_176, 36_544], [192, 128]),
        (DCGAN32(), (1, 32, 32), [1_066_880, 661_248], [896, 768]),
        (DCGAN32(), (3, 32, 32), [1_068_928, 663_296], [896, 768]),
        # 100 x 128 x 49 more for twice the input, 10 x 100 embeddings; 16 x 64 for one more channel, 10 x 784
        (DCGAN28(conditional=True), (1, 28, 28), [759_680 + 627_200 + 1000, 138_624 + 1024 + 7840], [384, 256]),
        (DCGAN28(norm="group"), (1, 28, 28), [759_680, 138_624], [0, 0]),
    ],
)
def test_counts(spec, shape, parameters, buffers):
    """dcgan28: 627,200 + 256 + 131,072 + 128 + 1,024, and 1,024 + 131,072 + 256 + 6,272."""
    module = spec.build(shape, 10)
    assert sizes(module) == parameters
    assert statistics(module) == buffers


@pytest.mark.parametrize(("spec", "shape"), [(HALF, (1, 28, 28)), (DCGAN32(width=4), (3, 32, 48)), (HALF, (1, 8, 8))])
@pytest.mark.parametrize("conditional", [False, True])
def test_shapes(spec, shape, conditional):
    module = dataclasses.replace(spec, conditional=conditional).build(shape, 10)
    code = torch.eye(10)[:4] if conditional else None
    images = module.generator(with_label(torch.randn(4, module.latent), code))
    assert images.shape == (4, *shape)
    assert float(images.detach().abs().max()) <= 1
    assert module.discriminator(with_label(images, code)).shape == (4, 1)
    assert module(images).shape == (4, 1)


def test_initial_values():
    torch.manual_seed(0)
    module = DCGAN28().build((1, 28, 28), 10)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            assert layer.bias is None
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        if isinstance(layer, nn.BatchNorm2d):
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
            assert float(layer.weight.detach().mean()) == pytest.approx(1, abs=0.01)
            assert not layer.bias.detach().any()
    slopes = [m.negative_slope for m in module.discriminator.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2, 0.2]


def test_a_conditional_pair_hears_the_class():
    module = DCGAN28(width=4, latent=3, conditional=True).build((1, 8, 8), 10).eval()
    z, x = torch.randn(1, 3), torch.rand(1, 1, 8, 8)
    for part, given in ((module.generator, z), (module.discriminator, x)):
        first, second = (part(with_label(given, torch.eye(10)[[c]])) for c in (2, 7))
        assert not torch.equal(first, second)
    plane = module.discriminator.embedding.weight[7].reshape(1, 1, 8, 8)
    told = module.discriminator.layers(torch.cat([x, plane], 1))
    torch.testing.assert_close(module.discriminator(with_label(x, torch.eye(10)[[7]])), told)


def test_labels_stand_behind_the_channels():
    found = with_label(torch.zeros(2, 3, 4, 4), torch.eye(5)[:2])
    assert found.shape == (2, 8, 4, 4)
    assert found[1].sum((1, 2)).tolist() == [0, 0, 0, 0, 16, 0, 0, 0]


def test_what_is_a_pair():
    for name, spec in MODELS.items():
        module = spec().build((3, 32, 32), 10) if name in ("dcgan28", "dcgan32", "mlp") else None
        if module is not None:
            assert is_pair(module) == name.startswith("dcgan")
    task = build_task(lambda: HALF.build((1, 8, 8), 10), 10, (1, 8, 8))
    assert task.batch_statistics
    assert task.num_classes == 10


def test_errors():
    for bad, words in [
        (lambda: DCGAN28(width=0), "width and latent must be >= 1, got 0, 100"),
        (lambda: DCGAN32(norm="layer"), "must be 'batch' or 'group', got 'layer'"),
        (lambda: DCGAN32().build((3, 28, 28), 10), "multiples of 8, got 28 x 28"),
        (lambda: DCGAN28().build((64,), 10), "needs images"),
    ]:
        with pytest.raises(ConfigError, match=words):
            bad()
