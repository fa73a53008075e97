"""Networks: counts, features / head / stages, vmap(grad) against a plain loop, Dropout as data, the user's modules."""

import copy
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtail.errors import ConfigError, TrainingError
from fedtail.models import (
    MLP,
    MODELS,
    BranchCNN,
    LeNet,
    ModelSpec,
    ResNet8,
    ResNet18,
    ResNet20,
    ResNet34,
    ResNet50,
    Unified,
    UserModel,
    model_spec,
)
from fedtail.models.layers import Dropout, Network, replace_dropout
from fedtail.models.resnet import Bottleneck, ResNet, _project
from fedtail.models.user import find_classifier

ALL = [
    MLP(),
    MLP(hidden=(24, 12), dropout=0.25),
    LeNet(),
    BranchCNN(),
    Unified(dropout=0.0),
    ResNet8(),
    ResNet8(norm="batch"),
    ResNet20(),
    ResNet20(norm="group"),
    ResNet18(),
    ResNet18(norm="group"),
    ResNet34(),
    ResNet50(),
    ResNet50(norm="group"),
]


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    """One thread, as in fedtail's workers; several would wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def built(spec: ModelSpec, shape: tuple[int, ...] = (3, 16, 16), classes: int = 10) -> Network:
    network = spec.build(shape, classes)
    assert isinstance(network, Network)
    return network


def on_meta(spec: ModelSpec, shape: tuple[int, ...], classes: int = 10) -> Network:
    with torch.device("meta"):
        return built(spec, shape, classes)


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "count"),
    [
        (MLP(), (1, 28, 28), 10, 101_770),
        (MLP(hidden=(200, 200)), (1, 28, 28), 10, 199_210),
        (MLP(hidden=()), (20,), 10, 210),
        (LeNet(), (3, 32, 32), 10, 62_006),
        (LeNet(), (1, 28, 28), 10, 44_426),
        (ResNet8(), (3, 32, 32), 10, 78_042),
        (ResNet8(norm="batch"), (3, 32, 32), 10, 78_042),
        (ResNet20(), (3, 32, 32), 10, 269_722),
        (ResNet20(norm="group"), (3, 32, 32), 10, 269_722),
        (ResNet20(), (3, 32, 32), 100, 275_572),
        (ResNet20(), (3, 32, 32), 200, 282_072),
        (ResNet18(), (3, 32, 32), 10, 11_173_962),
        (ResNet18(norm="group"), (3, 32, 32), 10, 11_173_962),
        (ResNet34(), (3, 32, 32), 10, 21_282_122),
        (ResNet50(), (3, 224, 224), 1000, 25_557_032),
        (ResNet50(), (3, 224, 224), 10, 23_528_522),
    ],
)
def test_parameter_count(spec: ModelSpec, shape: tuple[int, ...], classes: int, count: int):
    """data_models section 5 and fedga's table; the others by hand, a normalisation has a scale and a shift per channel.

    resnet8: stem 432 + 32; stage 1: 2 * 2,304 + 64; stage 2: 4,608 + 9,216 + 128, shortcut 512 + 64; stage 3: 18,432 +
    36,864 + 256, shortcut 2,048 + 128; head 650: 78,042.

    resnet18: stem 1,728 + 128 = 1,856; stage 1: 4 * 36,864 + 512 = 147,968; stage 2: 73,728 + 3 * 147,456 + 1,024,
    shortcut 8,192 + 256 = 525,568; stage 3: 294,912 + 3 * 589,824 + 2,048, shortcut 32,768 + 512 = 2,099,712; stage 4:
    1,179,648 + 3 * 2,359,296 + 4,096, shortcut 131,072 + 1,024 = 8,393,728; head 512 * 10 + 10 = 5,130.
    Sum 11,173,962.

    resnet34: resnet18 and 1, 2, 4, 1 more blocks of 73,984, 295,424, 1,180,672, 4,720,640: + 10,108,160 = 21,282,122.

    resnet50: the well-known 25,557,032 for ImageNet's 1,000 classes; for 10 it is 990 * 2,049 less.
    """
    assert sum(p.numel() for p in on_meta(spec, shape, classes).parameters()) == count


def test_resnet50_takes_images_of_224_pixels():
    """ImageNet's: 112 after the stem's convolution, 56 after its pool, 7 at the end."""
    network = on_meta(ResNet50(), (3, 224, 224))
    x = network.stem(torch.empty(2, 3, 224, 224, device="meta"))
    assert x.shape == (2, 64, 56, 56)
    assert network.stage4(network.stage3(network.stage2(network.stage1(x)))).shape == (2, 2048, 7, 7)


@pytest.mark.parametrize("spec", ALL, ids=repr)
def test_features_head_and_logits_fit_together(spec: ModelSpec):
    network = built(spec).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = network.features(x)
        logits = network(x)
    assert network.classifier == "head"
    assert isinstance(network.head, nn.Linear)
    assert features.shape == (2, network.head.in_features)
    assert logits.shape == (2, 10)
    assert torch.equal(network.head(features), logits)
    assert float(features.min()) >= 0 or isinstance(spec, MLP)


@pytest.mark.parametrize(
    ("spec", "width"),
    [
        (MLP(hidden=(24, 12)), 12),
        (MLP(hidden=()), 768),
        (LeNet(), 84),
        (ResNet8(), 64),
        (ResNet20(), 64),
        (ResNet18(), 512),
        (ResNet34(), 512),
        (ResNet50(), 2048),
    ],
    ids=repr,
)
def test_feature_width(spec: ModelSpec, width: int):
    assert on_meta(spec, (3, 16, 16)).head.in_features == width


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (ResNet8(), [(2, 16, 32, 32), (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]),
        (ResNet20(), [(2, 16, 32, 32), (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]),
        (ResNet18(), [(2, 64, 32, 32), (2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4)]),
        (ResNet50(), [(2, 64, 8, 8), (2, 256, 8, 8), (2, 512, 4, 4), (2, 1024, 2, 2), (2, 2048, 1, 1)]),
        (ResNet18(stem="imagenet"), [(2, 64, 8, 8), (2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2), (2, 512, 1, 1)]),
        (
            ResNet50(stem="cifar"),
            [(2, 64, 32, 32), (2, 256, 32, 32), (2, 512, 16, 16), (2, 1024, 8, 8), (2, 2048, 4, 4)],
        ),
    ],
    ids=repr,
)
def test_shapes_of_the_maps(spec: ModelSpec, shapes: list[tuple[int, ...]]):
    """Strides 1-2-2(-2) after a stem that keeps the size (cifar) or divides it by 4 (imagenet, resnet50's)."""
    network = on_meta(spec, (3, 32, 32))
    x = torch.empty(2, 3, 32, 32, device="meta")
    found: list[tuple[int, ...]] = []
    for child in list(network.children())[:-1]:
        x = child(x)
        found.append(tuple(x.shape))
    assert found == shapes


@pytest.mark.parametrize("spec", ALL, ids=repr)
def test_stages_hold_each_parameter_once_and_end_with_the_head(spec: ModelSpec):
    network = on_meta(spec, (3, 16, 16))
    stages = network.stages()
    names, listed = [name for name, _ in network.named_parameters()], list(itertools.chain(*stages))
    assert sorted(listed) == sorted(names)
    assert listed == names or isinstance(spec, Unified)  # its groups hold both branches' layers of one depth
    assert stages[-1] == ["head.weight", "head.bias"]
    assert all(stages)


def test_number_of_stages():
    """MLP: one per hidden layer; LeNet: four layers; ResNets: stem and stages; everywhere the head."""
    shape = (3, 16, 16)
    specs = [MLP(hidden=()), MLP(hidden=(8, 8), dropout=0.5), LeNet(), ResNet8(), ResNet20(), ResNet18()]
    assert [len(on_meta(spec, shape).stages()) for spec in specs] == [1, 3, 5, 5, 5, 6]


def test_only_batch_norm_has_buffers():
    for spec in (ResNet8(), ResNet20(), ResNet18(), ResNet34(), ResNet50()):
        assert not list(on_meta(dataclasses.replace(spec, norm="group"), (3, 16, 16)).buffers())
        assert list(on_meta(dataclasses.replace(spec, norm="batch"), (3, 16, 16)).buffers())


def test_groups_of_group_norm():
    def groups(spec: ModelSpec) -> set[int]:
        return {m.num_groups for m in on_meta(spec, (3, 16, 16)).modules() if isinstance(m, nn.GroupNorm)}

    assert groups(ResNet8()) == groups(ResNet20(norm="group")) == {8}
    assert groups(ResNet18(norm="group")) == groups(ResNet34(norm="group")) == groups(ResNet50(norm="group")) == {32}


def test_resnet20_shortcut_subsamples_and_pads_on_both_sides():
    """From 16 to 32 channels: 8 of zeros, the 16 of every second pixel, 8 of zeros (planes / 4 on each side)."""
    network = built(ResNet20())
    shortcut = network.get_submodule("stage2.0.shortcut")
    x = torch.randn(2, 16, 6, 6)
    expected = torch.zeros(2, 32, 3, 3)
    for row, column in itertools.product(range(3), range(3)):
        expected[:, 8:24, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(shortcut(x), expected)


def test_initial_values():
    """resnet20's convolutions: standard deviation sqrt(2 / (64 * 9)); PyTorch's linear: uniform on +-1 / sqrt(64)."""
    network = built(ResNet20())
    weight = network.get_parameter("stage3.2.conv2.weight")
    assert float(weight.detach().std()) == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    assert 0.95 / 8 < float(network.head.weight.detach().abs().max()) <= 1 / 8
    # PyTorch's default convolution is uniform on +-1 / sqrt(fan_in).
    default = built(ResNet8()).get_parameter("stage3.0.conv2.weight")
    assert 0.99 / 24 < float(default.detach().abs().max()) <= 1 / 24


# The whole network under torch.func, as the vmap engine runs it.


def draw_masks(network: nn.Module, batch: int, clients: int) -> dict[str, Tensor]:
    widths = {f"hidden{i}.2": width for i, width in enumerate((24, 12), 1)}
    names = [name for name, layer in network.named_modules() if isinstance(layer, Dropout)]
    return {name: torch.randint(0, 2, (clients, batch, widths[name])).double() for name in names}


def set_masks(network: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        network.get_submodule(name).__dict__["mask"] = mask


# GroupNorm under vmap is in resnet8 and resnet20 too, and the large networks take long.
SMALL = [spec for spec in ALL if not isinstance(spec, ResNet34 | ResNet50) and spec != ResNet18(norm="group")]


@pytest.mark.parametrize("spec", SMALL, ids=repr)
def test_vmap_of_grad_equals_a_plain_loop(spec: ModelSpec):
    network = built(spec)
    assert any(isinstance(layer, Dropout) for layer in network.modules()) == (getattr(spec, "dropout", 0) > 0)
    compare_vmap_with_a_plain_loop(network.double())


def test_vmap_of_grad_equals_a_plain_loop_with_bottlenecks():
    """resnet50's kind of stem and its blocks, with two stages of 4 and 8 channels."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    network = ResNet(stem, Bottleneck, (1, 2), (4, 8), nn.BatchNorm2d, _project, 10)
    compare_vmap_with_a_plain_loop(network.double())


def compare_vmap_with_a_plain_loop(network: Network) -> None:
    clients, batch = 3, 4
    x = torch.randn(clients, batch, 3, 16, 16, dtype=torch.float64)
    y = torch.randint(0, 10, (clients, batch))
    masks = draw_masks(network, batch, clients)
    copies = [copy.deepcopy(network) for _ in range(clients)]
    for i, own in enumerate(copies):
        with torch.no_grad():
            for p in own.parameters():
                p.mul_(1 + 0.1 * i)
            for b in own.buffers():
                b.add_(i)
    params = {k: torch.stack([own.get_parameter(k).detach() for own in copies]) for k, _ in network.named_parameters()}
    buffers = {k: torch.stack([own.get_buffer(k) for own in copies]) for k, _ in network.named_buffers()}

    def one(params: dict[str, Tensor], buffers: dict[str, Tensor], masks: dict[str, Tensor], x: Tensor, y: Tensor):
        def loss(params: dict[str, Tensor]):
            new = {k: b.clone() for k, b in buffers.items()}
            set_masks(network, masks)
            logits = torch.func.functional_call(network, {**params, **new}, (x,))
            return F.cross_entropy(logits, y), new

        return torch.func.grad(loss, has_aux=True)(params)

    grads, new_buffers = torch.vmap(one, randomness="error")(params, buffers, masks, x, y)

    for i, own in enumerate(copies):
        set_masks(own, {name: mask[i] for name, mask in masks.items()})
        F.cross_entropy(own(x[i]), y[i]).backward()
        for k, p in own.named_parameters():
            torch.testing.assert_close(grads[k][i], p.grad, rtol=0, atol=1e-9)
        for k, b in own.named_buffers():
            torch.testing.assert_close(new_buffers[k][i], b, rtol=0, atol=1e-9)


# Specifications


def test_names():
    resnets = ["resnet8", "resnet20", "resnet18", "resnet34", "resnet50"]
    assert list(MODELS) == ["mlp", "lenet", *resnets, "branch_cnn", "unified", "dcgan28", "dcgan32"]
    assert model_spec("mlp") == MLP(hidden=(128,), dropout=0.0)
    assert {name: getattr(model_spec(name), "norm", None) for name in MODELS if name.startswith("resnet")} == {
        "resnet8": "group",
        "resnet20": "batch",
        "resnet18": "batch",
        "resnet34": "batch",
        "resnet50": "batch",
    }
    assert model_spec("nets/mine.py:Net") == UserModel(target="nets/mine.py:Net", options={})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lennet", r"unknown model 'lennet'; did you mean 'lenet'\?"),
        ("ResNet_18", r"unknown model 'ResNet_18'; did you mean 'resnet18'\?"),
        ("vgg", r"unknown model 'vgg'\. Known are mlp, lenet, .* 'file.py:Name'"),
        ("nets.py", r"given as 'file.py:Name', got 'nets.py'"),
        ("nets.py:", r"given as 'file.py:Name', got 'nets.py:'"),
        ("nets.txt:Net", r"given as 'file.py:Name', got 'nets.txt:Net'"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        model_spec(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(hidden=(8, 0)), r"MLP.hidden must hold widths in \[1, inf\), got \(8, 0\)"),
        (lambda: MLP(dropout=1.0), r"MLP.dropout must be in \[0, 1\), got 1.0"),
        (lambda: ResNet18(norm="layer"), r"ResNet18.norm must be 'batch' or 'group', got 'layer'"),
        (lambda: ResNet50(stem="small"), r"ResNet50.stem must be 'cifar' or 'imagenet', got 'small'"),
        (lambda: LeNet().build((3, 15, 32), 10), r"lenet needs images of at least 16 x 16 pixels, got 15 x 32.*mlp"),
        (lambda: LeNet().build((784,), 10), r"lenet needs images of shape .*, got examples of shape \(784,\).*mlp"),
        (
            lambda: ResNet20().build((28, 28), 10),
            r"resnet20 needs images of shape .*, got examples of shape \(28, 28\)",
        ),
        (lambda: ResNet50().build((4, 3, 8, 8), 10), r"resnet50 needs images of shape"),
        (lambda: MLP().build((), 10), r"mlp: an example needs one axis or more"),
        (lambda: MLP().build((3, 0), 10), r"mlp: an example needs one axis or more, none of them empty, got \(3, 0\)"),
        (lambda: ResNet8().build((3, 8, 8), 0), r"resnet8: num_classes must be in \[1, inf\), got 0"),
    ],
)
def test_impossible_options_and_inputs(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_lenet_takes_its_smallest_and_odd_images():
    for size in (16, 19, 33):
        assert LeNet().build((1, size, size + 1), 3)(torch.zeros(2, 1, size, size + 1)).shape == (2, 3)


def test_specifications_do_not_import_torch():
    code = "import sys, fedtail.models as m; m.model_spec('resnet18'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# Dropout


def test_dropout_applies_the_mask_it_was_given():
    """p = 0.2: what is kept is divided by 0.8."""
    layer = Dropout(0.2)
    layer.mask = torch.tensor([[1.0, 0.0, 1.0]])
    x = torch.tensor([[4.0, 5.0, -8.0]])
    assert torch.allclose(layer(x), torch.tensor([[5.0, 0.0, -10.0]]))
    assert not layer.state_dict()
    assert "mask" in layer.__dict__
    assert torch.equal(layer.eval()(x), x)


def test_dropout_without_a_mask():
    layer = Dropout(0.5)
    x = torch.ones(2, 3)
    with pytest.raises(TrainingError, match="draw was forgotten"):
        layer(x)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_refuses_a_mask_of_another_shape():
    layer = Dropout(0.5)
    layer.mask = torch.ones(3)
    with pytest.raises(TrainingError, match=r"mask of shape \(3,\) for an input of shape \(2, 3\)"):
        layer(torch.ones(2, 3))


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_dropout_probability(p: float):
    with pytest.raises(ConfigError, match=r"Dropout.p must be in \[0, 1\)"):
        Dropout(p)


def test_replace_dropout():
    shared = nn.Dropout(0.3)
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    module = nn.Sequential(shared, block, shared, block, nn.Linear(4, 2)).eval()
    # The block is one module at two places, so its layer is one; the bare layer becomes two.
    assert replace_dropout(module) == ["0", "1.1", "2"]
    layers = [module[0], module[2], block[1]]
    assert [type(layer) for layer in layers] == [Dropout] * 3
    assert [layer.p for layer in layers] == [0.3, 0.3, 0.1]
    assert module[0] is not module[2]
    assert not any(layer.training for layer in layers)
    assert replace_dropout(module) == []


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout1d(),
        nn.Dropout2d(),
        nn.Dropout3d(),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
        nn.RReLU(),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.LSTM(4, 4, num_layers=2, dropout=0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_replace_dropout_refuses_other_random_layers(layer: nn.Module):
    module = nn.Sequential()
    module.add_module("body", nn.Sequential(nn.Linear(4, 4), layer))
    with pytest.raises(ConfigError, match=rf"layer 'body.1' \({type(layer).__name__}\)"):
        replace_dropout(module)


def test_replace_dropout_leaves_other_layers_alone():
    module = nn.Sequential(nn.LSTM(4, 4), nn.MultiheadAttention(4, 2))
    before = list(module.modules())
    assert replace_dropout(module) == []
    assert list(module.modules()) == before


def test_replace_dropout_at_the_root():
    with pytest.raises(ConfigError, match=r"Use nn\.Dropout as a layer of its own"):
        replace_dropout(nn.Dropout())


# Modules of the user's

NETS = """
from __future__ import annotations
from dataclasses import dataclass
from functools import partial

from torch import nn


@dataclass
class Options:
    width: int = 4


class Tiny(nn.Module):
    def __init__(self, num_classes, in_channels, width=4):
        super().__init__()
        self.arguments = (num_classes, in_channels, width)
        self.body = nn.Conv2d(in_channels, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def everything(**arguments):
    network = nn.Linear(1, 1)
    network.arguments = arguments
    return network


def by_shape(input_shape, *, scale):
    network = nn.Linear(input_shape[-1], 2)
    network.arguments = (input_shape, scale)
    return network


def no_module(num_classes):
    return num_classes


def fails():
    raise RuntimeError("no luck")


half = partial(Tiny, width=2)
already = nn.Linear(2, 2)
number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def arguments_of(target: str, **options: object) -> object:
    return UserModel(target=target, options=options).build((3, 8, 6), 5).arguments


def test_user_model_gets_what_its_signature_accepts(folder: Path):
    assert arguments_of("nets.py:Tiny") == (5, 3, 4)
    assert arguments_of(f"{folder / 'nets.py'}:Tiny", width=6) == (5, 3, 6)
    assert arguments_of("nets.py:half") == (5, 3, 2)
    assert arguments_of("nets.py:by_shape", scale=0.5) == ((3, 8, 6), 0.5)
    assert arguments_of("nets.py:everything", depth=2) == {
        "input_shape": (3, 8, 6),
        "num_classes": 5,
        "in_channels": 3,
        "depth": 2,
    }
    assert model_spec("nets.py:Tiny").build((3, 8, 6), 5)(torch.zeros(2, 3, 8, 6)).shape == (2, 5)


def test_user_files_of_one_name_stay_apart(folder: Path):
    (folder / "other").mkdir()
    (folder / "other" / "nets.py").write_text(
        "from torch import nn\n\n\ndef Tiny():\n    net = nn.Identity()\n    net.arguments = 'other'\n    return net\n"
    )
    assert arguments_of("other/nets.py:Tiny") == "other"
    assert arguments_of("nets.py:Tiny") == (5, 3, 4)
    assert "nets" not in sys.modules


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("missing.py:Net", {}, r"there is no file .*missing.py. A relative path starts at the working directory"),
        ("nets.py:Tinny", {}, r"has no 'Tinny'; did you mean 'Tiny'\? Networks there: Tiny\."),
        ("nets.py:Zebra", {}, r"has no 'Zebra'\. Networks there: Tiny\."),
        ("nets.py:number", {}, r"'nets.py:number' is of type int, not a network. Name a class derived"),
        ("nets.py:already", {}, r"'nets.py:already' is of type Linear, not a network"),
        ("nets.py:Options", {}, r"'nets.py:Options' is the class Options, not a network"),
        ("nets.py:no_module", {}, r"'nets.py:no_module' returned a int, not a torch.nn.Module"),
        ("nets.py:fails", {}, r"could not be built: RuntimeError: no luck \(line \d+ of .*nets.py\)"),
        ("nets.py:Tiny", {"wdith": 3}, r"has no option 'wdith'; did you mean 'width'\?"),
        ("nets.py:Tiny", {"num_classes": 3}, r"option 'num_classes' comes from the data set"),
        ("nets.py:by_shape", {}, r"needs scale, which fedtail does not supply"),
        ("broken.py:Net", {}, r"could not be run: ZeroDivisionError: division by zero \(line 2 of .*broken.py\)"),
        ("syntax.py:Net", {}, r"could not be run: SyntaxError: .*line 1"),
    ],
)
def test_errors_of_user_models(target: str, options: dict[str, object], message: str):
    Path("broken.py").write_text("x = 1\ny = x / 0\n")
    Path("syntax.py").write_text("class Net(:\n")
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=message):
        UserModel(target=target, options=options).build((3, 8, 8), 5)
    if not target.startswith("nets.py"):
        assert not [name for name in set(sys.modules) - before if name.startswith("fedtail_user_")]


class Classifiers(nn.Module):
    def __init__(self, classifier: object = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        self.head = head if head is not None else nn.Identity()
        self.first = nn.Linear(4, 5)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        self.last = nn.Linear(4, 7)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Classifiers(classifier="first"), "first"),
        (Classifiers(classifier="last", head=nn.Linear(4, 5)), "last"),
        (Classifiers(classifier="body", head=nn.Linear(4, 5)), "head"),
        (Classifiers(classifier=nn.Linear(4, 5)), "body.0"),
        (Classifiers(head=nn.Linear(4, 5)), "head"),
        (Classifiers(head=nn.Linear(4, 6)), "body.0"),
        (Classifiers(head=nn.Conv2d(4, 5, 1)), "body.0"),
        (nn.Sequential(nn.Linear(4, 7)), None),
    ],
)
def test_find_classifier(module: nn.Module, found: str | None):
    assert find_classifier(module, 5) == found


@pytest.mark.parametrize("name", MODELS)
def test_find_classifier_of_own_networks(name: str):
    with torch.device("meta"):
        module = model_spec(name).build((3, 16, 16), 10)
    assert find_classifier(module, 10) == (None if name.startswith("dcgan") else "head")
