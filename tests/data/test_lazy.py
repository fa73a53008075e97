"""Large sets: lists of image files, decoded when they are used. The files are made here, in the official formats."""

import csv
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_problem import Staged
from PIL import Image
from test_catalog import first_round

import fedtail
from fedtail import cli, config
from fedtail.data import catalog, fetch
from fedtail.data.entries import REGISTRY
from fedtail.data.federated import FederatedData
from fedtail.data.images import IMAGENET_LT_LISTS, IMAGENET_STATISTICS, INATURALIST_LISTS, ImageFiles
from fedtail.data.lazy import Decoder, LazyImages, memory
from fedtail.data.longtail import NoTail
from fedtail.data.partition import DirichletMultinomial, Natural
from fedtail.engines import loop
from fedtail.errors import ConfigError, DataError
from fedtail.experiment import Federation
from fedtail.federation import federate
from fedtail.inspection import inspect, to_text
from fedtail.metrics import OLTR
from fedtail.models.specs import ResNet8, ResNet50
from fedtail.trees import named_leaves

SIZE = 16
BYTES = 3 * SIZE * SIZE  # of a decoded image
TRAIN, TEST = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]  # labels: 5, 3 and 2 images of 3 classes
USERS = ["7", "12", "7", "12", "7", "12", "3", "3", "3", "7"]
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def picture(path, rng, mode="RGB"):
    """Writes a picture of a size of its own, JPEG or PNG as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = rng.integers(17, 60, 2)
    noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((width, height))
    noise.convert(mode).save(path)


def known(monkeypatch, name):
    """Tells the catalogue that the made-up set is what `name` means."""
    tiny = replace(REGISTRY[name], sizes=(len(TRAIN), len(TEST)), class_names=("a", "b", "c"))
    monkeypatch.setitem(REGISTRY, name, tiny)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """ImageNet's folder with the lists; grey and CMYK pictures are among the JPEG files, as there."""
    rng = np.random.default_rng(0)
    for part, labels, name in zip(("train", "val"), (TRAIN, TEST), IMAGENET_LT_LISTS, strict=True):
        lines = []
        for i, label in enumerate(labels):
            path = f"{part}/n0000000{label}/{part}_{i}.JPEG"
            picture(tmp_path / path, rng, {2: "L", 3: "CMYK"}.get(i, "RGB"))
            lines.append(f"{path} {label}\n")
        (tmp_path / name).write_text("".join(lines))
    known(monkeypatch, "imagenet_lt")
    return tmp_path


@pytest.fixture
def inaturalist(tmp_path, monkeypatch):
    """The lists of iNaturalist-User-120k above the folders of iNaturalist 2017: group, species, image."""
    rng = np.random.default_rng(1)
    for name, labels, users in zip(INATURALIST_LISTS, (TRAIN, TEST), (USERS, None), strict=True):
        with open(tmp_path / name, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["user_id", "image_id", "class", "label"] if users else ["image_id", "class", "label"])
            for i, label in enumerate(labels):
                image = f"{'ab' if users else 'cd'}{i:030x}"
                picture(tmp_path / "train_val_images" / "Aves" / f"Species {label}" / f"{image}.jpg", rng)
                out.writerow([*([users[i]] if users else []), image, label, 1000 + label])
    known(monkeypatch, "inaturalist_user")
    return tmp_path


