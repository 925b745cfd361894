"""Encoders by name: modules whose forward returns feature maps from fine to coarse."""

from kanseg.encoders.densekanet import DenseKANet
from kanseg.encoders.encoder import ENCODERS, Encoder, check_encoder_name, create_encoder
from kanseg.encoders.plainkanet import PlainKANet
from kanseg.encoders.pretrained import ForeignEncoder
from kanseg.encoders.rdkanet import RDKANet
from kanseg.encoders.reskanet import ResidualBlock, ResKANet
from kanseg.encoders.smp_bridge import register_smp
from kanseg.encoders.transfer import load_encoder
from kanseg.encoders.vggkan import VGGKAN

__all__ = [
    "ENCODERS",
    "VGGKAN",
    "DenseKANet",
    "Encoder",
    "ForeignEncoder",
    "PlainKANet",
    "RDKANet",
    "ResKANet",
    "ResidualBlock",
    "check_encoder_name",
    "create_encoder",
    "load_encoder",
    "register_smp",
]
