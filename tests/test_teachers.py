"""Teachers: their heads, the cache of what they say, the weights they are read from, and the images that they get."""

import dataclasses
import sys
import types
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fedtail
from fedtail import config, teaching
from fedtail.algorithms.client_distillation import ClientDistillation
from fedtail.algorithms.server_distillation import ServerDistillation
from fedtail.config import Data, Experiment, Participation
from fedtail.data.longtail import Exponential, NoTail
from fedtail.data.partition import ClassSpecific
from fedtail.data.plan import LocalWork
from fedtail.errors import ConfigError, DataError
from fedtail.experiment import Federation
from fedtail.federation import federate
from fedtail.models.specs import MLP
from fedtail.teachers import (
    CLIP,
    DINOv2,
    EfficientNetLite0,
    EfficientNetLite2,
    OpenCLIP,
    Timm,
    Trained,
    UserTeacher,
    heads,
    loading,
    store,
)

SPLIT = Data(server=6, longtail=NoTail(), partition=ClassSpecific(clients=5, classes_per_client=2))

COUNTING = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12))
        with torch.no_grad():
            self.body[1].weight.copy_(torch.linspace(-1, 1, 12 * 64).sin().view(12, 64))

    def forward(self, x):
        with open("calls.txt", "a") as file:
            file.write(f"{len(x)} {tuple(x.shape[1:])}\\n")
        return self.body(nn.functional.interpolate(x, size=(8, 8)))

class Scores(Net):
    def forward(self, x):
        h = super().forward(x)
        return h[:, :10], h

class Alone(Net):
    def forward(self, x):
        return super().forward(x)[:, :10]

class Pixels(Net):
    def forward(self, x):
        return x.flatten(1)

class Broken(Net):
    def forward(self, x):
        return super().forward(x)[:, :3]

class NotFinite(Net):
    def forward(self, x):
        return super().forward(x)[:, :10] / 0
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder and cache of its own, with a teacher that notes how often it is asked, and for how many images."""
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(COUNTING)
    return tmp_path


def user(name="Net", **options):
    return UserTeacher(target=f"net.py:{name}", **{"head": "linear_probe", "probe": 10, **options})


def experiment(teacher, algorithm=None, **changes):
    return Experiment(
        rounds=1, algorithm=algorithm or ServerDistillation(), teacher=teacher,
        **{"data": SPLIT, "local": LocalWork(epochs=1), **changes},
    )  # fmt: skip


def asked(folder):
    """The images that the teacher has been asked about since the last look."""
    file = folder / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return sum(int(line.split()[0]) for line in lines)


# ---- heads


def test_a_probe_on_separable_features_makes_no_mistake():
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 4
    h = 0.1 * torch.randn(60, 7, generator=g) + 5 * nn.functional.one_hot(labels, 7)
    weight, bias = heads.fit_probe(h, labels, 4, 0.01)
    assert torch.equal(heads.linear(h, weight, bias).argmax(1), labels)
    assert (weight.shape, bias.shape) == ((4, 7), (4,))


def test_a_probe_is_at_a_minimum_of_its_objective():
    """The gradient of mean CE + decay / 2 |A|^2 on standardised features is 0 there."""
    g = torch.Generator().manual_seed(2)
    h, labels = torch.randn(40, 5, generator=g) * torch.tensor([1, 10, 0.1, 1, 1]) + 3, torch.arange(40) % 3
    weight, bias = heads.fit_probe(h, labels, 3, 0.05)
    mean, std = h.double().mean(0), h.double().std(0, unbiased=False)
    a = (weight.double() * std).requires_grad_()
    b = (bias.double() + weight.double() @ mean).requires_grad_()
    risk = nn.functional.cross_entropy((h.double() - mean) / std @ a.T + b, labels) + 0.025 * a.square().sum()
    grads = torch.autograd.grad(risk, [a, b])
    assert max(float(grad.abs().max()) for grad in grads) < 1e-5


def test_a_constant_feature_does_no_harm_and_an_infinite_one_is_refused():
    h = torch.cat([torch.ones(8, 1), torch.linspace(-1, 1, 8)[:, None]], 1)
    weight, _ = heads.fit_probe(h, (torch.arange(8) > 3).long(), 2, 0.01)
    assert bool(torch.isfinite(weight).all())
    with pytest.raises(fedtail.FedtailError, match="not finite"):
        heads.fit_probe(h / 0, (torch.arange(8) > 3).long(), 2, 0.01)


def words(sentences):
    """Made-up text embeddings: a sentence's letters counted."""
    return torch.tensor([[sentence.count(c) + 0.1 for c in "abcdefghij"] for sentence in sentences])