WNIDS = ("n02124075", "n01443537", "n04067472")  # not in the order of the alphabet, as in the official list


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Tiny-ImageNet as its archive unpacks: images of 64 x 64, some of them grey, boxes and a test split beside them."""
    rng, root = np.random.default_rng(2), tmp_path / "tiny-imagenet-200"

    def write(path, i):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).convert("L" if i == 2 else "RGB").save(path)

    for label, name in enumerate(WNIDS):
        for i in range(TRAIN.count(label)):
            write(root / "train" / name / "images" / f"{name}_{i}.JPEG", i)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t61\n")
    for i in range(len(TEST)):
        write(root / "val" / "images" / f"val_{i}.JPEG", i)
    write(root / "test" / "images" / "test_0.JPEG", 0)
    lines = [f"val_{i}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n" for i, label in enumerate(TEST)]
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text("n02124075\tEgyptian cat\n")
    known(monkeypatch, "tiny_imagenet")
    return tmp_path


def options(folder, name="imagenet_lt", **more):
    """The data of a small experiment."""
    partition = Natural() if name == "inaturalist_user" else DirichletMultinomial(clients=3, alpha=1.0)
    own = {"augmentation": "crop_flip", "decode_threads": 2, "partition": partition, **more}
    return fedtail.Data(name=name, folder=str(folder), longtail=NoTail(), image_size=SIZE, **own)


def experiment(data, engine="loop", **more):
    """Two rounds of a small residual network."""
    return fedtail.Experiment(
        rounds=2, data=data, model=ResNet8(), local=fedtail.LocalWork(epochs=2, batch_size=3),
        engine=fedtail.EngineOptions(name=engine, workers=2), evaluation=fedtail.Evaluation(batch_size=4), **more,
    )  # fmt: skip


def eager(data):
    """The same data with all images decoded into tensors."""
    columns, test = ({**c, "x": c["x"].index_select(0, torch.arange(len(c["x"])))} for c in (data.columns, data.test))
    return replace(data, columns=columns, test=test)


def decoded(monkeypatch):
    """Returns a list that receives the name of every image that is decoded from now on."""
    names, plain = [], ImageFiles.decode
    monkeypatch.setattr(ImageFiles, "decode", lambda self, name: (names.append(name), plain(self, name))[1])
    return names


# ---- the files


def test_imagenet_lt_is_read_from_its_lists(imagenet):
    data = catalog.load("imagenet_lt", imagenet)
    assert data.train.y.tolist() == TRAIN
    assert data.test.y.tolist() == TEST
    assert data.train.user is None
    assert data.input_shape == (3, 224, 224)
    assert (data.mean, data.std) == IMAGENET_STATISTICS
    assert data.train.x.names[0] == "train/n00000000/train_0.JPEG"
    assert catalog.load("imagenet_lt", imagenet, size=8).input_shape == (3, 8, 8)


def test_tiny_imagenet_is_read_from_its_folder(tiny):
    """Classes are numbered as in wnids.txt; the test split is the official validation split, as its list says."""
    data = catalog.load("tiny_imagenet", tiny)
    assert data.train.y.tolist() == TRAIN
    assert data.train.x.names[5] == "train/n01443537/images/n01443537_0.JPEG"
    assert data.test.y.tolist() == TEST[::-1]
    assert data.test.x.names[0] == "val/images/val_5.JPEG"
    assert data.input_shape == (3, 64, 64)
    assert (data.mean, data.std) == ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
    path = tiny / "tiny-imagenet-200" / "train/n02124075/images/n02124075_2.JPEG"
    with Image.open(path) as image:
        grey = np.asarray(image)
    np.testing.assert_array_equal(data.train.x.decode(str(data.train.x.names[2])), np.stack([grey] * 3))
    inner = catalog.load("tiny_imagenet", tiny / "tiny-imagenet-200", size=8)
    assert (inner.train.y.tolist(), inner.input_shape) == (TRAIN, (3, 8, 8))


def test_tiny_imagenet_trains(tiny):
    lazy = experiment(options(tiny, "tiny_imagenet"))
    data = federate(lazy.data, lazy.seed)
    found = [_run(lazy, data), _run(lazy, eager(data))]
    assert found[0][1] == found[1][1]


def test_inaturalist_gives_each_user_his_images(inaturalist):
    data = federate(options(inaturalist, "inaturalist_user"), seed=0)
    owned = [[i for i, user in enumerate(USERS) if user == name] for name in ("3", "7", "12")]  # ascending as numbers
    assert [own.tolist() for own in data.owners] == owned
    assert data.counts().sum(0).tolist() == [5, 3, 2]


def test_images_of_inaturalist_may_lie_in_one_folder(inaturalist):
    for file in list(inaturalist.rglob("*.jpg")):
        file.rename(inaturalist / file.name)
    assert len(catalog.load("inaturalist_user", inaturalist).train) == len(TRAIN)


def test_symbolic_links_are_followed_once(inaturalist, tmp_path, monkeypatch):
    """Also a link to a folder above, and two to the same folder side by side."""
    elsewhere, other = tmp_path / "elsewhere", tmp_path / "other"
    elsewhere.mkdir()
    other.mkdir()
    for file in list(inaturalist.rglob("*.jpg")):
        file.rename(elsewhere / file.name)
    (inaturalist / "link").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(inaturalist)
    for name in ("one", "two"):
        (inaturalist / name).symlink_to(other)
    entered, plain = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (entered.append(os.path.realpath(path)), plain(path))[1])
    assert len(catalog.load("inaturalist_user", inaturalist).train) == len(TRAIN)
    assert len(entered) == len(set(entered))
    assert {str(elsewhere), str(other)} <= set(entered)


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    Image.new("I;16", (4, 4), 40_000).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: got an image of mode I;16, expected 8 bits a channel"):
        ImageFiles(tmp_path, np.array(["deep.png"]), 4).decode("deep.png")


def test_users_may_have_names(inaturalist):
    path = inaturalist / INATURALIST_LISTS[0]
    path.write_text(path.read_text().replace("\n7,", "\nann,").replace("\n12,", "\nbob,"))
    assert set(catalog.load("inaturalist_user", inaturalist).train.user) == {"3", "ann", "bob"}


def test_the_middle_of_an_image_is_scaled_to_the_size(tmp_path):
    """A PNG of 4 x 12: the middle 4 x 4 is one colour, which scaling keeps; the sides are cut off."""
    strip = np.zeros((4, 12, 3), np.uint8)
    strip[:, 4:8] = (10, 20, 30)
    for name, array in (("wide.png", strip), ("high.png", strip.transpose(1, 0, 2))):
        Image.fromarray(array).save(tmp_path / name)
        for size in (2, 4, 8):
            image = ImageFiles(tmp_path, np.array([name]), size).decode(name)
            assert image.shape == (3, size, size)
            assert image.dtype == np.uint8
            assert np.unique(image.reshape(3, -1), axis=1).tolist() == [[10], [20], [30]]


def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)).resize((320, 320)).save(tmp_path / "a.jpg")
    small = ImageFiles(tmp_path, np.array(["a.jpg"]), 40).decode("a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        whole = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(small.astype(int) - whole).max() <= 6


# ---- the column


@pytest.fixture
def files(imagenet):
    return catalog.load("imagenet_lt", imagenet, size=SIZE).train.x


def test_a_lazy_column_stands_for_a_tensor(files):
    lazy = LazyImages(files, Decoder(0, 2))
    whole = torch.from_numpy(np.stack([files.decode(name) for name in files.names]))
    assert lazy.shape == whole.shape
    assert lazy.dtype == whole.dtype
    assert len(lazy) == len(whole)
    assert lazy.nbytes == whole.nbytes
    for rows in ([3, 1, 1, 9], [0], []):
        index = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(lazy.index_select(0, index), whole.index_select(0, index))
    with pytest.raises(ValueError, match="dim must be 0, got 1"):
        lazy.index_select(1, index)


def test_the_least_recently_used_images_are_forgotten_first(files, monkeypatch):
    lazy, names = LazyImages(files, Decoder(3 * BYTES, 1)), decoded(monkeypatch)

    def decodes(*rows):
        names.clear()
        lazy.index_select(0, torch.tensor(rows))
        return [files.names.tolist().index(name) for name in names]

    assert decodes(0, 1, 2, 2) == [0, 1, 2]
    assert decodes(2, 1, 0) == []
    assert decodes(3) == [3]  # 2 was used before 1 and 0
    assert decodes(0, 1) == []
    assert decodes(2) == [2]  # 3 was used before 0 and 1
    assert decodes(*range(10)) == [3, 4, 5, 6, 7, 8, 9]
    assert lazy.decoder._bytes == 3 * BYTES == sum(image.nbytes for image in lazy.decoder._cache.values())


def test_nothing_is_remembered_without_a_cache(files, monkeypatch):
    lazy, names = LazyImages(files, Decoder(BYTES - 1, 1)), decoded(monkeypatch)
    for _ in range(2):
        lazy.index_select(0, torch.tensor([0, 0, 1]))
    assert len(names) == 4


def test_several_threads_share_a_decoder(files):
    decoder = Decoder(4 * BYTES, 3)
    whole = np.stack([files.decode(name) for name in files.names])
    wrong = []

    def use(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            rows = rng.integers(0, len(files), 5)
            if not np.array_equal(decoder.images(files, rows).numpy(), whole[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert decoder._bytes == sum(image.nbytes for image in decoder._cache.values()) <= 4 * BYTES


def test_memory_counts_the_cache_once(files):
    labels = torch.zeros(10, dtype=torch.int64)
    for cache, expected in ((3 * BYTES, 3 * BYTES), (1 << 30, 20 * BYTES)):
        decoder = Decoder(cache)
        assert memory([LazyImages(files, decoder), labels, LazyImages(files, decoder)]) == expected + labels.nbytes


# ---- training


@pytest.mark.parametrize("engine", ["loop", "parallel", "vmap"])
@pytest.mark.parametrize("name", ["imagenet_lt", "inaturalist_user"])
def test_training_equals_that_on_tensors(engine, name, request):
    folder = request.getfixturevalue("imagenet" if name == "imagenet_lt" else "inaturalist")
    lazy = experiment(options(folder, name, cache_mib=0), engine)
    data = federate(lazy.data, lazy.seed)
    assert isinstance(data.columns["x"], LazyImages)
    found = [_run(lazy, data), _run(lazy, eager(data))]
    assert found[0][1] == found[1][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def _run(experiment: fedtail.Experiment, data: FederatedData):
    """Two rounds; returns the server's tensors and the scores."""
    federation = Federation(experiment, data)
    for _ in range(2):
        federation.advance(federation.step())
    scores = federation.score(), federation.score("train")
    federation.close()
    return list(named_leaves(federation.server).values()), scores


