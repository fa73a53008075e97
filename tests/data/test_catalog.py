"""Data sets by name: facts, hashes, where they are looked for, and what is said when they are not there."""

import gzip
import hashlib
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedtail
from fedtail import sweep
from fedtail.data import catalog, formats, svhn
from fedtail.data.catalog import load
from fedtail.data.dataset import channel_statistics
from fedtail.data.entries import DIGITS_FILE, PROTOCOL_NORMALISATION, REGISTRY, Download
from fedtail.errors import ConfigError, DataError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def idx(array):
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("FEDTAIL_DATA", str(folder))
    return folder


@pytest.fixture
def tiny(cache, monkeypatch):
    """A made-up set of four training and two test images in IDX, in the cache and under the name `tiny`."""
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    contents = [idx(a) for a in (images[:4], np.array([0, 1, 0, 1]), images[4:], np.array([1, 0]))]
    (cache / "tiny").mkdir()
    for name, data in zip(formats.IDX_NAMES, contents, strict=True):
        (cache / "tiny" / f"{name}.gz").write_bytes(gzip.compress(data))
    entry = replace(
        REGISTRY["mnist"],
        name="tiny",
        class_names=("a", "b"),
        sizes=(4, 2),
        sha256=tuple(hashlib.sha256(data).hexdigest() for data in contents),
        downloads=(),
    )
    monkeypatch.setitem(REGISTRY, "tiny", entry)
    return entry


# --- facts


