"""Encoders by name: modules whose forward returns feature maps from fine to coarse."""

from kanseg.encoders import reskanet  # noqa: F401  (it registers)
from kanseg.encoders.encoder import ENCODERS, Encoder
from kanseg.encoders.reskanet import ResidualBlock, ResKANet

__all__ = ["ENCODERS", "Encoder", "ResKANet", "ResidualBlock"]