def test_personal_models_and_validation_are_judged(imagenet):
    lazy = experiment(options(imagenet, validation=1), algorithm=Staged())
    data = federate(lazy.data, lazy.seed)
    found = [_run(lazy, data), _run(lazy, eager(data))]
    assert found[0][1] == found[1][1]
    assert found[0][1][0].keys() >= {"test", "local", "personal", "validation"}


def test_no_more_than_a_batch_is_decoded_at_once(imagenet, monkeypatch):
    sizes, plain = [], LazyImages.index_select
    monkeypatch.setattr(LazyImages, "index_select", lambda *a: (sizes.append(len(a[2])), plain(*a))[1])
    monkeypatch.setattr(loop, "VALUES", 6 * BYTES)
    federation = Federation(experiment(options(imagenet)))
    federation.step()
    assert max(sizes) <= 6  # in training what VALUES allows: two batches of three
    sizes.clear()
    federation.score()
    assert sizes == [4, 2]  # evaluation.batch_size = 4 of 6 test images
    federation.close()


def test_images_that_are_remembered_are_decoded_once(imagenet, monkeypatch):
    names = decoded(monkeypatch)
    for _ in fedtail.run(experiment(options(imagenet))):
        pass
    assert sorted(names) == sorted(set(names))
    assert len(names) == len(TRAIN) + len(TEST)