def test_digits_is_embedded():
    assert DIGITS_FILE.stat().st_size < 100_000
    digits = load("digits")
    assert digits.input_shape == (1, 8, 8)
    assert (len(digits.train), len(digits.test)) == (1297, 500)
    assert digits.train.x.dtype == np.uint8
    # class sizes of the UCI test set (optdigits.names)
    classes = np.bincount(digits.train.y) + np.bincount(digits.test.y)
    assert classes.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # round(v * 255 / 16) of the values v = 0..16
    levels = np.unique(np.concatenate([digits.train.x.ravel(), digits.test.x.ravel()]))
    assert levels.tolist() == [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    quotas = classes * 500 / 1797
    assert (np.abs(np.bincount(digits.test.y) - quotas) <= 1).all()
    mean, std = channel_statistics(digits.train.x)
    np.testing.assert_allclose((digits.mean, digits.std), (mean, std), atol=5e-6)
    assert digits.licence == "CC BY 4.0"


def test_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets")
    theirs = sklearn.load_digits()
    digits = load("digits")
    x = np.concatenate([digits.train.x, digits.test.x])[:, 0]
    y = np.concatenate([digits.train.y, digits.test.y])
    ours = sorted(
        (int(c), image.tobytes()) for c, image in zip(y, np.round(x * (16 / 255)).astype(np.uint8), strict=True)
    )
    expected = sorted(
        (int(c), image.astype(np.uint8).tobytes()) for c, image in zip(theirs.target, theirs.images, strict=True)
    )
    assert ours == expected


FACTS = {  # data_models.md, section 1: size, classes of the training split, mean, deviation, first labels
    "fashion-mnist": ((1, 28, 28), [6000] * 10, (0.2860,), (0.3530,), 4, [9, 0, 0, 3, 0]),
    "mnist": (
        (1, 28, 28),
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        (0.13066,),
        (0.30811,),
        5,
        [5, 0, 4, 1, 9],
    ),
    "cifar10": (
        (3, 32, 32),
        [5000] * 10,
        (0.49140, 0.48216, 0.44653),
        (0.24703, 0.24349, 0.26159),
        5,
        [6, 9, 9, 4, 1, 1, 2, 7, 8, 3],
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_the_real_sets(name):
    try:
        catalog.locate(name)
    except DataError:
        pytest.skip(f"{name} is not on this machine: `fedtail data get {name}`")
    shape, counts, mean, std, places, first = FACTS[name]
    data = load(name, normalisation="own")  # compares the SHA-256 of the contents
    assert data.input_shape == shape
    assert np.bincount(data.train.y).tolist() == counts
    assert len(data.test) == 10_000
    assert data.train.y[: len(first)].tolist() == first
    measured = channel_statistics(data.train.x)
    assert np.round(measured, places).tolist() == [list(mean), list(std)]
    assert (data.mean, data.std) == (mean, std)
    if name == "cifar10":
        assert data.test.y[:6].tolist() == [3, 8, 8, 0, 6, 6]
        assert load(name).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("entry", REGISTRY.values(), ids=list(REGISTRY))
def test_every_entry_is_complete(entry):
    classes = {"cifar100": 100, "tiny_imagenet": 200, "imagenet_lt": 1000, "inaturalist_user": 1203}.get(entry.name, 10)
    assert len(set(entry.class_names)) == entry.num_classes == classes
    assert len(entry.mean) == len(entry.std) == (3 if entry.lazy or entry.name.startswith(("cifar", "svhn")) else 1)
    assert entry.licence
    assert entry.source
    assert entry.downloads or entry.installed or entry.obtain
    assert entry.sha256 is not None or all(download.md5 for download in entry.downloads)


def test_importing_the_catalogue_does_not_import_torch():
    code = "import sys, fedtail.data.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- finding and checking


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path))
    assert catalog.cache_folder() == tmp_path
    monkeypatch.delenv("FEDTAIL_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert catalog.cache_folder() == tmp_path / "fedtail"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert catalog.cache_folder() == Path.home() / "Library/Caches/fedtail"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert catalog.cache_folder() == tmp_path / "local" / "fedtail"


def test_load_by_name(tiny):
    data = load("tiny")
    assert data.name == "tiny"
    assert data.class_names == ("a", "b")
    assert data.train.x.shape == (4, 1, 2, 2)
    assert data.test.y.tolist() == [1, 0]


def test_a_given_folder_may_hold_the_set_or_be_it(tiny, cache, tmp_path):
    elsewhere = cache.rename(tmp_path / "elsewhere")
    assert catalog.locate("tiny", elsewhere) == elsewhere / "tiny"
    assert catalog.locate("tiny", elsewhere / "tiny") == elsewhere / "tiny"
    with pytest.raises(DataError):
        catalog.locate("tiny")


def test_the_folder_of_an_installed_package_is_looked_into_last(tiny, cache, tmp_path, monkeypatch):
    installed = (cache / "tiny").rename(tmp_path / "installed")
    monkeypatch.setitem(REGISTRY, "tiny", replace(tiny, installed=installed))
    assert catalog.locate("tiny") == installed


def test_digits_need_no_folder(tmp_path):
    assert len(load("digits", tmp_path).train) == 1297


def test_missing_set_names_what_where_and_both_commands(cache):
    with pytest.raises(DataError) as error:
        load("fashion-mnist", cache / "mine")
    looked = (cache / "mine" / "fashion-mnist", cache / "mine")
    for part in ("'fashion-mnist' is not on this machine", *map(str, looked), "train-images-idx3-ubyte"):
        assert part in str(error.value)
    assert "fedtail data get fashion-mnist" in str(error.value)
    assert "fedtail data add fashion-mnist PATH" in str(error.value)


@pytest.mark.parametrize(("name", "part"), [(0, "training images"), (1, "training labels"), (3, "test labels")])
def test_altered_contents_are_noticed_at_every_load(tiny, cache, name, part):
    load("tiny")
    path = cache / "tiny" / f"{formats.IDX_NAMES[name]}.gz"
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[-1] ^= 1
    path.write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match=f"the {part} were altered: SHA-256 of the contents is") as error:
        load("tiny")
    assert str(cache / "tiny") in str(error.value)
    assert "`fedtail data get tiny`" in str(error.value)


def test_another_number_of_examples_is_noticed(tiny, monkeypatch):
    monkeypatch.setitem(REGISTRY, "tiny", replace(tiny, sizes=(4, 3)))
    with pytest.raises(DataError, match="test split: got 2 examples, expected 3"):
        load("tiny")


@pytest.fixture
def tiny_cifar100(cache, monkeypatch):
    """CIFAR-100 with one training and one test image of each class, unpacked and as an archive."""
    folder = cache / "unpacked"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("train.bin", "test.bin"):
        records = [bytes([fine // 5, fine]) + rng.bytes(3072) for fine in range(100)]
        (folder / name).write_bytes(b"".join(records))
    archive = cache / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-100-binary")
    download = Download(REGISTRY["cifar100"].downloads[0].url, catalog.md5(archive))
    monkeypatch.setitem(REGISTRY, "cifar100", replace(REGISTRY["cifar100"], sizes=(100, 100), downloads=(download,)))
    return folder, archive


def test_cifar100_is_checked_by_the_archives_md5(tiny_cifar100, cache):
    data = load("cifar100", cache)  # the archive lies in it
    assert data.train.y.tolist() == list(range(100))
    with tarfile.open(tiny_cifar100[1], "w:gz") as tar:  # same contents, another archive
        tar.add(tiny_cifar100[0], "cifar-100-binary")
        tar.addfile(tarfile.TarInfo("extra"))
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz: the file was altered: MD5 is"):
        load("cifar100", cache)


def test_unpacked_cifar100_is_checked_by_its_class_counts(tiny_cifar100):
    folder, _ = tiny_cifar100
    assert load("cifar100", folder).test.y.tolist() == list(range(100))
    data = bytearray((folder / "test.bin").read_bytes())
    data[1] = 7  # the fine label of the first record
    (folder / "test.bin").write_bytes(data)
    with pytest.raises(
        DataError, match="test split: got 0 to 2 examples a class in 100 classes, expected 1 in each of 100"
    ):
        load("cifar100", folder)
    data[1] = 200
    (folder / "test.bin").write_bytes(data)
    with pytest.raises(DataError, match="in 201 classes, expected 1 in each of 100"):
        load("cifar100", folder)


# --- load


def test_normalisation(tiny, monkeypatch):
    assert load("tiny").mean == load("tiny", normalisation="own").mean == (0.13066,)
    monkeypatch.setitem(PROTOCOL_NORMALISATION, "tiny", ((0.5,), (0.25,)))
    assert (load("tiny").mean, load("tiny").std) == ((0.5,), (0.25,))
    assert load("tiny", normalisation="own").mean == (0.13066,)
    with pytest.raises(ConfigError, match="normalisation"):
        load("tiny", normalisation="imagenet")  # type: ignore[arg-type]


def test_protocol_normalisation_is_that_of_the_specification():  # longtail_protocol.md, section 2.5
    assert PROTOCOL_NORMALISATION["cifar10"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert PROTOCOL_NORMALISATION["cifar100"] == ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615))


def test_load_npz(tmp_path):
    path = tmp_path / "mine.npz"
    x = np.zeros((4, 5, 5, 3), np.uint8)
    x[0] = 255
    np.savez(path, x=x[:3], y=np.array([0, 1, 1]))
    data = load("mine.npz", tmp_path, test_share=0.34)
    assert data.input_shape == (3, 5, 5)
    assert data.name == str(path)
    assert (data.mean, data.std) == channel_statistics(data.train.x)
    np.savez(path, images=x, y_train=np.array([0, 1, 2, 0]), x_test=x, y_test=np.array([0, 1, 2, 0]))
    assert load(path, columns={"x_train": "images"}).num_classes == 3


def test_load_image_folder(tmp_path):
    for place in ("train/ant", "train/bee", "test/bee"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (6, 6), (1, 2, 3)).save(tmp_path / place / "1.png")
    data = load(str(tmp_path), size=4)
    assert data.class_names == ("ant", "bee")
    assert data.input_shape == (3, 4, 4)
    assert data.test.y.tolist() == [1]
    np.testing.assert_allclose(data.mean, np.array([1, 2, 3]) / 255)


def test_a_path_is_never_taken_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no such file or folder"):
        load(Path("digits"))
    assert load("digits").input_shape == (1, 8, 8)


def test_unknown_name_has_near_matches():
    with pytest.raises(
        ConfigError, match=r"unknown data set 'CIFAR-10'; did you mean 'cifar10'\? Known: digits, fashion"
    ):
        load("CIFAR-10")


@pytest.mark.parametrize("name", ["absent.npz", "some/folder"])
def test_absent_path(name, tmp_path):
    with pytest.raises(DataError, match="there is no such file or folder") as error:
        load(name, tmp_path)
    assert str(tmp_path / name) in str(error.value)


def test_options_that_do_not_fit_the_kind_of_data():
    with pytest.raises(ConfigError, match=r"data\.image_size: only images in files of their own are resized"):
        load("digits", size=16)
    with pytest.raises(ConfigError, match=r"data\.columns: only \.npz files"):
        load("digits", columns={"x": "images"})


# --- SVHN


def svhn_files(folder, counts=(7, 5)):
    """Writes the official files in small: X [32, 32, 3, N], y [N, 1] of doubles, 10 for the digit 0; returns what they hold."""
    io = pytest.importorskip("scipy.io")
    folder.mkdir(parents=True, exist_ok=True)
    rng, found = np.random.default_rng(0), []
    for name, count in zip(svhn.SVHN_FILES, counts, strict=True):
        images = rng.integers(256, size=(count, 32, 32, 3)).astype(np.uint8)
        digits = rng.permutation(np.arange(count) % 10)
        labels = np.where(digits == 0, 10, digits)[:, None].astype(np.float64)
        io.savemat(folder / name, {"X": images.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
        found.append((images, digits))
    return found


@pytest.fixture
def small_svhn(cache, monkeypatch):
    """SVHN with seven training and five test images; returns them."""
    found = svhn_files(cache / "svhn")
    downloads = tuple(
        Download(d.url, catalog.md5(cache / "svhn" / d.url.rpartition("/")[2])) for d in REGISTRY["svhn"].downloads
    )
    monkeypatch.setitem(REGISTRY, "svhn", replace(REGISTRY["svhn"], sizes=(7, 5), downloads=downloads))
    return found


def test_svhn_is_read_from_its_matlab_files(small_svhn):
    data = load("svhn")
    assert data.input_shape == (3, 32, 32)
    assert data.class_names == tuple("0123456789")
    for split, (images, digits) in zip((data.train, data.test), small_svhn, strict=True):
        np.testing.assert_array_equal(split.x, images.transpose(0, 3, 1, 2))
        assert split.y.tolist() == digits.tolist()


def test_svhn_is_checked_by_the_md5_of_its_files(small_svhn, cache):
    """Its classes are of unequal size, so their counts say nothing."""
    load("svhn")
    path = cache / "svhn" / "test_32x32.mat"
    data = bytearray(path.read_bytes())
    data[3] ^= 1  # in the header's text
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"test_32x32\.mat: the file was altered: MD5 is .*`fedtail data get svhn`"):
        load("svhn")


def spoiled(folder, **arrays):
    """Writes a training file with other arrays."""
    good = {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[10.0], [1.0]])}
    pytest.importorskip("scipy.io").savemat(folder / "train_32x32.mat", {**good, **arrays})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "test_32x32.mat").unlink(), r"expected test_32x32\.mat; found train_32x32\.mat"),
        (lambda f: (f / "train_32x32.mat").write_bytes(b"<html>" * 99), r"train_32x32\.mat \(594 bytes\): no readable MATLAB"),
        (lambda f: (f / "train_32x32.mat").write_bytes((f / "train_32x32.mat").read_bytes()[:300]), "no readable MATLAB file"),
        (lambda f: spoiled(f, X=np.zeros((32, 32, 3, 2))), r"got X float64 \[32, 32, 3, 2\] and y \[2, 1\], expected uint8"),
        (lambda f: spoiled(f, y=np.ones((3, 1))), r"and y \[3, 1\], expected uint8 \[32, 32, 3, N\] and \[N, 1\]"),
        (lambda f: spoiled(f, y=np.array([[0.0], [1.0]])), r"got the label 0\.0, expected 1 to 10 \(10 is the digit 0\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_svhn_is_said(tmp_path, spoil, message):
    svhn_files(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        svhn.read_svhn(tmp_path, "Do this.")


def test_svhn_without_scipy_names_the_extra(tmp_path, monkeypatch):
    svhn_files(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r'need the package scipy .*pip install "fedtail\[data\]"'):
        svhn.read_svhn(tmp_path)


# --- FedGA's settings for sets that are not here


def first_round(name, folder):
    """Runs a round of FedGA by its preset for a set, on two clients that hold something of every class; returns its record."""
    plan = sweep.load(EXPERIMENTS / f"fedga_protocol_{name}.toml")
    experiment = next(run.experiment for run in plan.runs if run.row == "fedga")
    data = replace(experiment.data, folder=str(folder), server=0,
                   partition=replace(experiment.data.partition, clients=2, alpha=100.0))  # fmt: skip
    small = replace(experiment, rounds=1, data=data, evaluation=replace(experiment.evaluation, local_models=1))
    [result] = fedtail.run(small)
    return result.record


def test_the_preset_for_svhn_starts(cache, monkeypatch):
    svhn_files(cache, (60, 20))
    monkeypatch.setitem(REGISTRY, "svhn", replace(REGISTRY["svhn"], sizes=(60, 20), downloads=()))
    monkeypatch.setattr(catalog, "md5", None)  # there is none to compare with
    record = first_round("svhn", cache)
    assert record["train"]["clients"] == record["local_models"]["clients"] == 2
    assert len(record["test"]["error_asymmetry"]) == 10


def test_the_preset_for_cifar100_starts(cache, monkeypatch):
    rng = np.random.default_rng(0)
    for name, each in (("train.bin", 6), ("test.bin", 1)):
        records = [bytes([fine // 5, fine]) + rng.bytes(3072) for fine in range(100) for _ in range(each)]
        (cache / name).write_bytes(b"".join(records))
    monkeypatch.setitem(REGISTRY, "cifar100", replace(REGISTRY["cifar100"], sizes=(600, 100)))
    assert len(first_round("cifar100", cache)["local_models"]["error_asymmetry_after"]) == 100
