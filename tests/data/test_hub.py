"""Data of the Hugging Face Hub, without the Hub: `datasets` where it is installed, else a double of the part that is used."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from fedtail.config import Data, Experiment
from fedtail.data import catalog
from fedtail.data.longtail import NoTail
from fedtail.data.partition import Natural
from fedtail.errors import ConfigError, DataError
from fedtail.experiment import Federation
from fedtail.federation import federate


def _double():
    """A module with the interface of `datasets` (5.2) as far as fedtail uses it."""
    module = types.ModuleType("datasets")
    for name in ("Image", "ClassLabel", "Value"):
        setattr(module, name, type(name, (), {"__init__": lambda self, *a, **k: self.__dict__.update(k)}))

    class Dataset:
        def __init__(self, columns, features):
            self.columns, self.features = columns, features
            self.info = types.SimpleNamespace(license="")

        @classmethod
        def from_dict(cls, columns, features):
            return cls(columns, features)

        def __len__(self):
            return len(next(iter(self.columns.values())))

        def __iter__(self):
            return (dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True))

        def select_columns(self, names):
            return Dataset({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    module.Dataset, module.Features = Dataset, dict
    return module


try:
    import datasets as package
except ImportError:
    package = _double()

CLASSES = ["ant", "bee", "cat"]


def _image(value, size=(4, 3), mode="L"):
    return Image.new(mode, size, value)


def _split(labels, users=None, images=None, label=None):
    """Rows with grey images whose value is the row's number, 3 high and 4 wide."""
    columns = {"picture": images or [_image(i) for i in range(len(labels))], "kind": labels}
    features = {"picture": package.Image(), "kind": label or package.ClassLabel(names=CLASSES)}
    if users is not None:
        columns["writer"] = users
        features["writer"] = package.Value(dtype="string" if isinstance(users[0], str) else "int64")
    return package.Dataset.from_dict(columns, package.Features(features))


@pytest.fixture
def serve(monkeypatch):
    """Lets `datasets.load_dataset` return these splits; returns the list of its calls."""

    def serve(**splits):
        calls = []

        def load_dataset(path, name=None, *, revision=None, cache_dir=None):
            calls.append((path, name, revision, cache_dir))
            return splits

        monkeypatch.setitem(sys.modules, "datasets", package)
        monkeypatch.setattr(package, "load_dataset", load_dataset, raising=False)
        return calls

    return serve