def test_nothing_is_decoded_before_training(imagenet, monkeypatch):
    names = decoded(monkeypatch)
    facts = inspect(experiment(options(imagenet, cache_mib=1)))
    assert facts["class_totals"] == [5, 3, 2]
    assert facts["bytes"]["data"] == 16 * (BYTES + 8)  # below the cache's bound: all images and labels
    assert "imagenet_lt" in to_text(facts)
    assert names == []


def test_resume_equals_an_uninterrupted_run(inaturalist, tmp_path):
    whole = experiment(options(inaturalist, "inaturalist_user"))
    for _ in fedtail.run(whole, tmp_path / "whole"):
        pass
    for _ in fedtail.run(whole, tmp_path / "stopped"):
        break
    for _ in fedtail.resume(tmp_path / "stopped"):
        pass
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    images = federate(whole.data, 0).test["x"].index_select(0, torch.arange(3))
    assert fedtail.load(tmp_path / "whole")(images).shape == (3, 3)


def test_an_image_that_cannot_be_read_stops_training_with_its_name(imagenet):
    path = imagenet / "train/n00000002/train_8.JPEG"
    path.write_bytes(path.read_bytes()[:150])
    for engine in ("loop", "parallel", "vmap"):
        with pytest.raises(DataError, match=r"train_8\.JPEG \(150 bytes\): the image cannot be decoded"):
            list(fedtail.run(experiment(options(imagenet), engine)))


