"""Segmentation networks by name: `create_model("ukanet", spatial_dims=3, in_channels=1, out_channels=3)`."""

from kanseg.models import libraries  # noqa: F401  (it registers)
from kanseg.models.classifier import Classifier
from kanseg.models.model import (
    MODELS,
    TABLES,
    check_patch,
    create_model,
    describe_model,
    list_models,
    table_of,
)
from kanseg.models.u2kanet import U2KANet
from kanseg.models.ukagnet import UKAGNet
from kanseg.models.ukan import UKAN
from kanseg.models.ukanet import UKANet

__all__ = [
    "MODELS",
    "TABLES",
    "UKAN",
    "Classifier",
    "U2KANet",
    "UKAGNet",
    "UKANet",
    "check_patch",
    "create_model",
    "describe_model",
    "list_models",
    "table_of",
]
