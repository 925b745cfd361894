"""KAN convolutions: `KANConv`, the conv-norm-act `ConvLayer`, the published families, and blocks made of them."""

from kanseg.layers.attention import KANAttention
from kanseg.layers.bottleneck import BottleneckKANConv
from kanseg.layers.conv_layer import ConvLayer
from kanseg.layers.families import FAMILIES, conv_layer, family_name
from kanseg.layers.focal import FocalModulation
from kanseg.layers.heads import MatryoshkaHead
from kanseg.layers.kan_conv import KANConv
from kanseg.layers.kernels.operators import plain_steps
from kanseg.layers.linear import KANLinear
from kanseg.layers.mixture import MixtureOfExperts, take_balance_loss
from kanseg.layers.mlp import KANMLP, LinearLayer, linear_layer
from kanseg.layers.spatial_norm import SpatialNorm
from kanseg.layers.wavelet_conv import WaveletConv

__all__ = [
    "FAMILIES",
    "KANMLP",
    "BottleneckKANConv",
    "ConvLayer",
    "FocalModulation",
    "KANAttention",
    "KANConv",
    "KANLinear",
    "LinearLayer",
    "MatryoshkaHead",
    "MixtureOfExperts",
    "SpatialNorm",
    "WaveletConv",
    "conv_layer",
    "family_name",
    "linear_layer",
    "plain_steps",
    "take_balance_loss",
]
