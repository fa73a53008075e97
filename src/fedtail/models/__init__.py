"""Networks by name: their options here, without torch; the modules themselves are imported when one is built."""

from fedtail.models.specs import (
    DCGAN28,
    DCGAN32,
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

__all__ = [
    "DCGAN28",
    "DCGAN32",
    "MLP",
    "MODELS",
    "BranchCNN",
    "LeNet",
    "ModelSpec",
    "ResNet8",
    "ResNet18",
    "ResNet20",
    "ResNet34",
    "ResNet50",
    "Unified",
    "UserModel",
    "model_spec",
]