def test_zero_shot_embeddings_have_norm_one_and_scores_are_bounded_and_blind_to_scale():
    rows = heads.class_embeddings(words, ("a photo of a {class}.", "big {class}"), ("cat", "dog", "bee"))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    each = nn.functional.normalize(words(["a photo of a dog.", "big dog"]).double(), dim=1).mean(0)
    torch.testing.assert_close(rows[1], (each / each.norm()).float(), rtol=0, atol=1e-6)
    f = torch.randn(20, 10, generator=torch.Generator().manual_seed(3))
    t = heads.zero_shot(f, rows, 100.0)
    assert float(t.abs().max()) <= 100 + 1e-4
    torch.testing.assert_close(heads.zero_shot(7 * f, rows, 100.0), t, rtol=0, atol=1e-4)
    torch.testing.assert_close(heads.zero_shot(rows, rows, 100.0).diagonal(), torch.full((3,), 100.0))


# ---- preprocessing


def test_preprocessing_scales_resizes_and_repeats_grey():
    x = torch.arange(2 * 64).view(2, 1, 8, 8).to(torch.uint8)
    lite = loading.Preprocessing(0, *loading.LITE)
    torch.testing.assert_close(lite(x), ((x.float() - 127) / 128).expand(-1, 3, -1, -1))
    large = loading.Preprocessing(16, (0.5,), (0.25,))(x)
    assert large.shape == (2, 1, 16, 16)
    assert float(large.min()) >= -2
    assert float(large.max()) <= 2  # bicubic resizing overshoots: it is cut to 0..255
    even = loading.Preprocessing(32)(torch.full((1, 3, 8, 8), 51, dtype=torch.uint8))
    torch.testing.assert_close(even, torch.full((1, 3, 32, 32), 0.2), rtol=0, atol=1e-6)
    table = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(lite(table), table.float())


# ---- the data around it


def test_the_servers_images_and_the_probes_are_nobody_elses_and_balanced():
    options = dataclasses.replace(SPLIT, validation=3, server=6, longtail=Exponential(factor=5.0))
    data = federate(options, 3, probe=4)
    everyone = np.concatenate(list(data.owners))
    for rows, size in ((data.server, 6), (data.probe, 4), (data.validation, 3)):
        assert np.bincount(data.columns["y"][rows], minlength=10).tolist() == [size] * 10
        assert not set(rows) & set(everyone)
    assert len({*data.server, *data.probe, *data.validation}) == 10 * 13
    images = [data.columns["x"][rows].flatten(1).tolist() for rows in (data.server, data.probe)]
    held = {tuple(row) for part in images for row in part}
    assert not held & {tuple(row) for row in data.columns["x"][everyone].flatten(1).tolist()}


def test_a_method_may_use_a_part_of_the_servers_images(here, monkeypatch):
    """So much of each class, of unlabelled ones as much in all; the smaller part lies within the larger one."""
    data = federate(SPLIT, 0)
    few, more = data.server_rows(2), data.server_rows(4)
    assert np.bincount(data.columns["y"][few], minlength=10).tolist() == [2] * 10
    assert set(few) < set(more) < set(data.server)
    assert np.array_equal(data.server_rows(0), data.server)
    bare = dataclasses.replace(data, columns={**data.columns, "y": torch.full_like(data.columns["y"], -1)})
    assert len(bare.server_rows(2)) == 20
    batches = []
    for images, size in ((0, 60), (2, 20)):
        method = ServerDistillation(server_images=images, server_steps=1)
        with closing(Federation(experiment(user(), method))) as running:
            own = type(method).server_step
            with monkeypatch.context() as patch:
                patch.setattr(ServerDistillation, "server_step", lambda *a, own=own: batches.append(a[3]) or own(*a))
                running.step()
        assert len(batches[-1].y) == size


