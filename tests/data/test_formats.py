"""Readers of the official formats, on small files that the tests write byte by byte."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedtail.data import formats
from fedtail.data.dataset import (
    Dataset,
    Split,
    array_hashes,
    assemble,
    channel_statistics,
    channels_first,
    idx_hashes,
    stratified_split,
)
from fedtail.errors import ConfigError, DataError

MEND = "Run `fedtail data get toy`."


def idx(array):
    """An IDX file by its definition: 00 00, type 08 (unsigned byte), rank, big-endian sizes, the bytes."""
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder, zipped=False, names=formats.IDX_NAMES):
    images = np.arange(6 * 2 * 3, dtype=np.uint8).reshape(6, 2, 3)
    arrays = (images[:4], np.array([1, 0, 1, 0]), images[4:], np.array([0, 1]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(names, arrays, strict=True):
        data = idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return folder


# --- IDX


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folder(tmp_path, zipped):
    train, test = formats.read_idx_folder(write_idx(tmp_path, zipped))
    assert train.x.shape == (4, 1, 2, 3)
    assert train.x.dtype == np.uint8
    assert train.x[1, 0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert train.y.tolist() == [1, 0, 1, 0]
    assert train.y.dtype == np.int64
    assert test.y.tolist() == [0, 1]
    assert train.x.flags.writeable  # torch.from_numpy warns of anything else
    names = {name + ".gz" * zipped for name in formats.IDX_NAMES}
    assert set(formats.idx_files(tmp_path)) == names


def test_idx_names_with_a_dot_are_found_under_the_official_name(tmp_path):
    write_idx(tmp_path, names=[name.replace("-idx", ".idx") for name in formats.IDX_NAMES])
    files = formats.idx_files(tmp_path)
    assert list(files) == list(formats.IDX_NAMES)
    assert files["train-images-idx3-ubyte"].name == "train-images.idx3-ubyte"


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(idx(np.array([3, 1])))
    assert formats.read_idx(path).tolist() == [3, 1]


def test_truncated_idx_names_file_sizes_and_command(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx(np.zeros((4, 2, 3)))[:-5])
    with pytest.raises(DataError) as error:
        formats.read_idx(path, MEND)
    # 4 bytes of magic, 3 sizes of 4 bytes, 24 pixels: 40 bytes
    assert str(error.value) == f"{path}: got 35 bytes, expected 40 by its header ([4, 2, 3]). {MEND}"


def test_truncated_gzip_names_file_sizes_and_command(tmp_path):
    path = tmp_path / "images.gz"
    packed = gzip.compress(idx(np.random.default_rng(0).integers(256, size=(4, 20, 20))))  # 1,616 bytes, incompressible
    path.write_bytes(packed[:-300])
    with pytest.raises(
        DataError, match=r"images\.gz: got \d+ bytes of an incomplete gzip stream, expected 1616"
    ) as error:
        formats.read_idx(path, MEND)
    assert str(error.value).endswith(MEND)


def test_gzip_without_its_checksum_is_incomplete(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(5)))[:-4])
    with pytest.raises(DataError, match="incomplete gzip"):
        formats.read_idx(path)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "images.gz"
    packed = bytearray(gzip.compress(idx(np.arange(50))))
    packed[-6] ^= 0xFF  # in the checksum
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"images\.gz .*gzip stream is damaged"):
        formats.read_idx(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", b"\0\0\x0d\x01" + bytes(8), b"\0\0\x08\x09" + bytes(40), b"\0\0\x08\x03\0\0"],
    ids=["empty", "html", "floats", "rank 9", "half a header"],
)
def test_wrong_magic(tmp_path, content):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected an IDX header of unsigned bytes") as error:
        formats.read_idx(path, MEND)
    assert str(path) in str(error.value)
    assert str(error.value).endswith(MEND)


def test_idx_files_in_each_others_place(tmp_path):
    write_idx(tmp_path)
    (tmp_path / formats.IDX_NAMES[0]).write_bytes((tmp_path / formats.IDX_NAMES[1]).read_bytes())
    with pytest.raises(DataError, match="train-images-idx3-ubyte: got 1 dimensions, expected 3"):
        formats.read_idx_folder(tmp_path)


def test_idx_images_and_labels_of_different_length(tmp_path):
    write_idx(tmp_path)
    (tmp_path / formats.IDX_NAMES[1]).write_bytes(idx(np.zeros(3)))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: y: got int64 \[3\] beside 4 examples"):
        formats.read_idx_folder(tmp_path)


def test_missing_idx_file_lists_what_is_there(tmp_path):
    write_idx(tmp_path)
    (tmp_path / formats.IDX_NAMES[3]).unlink()
    with pytest.raises(DataError, match=r"expected t10k-labels-idx1-ubyte or .*; found t10k-images-idx3-ubyte, train-"):
        formats.idx_files(tmp_path)


# --- CIFAR


def cifar_images(count):
    return np.random.default_rng(count).integers(256, size=(count, 3, 32, 32)).astype(np.uint8)


def record(image, *labels):
    """A record by its definition: the labels, the red plane, the green, the blue."""
    return bytes(labels) + image[0].tobytes() + image[1].tobytes() + image[2].tobytes()


def write_cifar10(folder):
    images = cifar_images(12)
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*(f"data_batch_{b}.bin" for b in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(record(images[2 * i], i) + record(images[2 * i + 1], 9 - i))
    return images


def pack(folder, inside, archive):
    with tarfile.open(archive, "w:gz") as tar:
        readme = tarfile.TarInfo(f"{inside}/readme.html")
        tar.addfile(readme, io.BytesIO())
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{inside}/{path.name}")
    return archive


@pytest.mark.parametrize("place", ["folder", "parent", "archive", "folder of archive"])
def test_cifar10(tmp_path, place):
    inner = tmp_path / "cifar-10-batches-bin"
    images = write_cifar10(inner)
    where = {"folder": inner, "parent": tmp_path}.get(place)
    if where is None:
        (tmp_path / "packed").mkdir()
        archive = pack(inner, inner.name, tmp_path / "packed" / "cifar-10-binary.tar.gz")
        where = archive if place == "archive" else archive.parent
    train, test = formats.read_cifar(where, 10)
    assert (train.x == images[:10]).all()
    assert (test.x == images[10:]).all()
    assert train.y.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert test.y.tolist() == [5, 4]
    assert train.x.flags.writeable


def test_cifar100_uses_the_fine_label(tmp_path):
    images = cifar_images(3)
    (tmp_path / "train.bin").write_bytes(record(images[0], 4, 99) + record(images[1], 5, 0))
    (tmp_path / "test.bin").write_bytes(record(images[2], 19, 42))
    train, test = formats.read_cifar(tmp_path, 100)
    assert train.y.tolist() == [99, 0]
    assert test.y.tolist() == [42]
    assert (train.x == images[:2]).all()
    assert (test.x == images[2:]).all()


@pytest.mark.parametrize("cut", [1, 2 * 3073], ids=["one byte short", "empty"])
def test_truncated_cifar_names_file_sizes_and_command(tmp_path, cut):
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError) as error:
        formats.read_cifar(tmp_path, 10, MEND)
    for part in (str(path), f"got {6146 - cut} bytes", "records of 3073 bytes", "30730000", MEND):
        assert part in str(error.value)


def test_truncated_cifar_archive(tmp_path):
    write_cifar10(tmp_path / "bin")
    archive = pack(tmp_path / "bin", "cifar-10-batches-bin", tmp_path / "cifar-10-binary.tar.gz")
    size = archive.stat().st_size
    archive.write_bytes(archive.read_bytes()[: size // 2])
    with pytest.raises(DataError, match=rf"tar\.gz \({size // 2} bytes\): the archive is truncated") as error:
        formats.read_cifar(archive, 10, MEND)
    assert str(error.value).endswith(MEND)


def test_archive_of_something_else(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "other.bin").write_bytes(b"x")
    archive = pack(tmp_path / "bin", "other", tmp_path / "x.tar.gz")
    with pytest.raises(DataError, match=r"no data_batch_1\.bin in the archive"):
        formats.read_cifar(archive, 10)


def test_the_python_version_of_cifar_is_refused_by_name(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"the Python version is not read\); found cifar-10-batches-py"):
        formats.read_cifar(tmp_path, 10)


# --- .npz


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def four(x, y=(0, 1, 1, 0), **more):
    return {"x_train": x, "y_train": np.array(y), "x_test": x[:2], "y_test": np.array([0, 1]), **more}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 5, 6), (4, 1, 5, 6)),  # grey
        ((4, 5, 6, 1), (4, 1, 5, 6)),  # channels last
        ((4, 5, 6, 3), (4, 3, 5, 6)),
        ((4, 3, 5, 6), (4, 3, 5, 6)),  # channels first
        ((4, 3, 5, 3), (4, 3, 3, 5)),  # both: the last one counts
    ],
)
def test_npz_image_layouts(tmp_path, shape, expected):
    x = np.arange(np.prod(shape)).astype(np.uint8).reshape(shape)
    train, test = formats.read_npz(save(tmp_path / "a.npz", **four(x)))
    assert train.x.shape == expected
    assert test.x.shape == (2, *expected[1:])
    assert train.x.flags.c_contiguous
    if shape == (4, 5, 6, 3):
        assert train.x[2, 1, 4, 5] == x[2, 4, 5, 1]


def test_npz_tabular_with_users_and_column_labels(tmp_path):
    x = np.arange(8.0).reshape(4, 2)
    path = save(
        tmp_path / "a.npz",
        **four(
            x, y=[[0], [1], [2], [0]], user_train=np.array(["a", "b", "a", "c"]), user_test=np.array([7, 8], np.int16)
        ),
    )
    train, test = formats.read_npz(path)
    assert train.x.dtype == np.float32
    assert train.x.tolist() == x.tolist()
    assert train.y.tolist() == [0, 1, 2, 0]
    assert train.user is not None
    assert train.user.tolist() == ["a", "b", "a", "c"]
    assert test.user is not None
    assert test.user.dtype == np.int64


def test_npz_columns_by_other_names(tmp_path):
    x = np.zeros((4, 2, 2), np.uint8)
    path = save(tmp_path / "a.npz", train_images=x, y_train=np.array([0, 1, 1, 0]), x_test=x[:1], y_test=np.array([1]))
    train, _ = formats.read_npz(path, {"x_train": "train_images"})
    assert train.x.shape == (4, 1, 2, 2)
    with pytest.raises(ConfigError, match="'x_trian' is none of x_train"):
        formats.read_npz(path, {"x_trian": "train_images"})
    with pytest.raises(DataError, match="no array 'owner'"):  # an optional column that was asked for is not optional
        formats.read_npz(path, {"x_train": "train_images", "user_train": "owner"})


def test_npz_wrong_column_lists_those_found_and_a_near_match(tmp_path):
    path = save(tmp_path / "a.npz", X_train=np.zeros((2, 2)), y_train=np.zeros(2, int), x_test=np.zeros((2, 2)))
    with pytest.raises(DataError) as error:
        formats.read_npz(path)
    for part in (str(path), "no array 'x_train'", "Found: X_train, y_train, x_test", "did you mean 'X_train'?"):
        assert part in str(error.value)


def test_npz_without_a_test_split_is_split_by_class(tmp_path):
    y = np.repeat([0, 1], [30, 10])
    x = np.arange(40.0)[:, None]
    path = save(tmp_path / "a.npz", x=x, y=y, user=np.arange(40))
    train, test = formats.read_npz(path, test_share=0.2)
    assert np.bincount(train.y).tolist() == [24, 8]
    assert np.bincount(test.y).tolist() == [6, 2]
    assert sorted([*train.x[:, 0], *test.x[:, 0]]) == list(range(40))
    assert train.user is not None
    assert (train.user == train.x[:, 0]).all()  # rows stay together
    again, _ = formats.read_npz(path, test_share=0.2)
    other, _ = formats.read_npz(path, test_share=0.2, seed=1)
    assert (again.x == train.x).all()
    assert not (other.x == train.x).all()
    with pytest.raises(ConfigError, match=r"test must be in 1\.\.39"):
        formats.read_npz(path, test_share=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((4, 2, 2))}, r"x_train: got float64 \[4, 2, 2\], expected uint8 images"),
        ({"x_train": np.zeros((4, 2, 2, 2), np.uint8)}, "x_train: got images of shape"),
        ({"x_train": np.zeros((3, 2))}, "x_train, y_train: y: got int64 .4. beside 3 examples"),
        ({"x_train": np.array([[0, 1], [2, np.nan], [0, 0], [0, 0]])}, "x: got nan in row 1, column 1"),
        ({"x_train": np.full((4, 2), 1e300)}, "x: got inf in row 0, column 0"),
        ({"x_train": np.zeros((0, 2)), "y_train": np.zeros(0, int)}, "at least one example"),
        ({"y_train": np.array([0.0, 1.0, 1.0, 0.0])}, r"y_train: got float64 \[4\], expected class numbers"),
        ({"user_train": np.array([0.5, 1, 2, 3])}, r"user: got float64 \[4\], expected int64 or string"),
    ],
)
def test_npz_wrong_columns_are_named(tmp_path, change, message):
    path = save(tmp_path / "a.npz", **(four(np.zeros((4, 2))) | change))
    with pytest.raises(DataError, match=message) as error:
        formats.read_npz(path)
    assert str(path) in str(error.value)


def test_npz_never_unpickles(tmp_path):
    path = save(tmp_path / "a.npz", x=np.array([{}, {}], dtype=object), y=np.array([0, 1]))
    with pytest.raises(DataError, match=r"pickles\) are never opened"):
        formats.read_npz(path)


def test_damaged_npz(tmp_path):
    path = save(tmp_path / "a.npz", **four(np.zeros((4, 2))))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.npz \(200 bytes\): no readable \.npz file"):
        formats.read_npz(path)


# --- folders of images


def picture(path, value, mode="L", size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def test_grey_image_folder(tmp_path):
    picture(tmp_path / "train/dog/1.png", 10)
    picture(tmp_path / "train/cat/2.png", 20)
    picture(tmp_path / "train/cat/1.png", 30)
    picture(tmp_path / "test/dog/1.PNG", 40)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    train, test, names = formats.read_image_folder(tmp_path)
    assert names == ("cat", "dog")
    assert train.x.shape == (3, 1, 3, 4)  # pillow's size is (width, height)
    assert train.x[:, 0, 0, 0].tolist() == [30, 20, 10]
    assert train.y.tolist() == [0, 0, 1]
    assert test.y.tolist() == [1]


def test_colour_image_folder_and_resizing(tmp_path):
    picture(tmp_path / "train/a/1.png", (200, 100, 50), "RGB", (8, 8))
    picture(tmp_path / "train/b/1.png", 7)  # grey among colours, of another size
    picture(tmp_path / "test/a/1.jpg", (90, 90, 90), "RGB", (5, 9))
    with pytest.raises(DataError, match=r"images differ in width x height: 8 x 8 .*, 4 x 3 .*Give a size"):
        formats.read_image_folder(tmp_path)
    train, test, _ = formats.read_image_folder(tmp_path, size=6)
    assert train.x.shape == (2, 3, 6, 6)
    assert train.x[0, :, 2, 2].tolist() == [200, 100, 50]
    assert train.x[1, :, 2, 2].tolist() == [7, 7, 7]
    assert abs(int(test.x[0, 0, 3, 3]) - 90) <= 2  # JPEG
    with pytest.raises(ConfigError, match="size must be >= 1"):
        formats.read_image_folder(tmp_path, size=0)


@pytest.mark.parametrize("keep", [0, 20, 50], ids=["empty", "header only", "pixels cut"])
def test_corrupt_image_is_named(tmp_path, keep):
    picture(tmp_path / "train/a/1.png", 0)
    picture(tmp_path / "test/a/1.png", 0)
    path = tmp_path / "train/a/2.png"
    noise = np.random.default_rng(0).integers(256, size=(3, 4)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="the image cannot be decoded") as error:
        formats.read_image_folder(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("mode", "name"), [("I;16", "2.png"), ("F", "2.tiff")])
def test_images_of_more_than_8_bits_are_refused(tmp_path, monkeypatch, mode, name):
    monkeypatch.setattr(formats, "IMAGE_SUFFIXES", (".png", ".tiff"))
    picture(tmp_path / "train/a/1.png", 0)
    picture(tmp_path / "test/a/1.png", 0)
    deep = picture(tmp_path / "train/a" / name, 40_000, mode)
    with pytest.raises(DataError, match=r"expected 8 bits a channel\. Convert it to 8 bits") as error:
        formats.read_image_folder(tmp_path)
    assert f"{deep}: got an image of mode {mode}," in str(error.value)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "F"])
def test_every_mode_of_more_than_8_bits_is_known(mode):
    with pytest.raises(DataError, match=f"^here: got an image of mode {mode},"):
        formats._eight_bit(mode, "here")
    assert [formats._eight_bit(m, "") for m in ("1", "L", "P", "RGBA")] == ["1", "L", "P", "RGBA"]


def test_image_folder_without_test_images_or_with_an_unknown_class(tmp_path):
    picture(tmp_path / "train/a/1.png", 0)
    with pytest.raises(DataError, match=r"expected images as test/<class>/NAME\.png .*; found train"):
        formats.read_image_folder(tmp_path)
    picture(tmp_path / "test/b/1.png", 0)
    with pytest.raises(DataError, match="class 'b' has no images in train"):
        formats.read_image_folder(tmp_path)


# --- splits, statistics, hashes


def test_channels_first_refuses_four_channels():
    with pytest.raises(DataError, match="photo: got images of shape"):
        channels_first(np.zeros((1, 5, 5, 4), np.uint8), "photo")


@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.integers(0, 5), st.data())
def test_stratified_split_is_exact_and_proportional(counts, seed, data):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    test = data.draw(st.integers(1, len(y) // 2))
    train_rows, test_rows = stratified_split(y, test, np.random.default_rng(seed))
    assert len(test_rows) == test
    assert sorted([*train_rows, *test_rows]) == list(range(len(y)))
    taken = np.bincount(y[test_rows], minlength=len(counts))
    assert (np.abs(taken - np.array(counts) * test / len(y)) <= 1).all()
    assert (taken < counts).all()


def test_stratified_split_keeps_a_training_example_of_each_class():
    y = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    _, test = stratified_split(y, 5, np.random.default_rng(0))
    assert y[test].tolist() == [0, 0, 0, 0, 0]
    with pytest.raises(ConfigError, match="last training example"):
        stratified_split(np.array([0, 1, 2]), 2, np.random.default_rng(0))


def test_stratified_split_chooses_at_random_within_a_class():
    y = np.zeros(10, np.int64)
    chosen = [stratified_split(y, 3, np.random.default_rng(seed))[1] for seed in range(400)]
    share = np.bincount(np.concatenate(chosen), minlength=10) / 400
    assert (np.abs(share - 0.3) < 0.12).all()  # 5 binomial standard deviations of .023


def test_channel_statistics_equal_numpy():
    x = np.random.default_rng(0).integers(256, size=(1500, 3, 2, 2)).astype(np.uint8)  # more than one piece
    x[:, 2] = 51
    mean, std = channel_statistics(x)
    scaled = x / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], scaled.std((0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1.0  # constant


def test_hashes_are_those_of_the_official_contents():
    import hashlib

    images = np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3)
    split = Split(images, np.array([1, 0]))
    assert idx_hashes(split) == tuple(hashlib.sha256(idx(a)).hexdigest() for a in (images[:, 0], np.array([1, 0])))
    colour = cifar_images(2)
    rows = b"".join(bytes(colour[n, :, i, j]) for n in range(2) for i in range(32) for j in range(32))
    found = array_hashes(Split(colour, np.array([7, 3])))
    assert found == (hashlib.sha256(rows).hexdigest(), hashlib.sha256(b"\x07\x03").hexdigest())


def grey(n, y=None):
    return Split(
        np.arange(n * 4, dtype=np.uint8).reshape(n, 1, 2, 2), np.zeros(n, np.int64) if y is None else np.array(y)
    )


def dataset(**change):
    facts = {
        "name": "toy",
        "train": grey(3, [0, 1, 0]),
        "test": grey(2),
        "num_classes": 2,
        "class_names": ("a", "b"),
        "mean": (0.5,),
        "std": (0.2,),
        "licence": "none",
        "source": "made up",
    }
    return Dataset(**(facts | change))


def test_dataset_input_shape():
    assert dataset().input_shape == (1, 2, 2)
    assert len(dataset().train) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": grey(3, [0, 2, 0])}, r"toy: train\.y: got 2 in row 1, expected labels 0\.\.1"),
        ({"test": grey(2, [0, -1])}, r"toy: test\.y: got -1 in row 1"),
        ({"test": Split(np.zeros((1, 4), np.float32), np.array([0]))}, r"toy: test\.x holds float32 \[4\]"),
        ({"class_names": ("a",)}, "got 1 class_names for 2 classes"),
        ({"mean": ()}, "got 0 values in mean, expected 1"),
        ({"mean": (float("nan"),)}, "got mean .*expected finite"),
        ({"std": (0.0,)}, "got std .*expected finite and positive"),
    ],
)
def test_dataset_says_what_does_not_fit(change, message):
    with pytest.raises(DataError, match=message):
        dataset(**change)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            np.zeros((2, 2, 2), np.uint8),
            np.zeros(2, np.int64),
            r"x: got uint8 \[2, 2, 2\], expected uint8 \[N, C, H, W\]",
        ),
        (np.zeros((2, 3)), np.zeros(2, np.int64), "x: got float64"),
        (np.zeros((2, 3), np.float32), np.zeros(2, np.int32), "y: got int32"),
    ],
)
def test_split_says_which_column_has_the_wrong_form(x, y, message):
    with pytest.raises(DataError, match=message):
        Split(x, y)


@pytest.mark.parametrize("y", [[1, 2, 1], [-1, 0, 1], [0, 1, 999]], ids=["from 1", "negative", "far apart"])
def test_assemble_refuses_labels_that_are_not_class_numbers(y):
    with pytest.raises(DataError, match=r"toy: y: labels run from .*Renumber"):
        assemble("toy", grey(3, y), grey(1, [1]))


def test_assemble_tabular_is_not_normalised():
    split = Split(np.ones((2, 3), np.float32), np.array([0, 1]))
    made = assemble("toy", split, split)
    assert (made.mean, made.std, made.class_names, made.input_shape) == ((), (), ("0", "1"), (3,))


def test_unreadable_file_says_so(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)"):
        formats.read_idx(Path(tmp_path / "absent"))