# ---- what can be wrong


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / IMAGENET_LT_LISTS[1]).unlink(), r"expected ImageNet_LT_test\.txt; found ImageNet_LT_train\.txt"),
        (lambda f: [p.unlink() for p in f.glob("train/n00000001/*")],
         r"train\.txt: 3 of 10 images are missing, the first is .*/train/n00000001/train_5\.JPEG"),
        (lambda f: (f / IMAGENET_LT_LISTS[0]).write_text("\na.JPEG 0\nb.JPEG\n"),
         r"train\.txt, line 3: expected PATH LABEL, got 'b\.JPEG'"),
        (lambda f: (f / IMAGENET_LT_LISTS[1]).write_text("a.JPEG 1 x\n"), r"test\.txt, line 1: expected PATH LABEL"),
        (lambda f: (f / IMAGENET_LT_LISTS[1]).write_text("\n"), r"test\.txt: the list is empty"),
        (lambda f: (f / IMAGENET_LT_LISTS[1]).write_bytes(b"\xff\xfe\0"), r"test\.txt: cannot be read as text"),
        (lambda f: (f / IMAGENET_LT_LISTS[1]).write_text("val/n00000000/val_0.JPEG 0\n"),
         r"test split: got 1 examples, expected 6\. Put the lists .*image-net\.org"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_imagenet_lt_is_said(imagenet, spoil, message):
    spoil(imagenet)
    with pytest.raises(DataError, match=message):
        catalog.read_checked(REGISTRY["imagenet_lt"], imagenet)


def test_a_label_beyond_the_classes(imagenet):
    path = imagenet / IMAGENET_LT_LISTS[0]
    path.write_text(path.read_text().replace("_9.JPEG 2", "_9.JPEG 3"))
    with pytest.raises(DataError, match=r"imagenet_lt: train\.y: got 3 in row 9"):
        catalog.load("imagenet_lt", imagenet)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (0, "user_id,", "user,", r"no column 'user_id'; did you mean 'user'\? Found: user, image_id, class, label"),
        (1, ",class,", ",klass,", r"test\.csv: no column 'class'.*expected image_id, class"),
        (0, ",0,1000\n", ",a,1000\n", r"line 2: expected a class number, got 'a'"),
        (0, ",0,1000\n", ",0\n", r"line 2: got 3 values, expected 4"),
        (1, "cd", "xx", r"test\.csv: 6 of 6 images are missing, the first is .*/xx0+\.jpg"),
    ],
)
def test_what_is_wrong_with_inaturalist_is_said(inaturalist, name, old, new, message):
    path = inaturalist / INATURALIST_LISTS[name]
    path.write_text(path.read_text().replace("\r\n", "\n").replace(old, new))
    with pytest.raises(DataError, match=message):
        catalog.read_checked(REGISTRY["inaturalist_user"], inaturalist)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "wnids.txt").unlink(), r"expected wnids\.txt; found test, train, val, words\.txt"),
        (lambda f: (f / "val/val_annotations.txt").unlink(), r"expected val/val_annotations\.txt; found test, train"),
        (lambda f: (f / "val/val_annotations.txt").write_text("\nval_0.JPEG\tn00000000\t0\t1\n"),
         r"annotations\.txt, line 2: expected NAME CLASS \.\.\., got 'val_0\.JPEG"),
        (lambda f: (f / "val/val_annotations.txt").write_text("val_0.JPEG"), r"line 1: expected NAME CLASS"),
        (lambda f: [p.unlink() for p in f.glob("train/n01443537/images/*")],
         r"train/n01443537/images: expected images NAME\.JPEG; found nothing\. Unpack http"),
        (lambda f: (f / "val/images/val_3.JPEG").unlink(), r"1 of 6 images are missing, the first is .*/val_3\.JPEG"),
        (lambda f: (f / "train/n01443537/images/n01443537_1.JPEG").unlink(),
         r"train split: got 9 examples, expected 10\. Unpack http://cs231n"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tiny_imagenet_is_said(tiny, spoil, message):
    spoil(tiny / "tiny-imagenet-200")
    with pytest.raises(DataError, match=message):
        catalog.read_checked(REGISTRY["tiny_imagenet"], tiny)


def test_options_are_checked(imagenet):
    for name in ("image_size", "cache_mib", "decode_threads"):
        with pytest.raises(
            ConfigError, match=r"data\.image_size, data\.cache_mib and data\.decode_threads must be >= 0"
        ):
            fedtail.Data(**{name: -1})
    with pytest.raises(ConfigError, match=r"data\.image_size: only images in files of their own are resized, got 8"):
        federate(fedtail.Data(image_size=8), 0)
    with pytest.raises(ConfigError, match="size must be >= 1 pixel"):
        catalog.load("imagenet_lt", imagenet, size=0)


def test_image_size_resizes_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        picture(tmp_path / place / "1.png", rng)
    data = federate(fedtail.Data(name=str(tmp_path), image_size=8, longtail=NoTail()), 0)
    assert data.columns["x"].shape == (2, 3, 8, 8)


# ---- data get, data add


def test_get_says_where_the_files_come_from(imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path / "cache"))
    with pytest.raises(
        DataError, match=r"(?s)not for download by fedtail.*OpenLongTailRecognition.*data add imagenet_lt"
    ):
        fetch.get("imagenet_lt", lambda line: None)
    with pytest.raises(DataError, match=r"not on this machine.*\n.*\nRun `fedtail data get imagenet_lt`"):
        catalog.load("imagenet_lt")