def test_the_probes_images_are_taken_from_every_method(here):
    teacher = Trained(probe=7)
    for algorithm in (fedtail.FedAvg(), ServerDistillation()):
        whole = experiment(teacher, algorithm)
        with closing(Federation(whole)) as running:
            assert running.data.class_totals().sum() == 1297 - 10 * (7 + 6)


def test_images_of_another_set_carry_no_label(here):
    rng = np.random.default_rng(0)
    np.savez(here / "other.npz", x_train=rng.integers(0, 255, (70, 1, 8, 8)).astype(np.uint8), y_train=np.arange(70) % 7,
             x_test=np.zeros((7, 1, 8, 8), np.uint8), y_test=np.arange(7))  # fmt: skip
    data = federate(dataclasses.replace(SPLIT, server=6, server_from=str(here / "other.npz")), 0)
    assert len(data.server) == 60
    assert set(data.columns["y"][data.server].tolist()) == {-1}
    assert data.class_totals().sum() == 1297  # nothing was held out
    with pytest.raises(ConfigError, match="wants 80 images"):
        federate(dataclasses.replace(SPLIT, server=8, server_from=str(here / "other.npz")), 0)
    np.savez(here / "wide.npz", x_train=np.zeros((70, 1, 9, 9), np.uint8), y_train=np.arange(70) % 7,
             x_test=np.zeros((7, 1, 9, 9), np.uint8), y_test=np.arange(7))  # fmt: skip
    with pytest.raises(ConfigError, match="same shape"):
        federate(dataclasses.replace(SPLIT, server=1, server_from=str(here / "wide.npz")), 0)
    *_, last = fedtail.run(experiment(user(), data=dataclasses.replace(SPLIT, server_from=str(here / "other.npz"))))
    assert np.isfinite(last.record["server"]["kd"])


# ---- the cache


def test_a_second_run_never_asks_the_teacher_and_another_preprocessing_does(here):
    whole = experiment(user())
    with closing(Federation(whole)) as first:
        column = first.data.columns["teacher"]
        assert asked(here) == 60 + 100  # the server's images and the probe's
        assert column.values.shape == (60, 10)  # N_S x C, although the data have more rows
        assert column.shape == (len(first.data.columns["y"]), 10)
    with closing(Federation(whole)) as second:
        assert asked(here) == 0
        assert torch.equal(second.data.columns["teacher"].values, column.values)
    with closing(Federation(experiment(user(pixels=12)))) as third:
        assert asked(here) == 160
        assert not torch.equal(third.data.columns["teacher"].values, column.values)
    with closing(Federation(experiment(user(mean=(0.5,), std=(0.5,))))):
        assert asked(here) == 160
    with closing(Federation(experiment(user(version="2")))):
        assert asked(here) == 160
    (here / "net.py").write_text(COUNTING + "\n# changed\n")
    with closing(Federation(whole)):
        assert asked(here) == 160


def test_only_images_that_are_new_are_asked_about(here):
    Federation(experiment(user())).close()
    assert asked(here) == 160
    Federation(experiment(user(), seed=1)).close()
    assert 0 < asked(here) < 160  # some of them were in the other seed's hold-outs
    Federation(experiment(user(), ClientDistillation())).close()
    assert 0 < asked(here) < 1297 - 160  # the clients' own
    for seed in (0, 1, 2):  # by now every image is known
        Federation(experiment(user(), seed=seed)).close()
    assert asked(here) == 0


def test_a_damaged_cache_is_made_again(here):
    Federation(experiment(user())).close()
    asked(here)
    for file in (here / "data" / "teachers").glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    Federation(experiment(user())).close()
    assert asked(here) == 160


def test_what_was_computed_before_an_interruption_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 4)
    x, seen = torch.arange(20, dtype=torch.uint8).view(10, 1, 1, 2), []

    def compute(images):
        if len(seen) == 8:
            raise KeyboardInterrupt
        seen.extend(images[:, 0, 0, 0].tolist())
        return {"logits": images.flatten(1).float()}

    with pytest.raises(KeyboardInterrupt):
        store.outputs(tmp_path / "teacher", x, torch.arange(10), compute)
    assert seen == [0, 2, 4, 6, 8, 10, 12, 14]
    seen.clear()
    found = store.outputs(tmp_path / "teacher", x, torch.arange(10), compute)
    assert seen == [16, 18]
    assert found["logits"].tolist() == x.flatten(1).tolist()