def test_images_labels_and_users_are_taken_over(serve):
    calls = serve(train=_split([0, 1, 2, 1], ["w2", "w1", "w2", "w3"]), test=_split([2, 0], ["w1", "w1"]))
    found = catalog.load("hf:some-one/letters?user=writer")
    assert calls == [("some-one/letters", None, None, None)]
    assert found.train.x.dtype == np.uint8
    assert found.train.x.shape == (4, 1, 3, 4)
    assert found.train.x[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert found.train.y.tolist() == [0, 1, 2, 1]
    assert found.train.user.tolist() == ["w2", "w1", "w2", "w3"]
    assert found.test.y.tolist() == [2, 0]
    assert (found.num_classes, found.class_names) == (3, tuple(CLASSES))
    assert found.mean == pytest.approx((1.5 / 255,))
    assert (found.licence, found.source) == ("not stated", "huggingface.co/datasets/some-one/letters")


def test_every_option_of_the_name_is_used(serve):
    label = package.Value(dtype="string")
    calls = serve(
        learn=_split(["b", "a", "c"], [7, 5, 7], label=label), check=_split(["a"], [5], label=label), rest=_split([0])
    )
    found = catalog.load(
        "hf:letters?image=picture&label=kind&user=writer&train=learn&test=check&config=small&revision=v2", "cache"
    )
    assert calls == [("letters", "small", "v2", "cache")]
    assert found.class_names == ("a", "b", "c")  # no ClassLabel: the values in ascending order
    assert found.train.y.tolist() == [1, 0, 2]
    assert found.train.user.tolist() == [7, 5, 7]
    assert found.train.user.dtype == np.int64
    assert found.source.endswith("letters, revision v2")


def test_without_a_test_split_a_stratified_fifth_is_held_out(serve):
    labels = [0] * 10 + [1] * 20 + [2] * 20
    serve(train=_split(labels, [f"w{i}" for i in range(50)]))
    found, again = (catalog.load("hf:a/b?user=writer") for _ in range(2))
    assert np.bincount(found.test.y).tolist() == [2, 4, 4]
    pixels = np.concatenate([found.train.x[:, 0, 0, 0], found.test.x[:, 0, 0, 0]])
    assert sorted(pixels.tolist()) == list(range(50))
    assert found.train.user.tolist() == [f"w{i}" for i in found.train.x[:, 0, 0, 0]]  # rows stay together
    assert np.array_equal(found.test.x, again.test.x)


def test_without_users_there_are_none(serve):
    serve(train=_split([0, 1, 2], ["a", "b", "c"]), test=_split([0]))
    assert catalog.load("hf:a/b").train.user is None


def test_colour_images_make_all_of_them_colour(serve):
    images = [_image(9), _image((1, 2, 3), mode="RGB"), _image(5)]
    serve(train=_split([0, 1, 2], images=images), test=_split([0], images=[_image((7, 8, 9, 255), mode="RGBA")]))
    found = catalog.load("hf:a/b")
    assert found.train.x[:, :, 0, 0].tolist() == [[9, 9, 9], [1, 2, 3], [5, 5, 5]]
    assert found.test.x[0, :, 0, 0].tolist() == [7, 8, 9]


def test_images_of_more_than_8_bits_are_refused(serve):
    serve(train=_split([0, 1], images=[_image(9), _image(40_000, mode="I;16")]), test=_split([0]))
    with pytest.raises(
        DataError, match=r"a/b: train: column 'picture', row 1: got an image of mode I;16, expected 8 bits"
    ):
        catalog.load("hf:a/b")


def test_images_are_resized_where_a_size_is_given(serve):
    serve(train=_split([0, 1, 2], images=[_image(9), _image(4, (8, 8)), _image(5)]), test=_split([0]))
    assert catalog.load("hf:a/b", size=6).train.x.shape == (3, 1, 6, 6)
    with pytest.raises(DataError, match=r"a/b: train: .*3 x 4 and, in row 1, 8 x 8\. Give data\.image_size"):
        catalog.load("hf:a/b")


def test_a_natural_partition_has_one_client_a_user(serve):
    users = ["w2", "w1", "w2", "w3", "w1", "w2"]
    serve(train=_split([0, 1, 2, 1, 0, 2], users), test=_split([0, 1, 2]))
    data = federate(Data(name="hf:a/b?user=writer", longtail=NoTail(), partition=Natural()), 0)
    assert [rows.tolist() for rows in data.owners] == [[1, 4], [0, 2, 5], [3]]
    assert data.sources[0].startswith("hf:a/b?user=writer (huggingface.co/datasets/a/b; licence: not stated")


# ---- what cannot be had


def test_a_missing_package_is_one_line_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as error:
        catalog.load("hf:flwrlabs/femnist?user=writer_id")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("data.name 'hf:flwrlabs/femnist?user=writer_id'")
    assert message.endswith('Run pip install "fedtail[data]".')
    with pytest.raises(DataError, match=r"hf:a/b.*pip install"):  # when an experiment is built: nothing was trained
        Federation(Experiment(data=Data(name="hf:a/b")))


def test_what_the_hub_says_is_passed_on(serve, monkeypatch):
    serve()

    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nwith details")

    monkeypatch.setattr(package, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"says: Couldn't reach 'a/b' on the Hub\. Check the name"):
        catalog.load("hf:a/b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", 'expected "hf:OWNER/NAME"'),
        ("hf:a/b/c", "expected"),
        ("hf:a/b?users=x", r"unknown option 'users'; did you mean 'user'\?"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message):
        catalog.load(name)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?train=all", r"no split 'all'; found train, test\. Name one"),
        ("?test=valid", "no split 'valid'"),
        ("?user=who", r"train: there is no column 'who'; found picture, kind, writer"),
        ("?image=kind", r"column 'kind' holds int in row 0, expected images"),
        ("?label=picture", r"column 'picture' holds no classes"),
    ],
)
def test_columns_and_splits_that_are_not_there(serve, query, message):
    serve(train=_split([0, 1, 2], ["a", "b", "c"]), test=_split([0], ["a"]))
    with pytest.raises(DataError, match=message):
        catalog.load(f"hf:a/b{query}")


def test_columns_that_cannot_be_guessed_are_listed(serve):
    serve(train=_split(["x", "y"], label=package.Value(dtype="string")))
    with pytest.raises(DataError, match=r"0 columns are of type ClassLabel; found picture \(Image\), kind \(Value\)"):
        catalog.load("hf:a/b")


def test_rows_without_label_or_user_are_refused(serve):
    serve(train=_split([0, 1, -1]), test=_split([0]))
    with pytest.raises(DataError, match=r"row 2 has no label \(-1\)"):
        catalog.load("hf:a/b")
    serve(train=_split([0, 1, 2], ["a", None, "b"]), test=_split([0], ["a"]))
    with pytest.raises(DataError, match="row 1 has no value in column 'writer'"):
        catalog.load("hf:a/b?user=writer")
