"""KAN convolutions: `KANConv`, the conv-norm-act `ConvLayer`, and the published families by name."""

from kanseg.layers.bottleneck import BottleneckKANConv
from kanseg.layers.conv_layer import ConvLayer
from kanseg.layers.families import FAMILIES, conv_layer, family_name
from kanseg.layers.kan_conv import KANConv
from kanseg.layers.wavelet_conv import WaveletConv

__all__ = [
    "FAMILIES",
    "BottleneckKANConv",
    "ConvLayer",
    "KANConv",
    "WaveletConv",
    "conv_layer",
    "family_name",
]