def test_kept_outputs_come_back_in_the_order_of_the_question(tmp_path):
    x = torch.arange(20, dtype=torch.uint8).view(10, 1, 1, 2)
    place = tmp_path / "teacher"

    def compute(images):
        return {"logits": images.flatten(1).float(), "features": images.flatten(1).float() ** 2}

    first = store.outputs(place, x, torch.tensor([3, 1, 4]), compute)
    assert first["logits"].tolist() == [[6, 7], [2, 3], [8, 9]]
    more = store.outputs(place, x, torch.tensor([4, 9, 4, 3]), compute)
    assert more["logits"].tolist() == [[8, 9], [18, 19], [8, 9], [6, 7]]
    assert more["features"][1].tolist() == [324, 361]
    assert len(list(place.iterdir())) == 2
    known = store.outputs(place, x, torch.tensor([1, 9]), lambda _: pytest.fail("the teacher was asked"))
    assert known["logits"].tolist() == [[2, 3], [18, 19]]
    assert store.outputs(place, x, torch.zeros(0, dtype=torch.int64), compute) == {}


# ---- a teacher stays what it is


def test_a_teacher_is_frozen_and_in_evaluation_mode(here):
    whole = experiment(user("Scores", head="own"), ServerDistillation(lam_feat=0.5))
    data = federate(whole.data, whole.seed, probe=whole.teacher.probe_images)
    teach = teaching.Teaching(whole, data)
    module = teach.loaded.module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    teach.columns(data.server)
    list(fedtail.run(whole))
    assert not module.training
    assert all(not layer.training for layer in module.modules())
    assert all(not p.requires_grad and p.grad is None for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_scores_and_features_of_a_callable_reach_the_method(here):
    with closing(Federation(experiment(user("Scores", head="own"), ServerDistillation(lam_feat=1.0)))) as running:
        record = running.step()
        assert running.data.columns["teacher_features"].values.shape == (60, 12)
        assert record["server"]["feat"] > 0
        rows = torch.from_numpy(running.data.server)
        h = running.data.columns["teacher_features"].index_select(0, rows)
        assert torch.equal(running.data.columns["teacher"].index_select(0, rows), h[:, :10])
        with pytest.raises(DataError, match="has no value for row 0"):
            running.data.columns["teacher"].index_select(0, torch.tensor([0]))


@pytest.mark.parametrize(
    ("teacher", "algorithm", "words"),
    [
        (config.NoTeacher(), None, "needs a teacher"),
        (user("Alone", head="own"), ServerDistillation(lam_feat=1.0), "features, but this teacher gives class scores alone"),
        (user("Broken", head="own"), None, "not \\(60, 10\\)"),
        (user("NotFinite", head="own"), None, "not finite"),
        (user("Nobody"), None, "has no 'Nobody' that can be called"),
        (UserTeacher(), None, "needs target"),
        (UserTeacher(target="nowhere.py:Net"), None, "there is no file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(here, teacher, algorithm, words):
    with pytest.raises(ConfigError, match=words):
        Federation(experiment(teacher, algorithm))


def test_a_teacher_of_the_clients_wants_images_without_augmentation(here):
    augmented = dataclasses.replace(SPLIT, augmentation="flip")
    with pytest.raises(ConfigError, match="un-augmented"):
        Federation(experiment(Trained(), ClientDistillation(), data=augmented))
    Federation(experiment(user(), data=augmented)).close()  # the server's are never augmented


def test_a_method_without_use_for_a_teacher_never_makes_one(here):
    list(fedtail.run(experiment(user("Broken", head="own"), fedtail.FedAvg())))
    assert asked(here) == 0
    assert not (here / "data").exists()


# ---- kinds of teachers


@pytest.mark.parametrize("on", ["probe", "pooled"])
def test_a_trained_network_is_trained_once_and_teaches(here, on, monkeypatch):
    teacher = Trained(on=on, model=MLP(hidden=(32,)), epochs=10)
    whole = experiment(teacher)
    with closing(Federation(whole)) as running:
        values = running.data.columns["teacher"].values
        true = running.data.columns["y"][torch.from_numpy(running.data.server)]
        assert float((values.argmax(1) == true).double().mean()) > 0.8
    monkeypatch.setattr(Federation, "step", lambda self: pytest.fail("it was trained again"))
    with closing(Federation(whole)) as running:
        assert torch.equal(running.data.columns["teacher"].values, values)


def test_a_trained_network_belongs_to_one_scaling_of_the_inputs(here):
    """Under `data.normalise = false` it sees other inputs: it is another network, with other scores."""
    found = []
    for scaled in (True, False):
        data = dataclasses.replace(SPLIT, normalise=scaled, client_validation=0.2)
        with closing(Federation(experiment(Trained(epochs=2), data=data))) as running:
            found.append(running.data.columns["teacher"].values)
    assert not torch.equal(*found)
    assert len(list(here.rglob("trained-*.safetensors"))) == 2


def test_a_federated_probe_learns_from_the_clients_labels(here):
    teacher = user("Pixels", head="federated_probe", probe_rounds=15)
    assert teacher.probe_images == 0
    whole = experiment(teacher, local=LocalWork(epochs=2))
    data = federate(whole.data, whole.seed)
    teach = teaching.Teaching(whole, data)
    t = teach.scores(teach.ask(data.columns["x"], data.server))
    assert float((t.argmax(1) == data.columns["y"][data.server]).double().mean()) > 0.7


class _Encoder(nn.Module):
    """What a made-up timm and open_clip make."""

    def __init__(self):
        super().__init__()
        self.image, self.logit_scale = nn.Linear(3 * 16 * 16, 10), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.image(x.flatten(1))

    encode_image = forward

    def encode_text(self, tokens):
        return tokens


@pytest.fixture
def hubs(here, monkeypatch):
    """timm and open_clip in miniature, with their weights as a file each."""
    timm, clip = types.ModuleType("timm"), types.ModuleType("open_clip")
    made = []
    timm.create_model = lambda name, **options: made.append((name, options)) or _Encoder()
    clip.create_model = lambda name, pretrained: made.append((name, pretrained)) or _Encoder()
    clip.get_tokenizer = lambda name: words
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "open_clip", clip)
    (here / "data" / "weights").mkdir(parents=True)
    state = {k: v.detach().clone() for k, v in _Encoder().state_dict().items()}
    save_file(state, here / "encoder.safetensors")
    torch.save(state, here / "encoder.pth")
    return made


@pytest.mark.parametrize("file", ["encoder.safetensors", "encoder.pth"])
def test_a_timm_model_gets_its_weights_from_a_checked_file(hubs, here, file):
    right = loading.sha256(here / file)
    teacher = Timm(model="resnet_tiny", weights=file, sha256=right[:12], pixels=16, probe=10)
    with closing(Federation(experiment(teacher))) as running:
        assert running.data.columns["teacher_features"].values.shape == (60, 10)
    assert hubs == [("resnet_tiny", {"pretrained": False, "num_classes": 0})]
    with pytest.raises(DataError, match="SHA-256 of the weights is"):
        loading.load(dataclasses.replace(teacher, sha256="0" * 64))


def test_the_kept_outputs_belong_to_the_weights(hubs, here):
    teacher = Timm(model="resnet_tiny", weights="encoder.safetensors", pixels=16)
    first = loading.load(teacher).identity
    save_file({k: v + 1 for k, v in _Encoder().state_dict().items()}, here / "encoder.safetensors")
    assert loading.load(teacher).identity != first
    assert loading.load(DINOv2(weights="encoder.safetensors")).identity not in (first, "")
    assert hubs[-1] == ("vit_small_patch14_dinov2.lvd142m", {"pretrained": False, "num_classes": 0, "img_size": 224})


def test_a_zero_shot_teacher_compares_images_with_the_names_of_the_classes(hubs, here):
    teacher = OpenCLIP(weights="encoder.safetensors", pixels=16, class_names=tuple("abcdefghij"))
    loaded = loading.load(teacher)
    torch.testing.assert_close(loaded.text.embeddings.norm(dim=1), torch.ones(10), rtol=0, atol=1e-6)
    assert loaded.text.scale == pytest.approx(np.exp(2.0), rel=1e-6)
    assert teacher.probe_images == 0
    with closing(Federation(experiment(teacher))) as running:
        t = running.data.columns["teacher"].values
        assert float(t.abs().max()) <= loaded.text.scale + 1e-4
    assert OpenCLIP(head="linear_probe").probe_images == 50
    with pytest.raises(ConfigError, match="prompts must hold sentences"):
        OpenCLIP(prompts=("a photo",))


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (CLIP(), "open_clip.create_model('ViT-B-32-quickgelu', pretrained='openai')"),
        (DINOv2(), "timm.create_model('vit_small_patch14_dinov2.lvd142m', pretrained=True, num_classes=0)"),
        (OpenCLIP(model="ViT-B-16"), "weights/ViT-B-16.safetensors"),
    ],
)
def test_missing_weights_are_answered_with_the_command_that_obtains_them(here, teacher, words):
    with pytest.raises(DataError) as error:
        loading.load(teacher, ("cat",))
    assert words in str(error.value)
    assert "save_file" in str(error.value)


def test_a_missing_package_is_answered_with_the_extra(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r'pip install "fedtail\[teachers\]"'):
        loading.load(EfficientNetLite0())


def test_weights_that_are_no_plain_tensors_are_refused(here):
    class Evil:
        def __reduce__(self):
            return (open, (str(here / "was_run"), "w"))

    torch.save({"a": Evil()}, here / "evil.pth")
    with pytest.raises(DataError, match="holds no plain tensors"):
        loading.read_weights(here / "evil.pth", "", "make weights")
    assert not (here / "was_run").exists()
    torch.save([1, 2], here / "list.pth")
    with pytest.raises(DataError, match="no table of tensors by name"):
        loading.read_weights(here / "list.pth", "", "make weights")
    (here / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(DataError, match="make weights"):
        loading.read_weights(here / "cut.safetensors", "", "make weights")


def test_a_file_of_another_model_is_refused(hubs, here):
    save_file({"a": torch.zeros(2)}, here / "other.safetensors")
    with pytest.raises(DataError, match="does not fit the model"):
        loading.load(Timm(model="resnet_tiny", weights="other.safetensors"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EfficientNetLite0(probe=0), "needs labelled images"),
        (lambda: EfficientNetLite0(pixels=-1), "pixels"),
        (lambda: UserTeacher(mean=(0.1,), std=()), "one value a channel"),
        (lambda: UserTeacher(mean=(0.1,), std=(0.0,)), "std > 0"),
        (lambda: Trained(epochs=0), "epochs"),
        (lambda: Trained(probe=0), "probe >= 1"),
        (lambda: ServerDistillation(server_images=-1), "server_images >= 0"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_participation_and_engines_do_not_touch_the_teacher(here):
    """The same outputs, whoever takes part."""
    first = Federation(experiment(user()))
    second = Federation(
        experiment(user(), participation=Participation(clients=2), engine=fedtail.EngineOptions(name="vmap"))
    )
    assert torch.equal(first.data.columns["teacher"].values, second.data.columns["teacher"].values)
    first.close()
    second.close()


@pytest.mark.parametrize(("teacher", "parameters"), [(EfficientNetLite0, 3_371_008), (EfficientNetLite2, 4_811_072)])
def test_the_packaged_encoders_load_where_they_are_installed(teacher, parameters):
    pytest.importorskip("efficientnet_lite_pytorch")
    loaded = loading.load(teacher(pixels=64))
    x = torch.arange(2 * 28 * 28).view(2, 1, 28, 28).to(torch.uint8)
    with torch.no_grad():
        features = loaded.encode(loaded.preprocessing(x))["features"]
    assert features.shape == (2, 1280)
    assert bool(torch.isfinite(features).all())
    assert sum(p.numel() for p in loaded.module.parameters()) == parameters
    assert not loaded.module.training
