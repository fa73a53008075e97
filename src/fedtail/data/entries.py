"""The data sets that fedtail knows by name: their facts, their formats and where they can be had."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fedtail.data import formats, images, svhn
from fedtail.data.dataset import Split, array_hashes, idx_hashes, stratified_split
from fedtail.errors import DataError

Splits = tuple[Split, Split]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

PROTOCOL_NORMALISATION: dict[str, Statistics] = {
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
}
"""Mean and deviation of the long-tail protocol, by set: ImageNet's for CIFAR-10, its own for CIFAR-100 (as in the
official code of Fed-GraB and FedLoGe). All other sets are normalised with their own."""

DIGITS_TEST = 500
"""Test examples of `digits`; the other 1,297 are for training."""
DIGITS_SEED = 0
"""Seed of that split: `stratified_split` with NumPy's default generator."""


class Format(NamedTuple):
    """How the files of a set are found, read and compared with what is known of them."""

    files: Callable[[Path, str], dict[str, Path]]
    """(path, remedy) -> the file to read for each official name."""
    read: Callable[[Path, str], Splits]
    """(path, remedy) -> training and test split; the remedy ends the message of a `DataError`."""
    hashes: Callable[[Split], tuple[str, str]] | None
    """split -> SHA-256 of the contents of its examples and of its labels; None where that would decode every file."""