def test_add_links_to_the_folder(imagenet, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDTAIL_DATA", str(cache))
    for _ in range(2):  # adding again replaces the link
        cli.dispatch(["data", "add", "imagenet_lt", str(imagenet)])
        assert [p.name for p in cache.iterdir()] == ["imagenet_lt"]
        assert (cache / "imagenet_lt").readlink() == imagenet
    assert fetch.add("imagenet_lt", cache / "imagenet_lt") == cache / "imagenet_lt"  # a folder is not linked to itself
    assert (cache / "imagenet_lt").readlink() == imagenet
    assert len(catalog.load("imagenet_lt").train) == len(TRAIN)
    assert fetch.get("imagenet_lt", lambda line: None) == cache / "imagenet_lt"
    assert str(cache) in capsys.readouterr().out


# ---- presets


@pytest.mark.parametrize("name", ["imagenet_lt", "inaturalist_user"])
def test_presets_of_large_sets_can_be_inspected(name, request):
    folder = request.getfixturevalue("imagenet" if name == "imagenet_lt" else "inaturalist")
    preset = config.load(EXPERIMENTS / f"{name}.toml")
    assert preset.model == ResNet50()
    facts = inspect(replace(preset, data=replace(preset.data, folder=str(folder), image_size=32)))
    assert facts["class_totals"] == [5, 3, 2]
    assert facts["clients"] == (20 if name == "imagenet_lt" else 3)
    assert isinstance(preset.evaluation.groups, OLTR)


def test_the_preset_for_tiny_imagenet_starts(tiny):
    record = first_round("tiny_imagenet", tiny)
    assert record["train"]["clients"] == record["local_models"]["clients"] == 2
    assert len(record["local_models"]["recall_after"]) == 3


def test_preset_of_cifar100_is_the_protocol_s_setting():
    """K = 20, imbalance 100, alpha 0.5: sizes of the first clients and class counts that the authors' code gives."""
    preset = config.load(EXPERIMENTS / "cifar100_lt.toml")
    data = preset.data
    labels = np.repeat(np.arange(100), 500)
    cut = data.longtail.cut(labels, 100, np.random.default_rng(0))
    assert np.bincount(labels[cut])[:6].tolist() == [500, 477, 455, 434, 415, 396]
    owners = data.partition.split(labels[cut], 100, np.random.default_rng(0))
    assert [len(own) for own in owners[:5]] == [573, 766, 469, 733, 726]
