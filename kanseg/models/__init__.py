"""Segmentation networks by name: `create_model("ukanet", spatial_dims=3, in_channels=1, out_channels=3)`."""

from kanseg.models import monai_network, ukanet  # noqa: F401  (they register)
from kanseg.models.model import MODELS, create_model, describe_model, list_models
from kanseg.models.ukanet import UKANet

__all__ = ["MODELS", "UKANet", "create_model", "describe_model", "list_models"]
