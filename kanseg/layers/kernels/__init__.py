"""Convolution over an expansion and normalisation with activation, as single steps that keep next to nothing.

Both work on rows (voxels, channels), the memory of a `channels_last` tensor, a few thousand rows at a time, so that
what lies between two steps stays in the processor's cache. Where the compiled kernels are (`native`) they do the same.
"""

from kanseg.layers.kernels.conv_operator import expanded_conv
from kanseg.layers.kernels.norm_act import batch_norm_act, instance_norm_act

__all__ = ["batch_norm_act", "expanded_conv", "instance_norm_act"]
