"""Frozen networks that methods distil from: their options here, without torch; `loading` makes them, `store` keeps outputs."""

from fedtail.teachers.specs import (
    CLIP,
    TEACHERS,
    DINOv2,
    EfficientNetLite0,
    EfficientNetLite2,
    NoTeacher,
    OpenCLIP,
    Teacher,
    Timm,
    Trained,
    UserTeacher,
)

__all__ = [
    "CLIP",
    "TEACHERS",
    "DINOv2",
    "EfficientNetLite0",
    "EfficientNetLite2",
    "NoTeacher",
    "OpenCLIP",
    "Teacher",
    "Timm",
    "Trained",
    "UserTeacher",
]