class Download(NamedTuple):
    """One file at its official address."""

    url: str
    md5: str = ""
    """MD5 of the file as the authors publish it; empty where they publish none."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A data set that fedtail knows by name: its facts, its format and where it can be had."""

    name: str
    summary: str
    """One line for lists."""
    class_names: tuple[str, ...]
    sizes: tuple[int, int]
    """Training and test examples."""
    mean: tuple[float, ...]
    """Mean of the training pixels / 255, by channel."""
    std: tuple[float, ...]
    licence: str
    source: str
    """Whom to cite."""
    format: Format
    sha256: tuple[str, str, str, str] | None = None
    """`Format.hashes` of the training and of the test split; None where no trusted figures exist."""
    downloads: tuple[Download, ...] = ()
    installed: Path | None = None
    """Where an installed package has the files: the system's or, for `digits`, fedtail itself."""
    debian_package: str | None = None
    lazy: bool = False
    """Image files stay where they are and are decoded when they are used; only their lists are read."""
    obtain: str = ""
    """Where the user has to obtain the files; empty: `downloads` has them."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def remedy(self) -> str:
        """What mends damaged files of this set: the end of an error message."""
        return self.obtain or f"Run `fedtail data get {self.name}` to obtain it anew."


def _digits_files(path: Path, remedy: str) -> dict[str, Path]:
    if path != DIGITS_FILE:
        raise DataError(f"{path}: digits is read from fedtail's own {DIGITS_FILE} only. {remedy}".rstrip())
    return {path.name: path}


def _read_digits(path: Path, remedy: str) -> Splits:
    with np.load(path, allow_pickle=False) as archive:
        x = np.round(archive["x"] * (255 / 16)).astype(np.uint8)[:, None]
        y = archive["y"].astype(np.int64)
    train, test = stratified_split(y, DIGITS_TEST, np.random.default_rng(DIGITS_SEED))
    return Split(x[train], y[train]), Split(x[test], y[test])


DIGITS_FILE = Path(__file__).with_name("digits.npz")
_IDX = Format(formats.idx_files, formats.read_idx_folder, idx_hashes)
_TEN_DIGITS = tuple("0123456789")
_CIFAR_ADDRESS = "https://www.cs.toronto.edu/~kriz/"
_CIFAR_SOURCE = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, 2009"

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


def _cifar(classes: Literal[10, 100]) -> Format:
    return Format(
        lambda path, remedy: formats.cifar_files(path, classes, remedy),
        lambda path, remedy: formats.read_cifar(path, classes, remedy),
        array_hashes,
    )


def _idx_downloads(address: str) -> tuple[Download, ...]:
    return tuple(Download(f"{address}{name}.gz") for name in formats.IDX_NAMES)


_ENTRIES = (
    Entry(
        name="digits",
        summary="1,797 handwritten digits, 8x8 grey, 10 classes; comes with fedtail",
        class_names=_TEN_DIGITS,
        sizes=(1797 - DIGITS_TEST, DIGITS_TEST),
        mean=(0.30542,),
        std=(0.37573,),
        licence="CC BY 4.0",
        source="E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (test set), UCI Machine Learning "
        "Repository, 1998; doi.org/10.24432/C50P49",
        format=Format(_digits_files, _read_digits, array_hashes),
        sha256=(
            "7281d32c0b25ff9d9edcd0dbbf06eab9883c56f4d032dc69eb0d0771eeddd90e",
            "7018fb1c33853192a6a7b9896ba75a053d9e2c8b0fb298c06e443617288f75c5",
            "0a87974fb72dc5510d03a30d80932160ddd1efb3ff9341c9cca926d8628c5c12",
            "bf41856f901d8387359bfa2529c24dc1f38980d5923358141a4ac2f01ba6a910",
        ),
        installed=DIGITS_FILE,
    ),
    Entry(
        name="fashion-mnist",
        summary="70,000 pictures of clothes, 28x28 grey, 10 classes",
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        sizes=(60_000, 10_000),
        mean=(0.2860,),
        std=(0.3530,),
        licence="MIT",
        source="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, 2017; arXiv:1708.07747",
        format=_IDX,
        sha256=(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        downloads=_idx_downloads("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
        installed=Path("/usr/share/datasets/fashion-mnist"),
        debian_package="dataset-fashion-mnist",
    ),
    Entry(
        name="mnist",
        summary="70,000 handwritten digits, 28x28 grey, 10 classes",
        class_names=_TEN_DIGITS,
        sizes=(60_000, 10_000),
        mean=(0.13066,),
        std=(0.30811,),
        licence="CC BY-SA 3.0, as distributors state it",
        source="Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits, 1998",
        format=_IDX,
        sha256=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        downloads=_idx_downloads("https://ossci-datasets.s3.amazonaws.com/mnist/"),
    ),
    Entry(
        name="cifar10",
        summary="60,000 photographs, 32x32 RGB, 10 classes",
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        sizes=(50_000, 10_000),
        mean=(0.49140, 0.48216, 0.44653),
        std=(0.24703, 0.24349, 0.26159),
        licence="none stated; cite the report",
        source=_CIFAR_SOURCE,
        format=_cifar(10),
        sha256=(
            "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        ),
        downloads=(Download(_CIFAR_ADDRESS + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
    ),
    Entry(
        name="cifar100",
        summary="60,000 photographs, 32x32 RGB, 100 classes (fine labels)",
        class_names=tuple(_CIFAR100_CLASSES.split()),
        sizes=(50_000, 10_000),
        mean=PROTOCOL_NORMALISATION["cifar100"][0],
        std=PROTOCOL_NORMALISATION["cifar100"][1],
        licence="none stated; cite the report",
        source=_CIFAR_SOURCE,
        format=_cifar(100),
        downloads=(Download(_CIFAR_ADDRESS + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
    ),
    Entry(
        name="svhn",
        summary="99,289 photographs of house numbers' digits, 32x32 RGB, 10 classes",
        class_names=_TEN_DIGITS,
        sizes=(73_257, 26_032),
        mean=(0.43768, 0.44377, 0.47280),
        std=(0.19803, 0.20102, 0.19704),
        licence="for non-commercial use only, as its authors state it",
        source="Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS Workshop on Deep "
        "Learning and Unsupervised Feature Learning, 2011",
        format=Format(svhn.svhn_files, svhn.read_svhn, array_hashes),
        downloads=tuple(
            Download(f"http://ufldl.stanford.edu/housenumbers/{name}", md5)
            for name, md5 in zip(
                svhn.SVHN_FILES, ("e26dedcc434d2e4c54c9b2d4a06d8373", "eb5a983be6a315427106f1b164d9cef3"), strict=True
            )
        ),
    ),
    Entry(
        name="tiny_imagenet",
        summary="110,000 photographs, 64x64 RGB, 200 classes; you supply the files",
        class_names=tuple(str(label) for label in range(200)),
        sizes=(100_000, 10_000),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        licence="ImageNet's terms of access (research and education)",
        source="Tiny ImageNet Visual Recognition Challenge, course CS231n, Stanford University, 2015",
        format=Format(images.tiny_imagenet_files, images.read_tiny_imagenet, None),
        lazy=True,
        obtain="Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip (248 MB, MD5 90528d7ca1a48142e341f4ef8d21d0de) and "
        "leave its folder as it is.",
    ),
    Entry(
        name="imagenet_lt",
        summary="165,846 photographs, 224x224 RGB, 1,000 classes, long-tailed; you supply the files",
        class_names=tuple(str(label) for label in range(1000)),
        sizes=(115_846, 50_000),
        mean=images.IMAGENET_STATISTICS[0],
        std=images.IMAGENET_STATISTICS[1],
        licence="ImageNet's terms of access (research and education)",
        source="Z. Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019; arXiv:1904.05160",
        format=Format(images.imagenet_lt_files, images.read_imagenet_lt, None),
        lazy=True,
        obtain=f"Put the lists {' and '.join(images.IMAGENET_LT_LISTS)} (from "
        "https://github.com/zhmiao/OpenLongTailRecognition-OLTR) beside the folders train and val of ImageNet 2012 "
        "(from https://image-net.org, after registration; val with a folder for each class).",
    ),
    Entry(
        name="inaturalist_user",
        summary="155,941 photographs by 9,275 users, 224x224 RGB, 1,203 classes, long-tailed; you supply the files",
        class_names=tuple(str(label) for label in range(1203)),
        sizes=(120_300, 35_641),
        mean=images.IMAGENET_STATISTICS[0],
        std=images.IMAGENET_STATISTICS[1],
        licence="each photograph has its own; see iNaturalist 2017",
        source="T.-M. H. Hsu, H. Qi, M. Brown, Federated Visual Classification with Real-World Data Distribution, "
        "ECCV 2020; arXiv:2003.08082 (iNaturalist-User-120k)",
        format=Format(images.inaturalist_files, images.read_inaturalist, None),
        lazy=True,
        obtain=f"Put the lists {' and '.join(images.INATURALIST_LISTS)} (from "
        "http://storage.googleapis.com/gresearch/federated-vision-datasets/inaturalist-user-120k.zip) above the images "
        "of iNaturalist 2017 (from https://github.com/visipedia/inat_comp/tree/master/2017).",
    ),
)

REGISTRY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""Every data set that `load` knows by name."""
