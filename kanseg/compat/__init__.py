"""Weights of other implementations in kanseg's modules."""

from kanseg.compat.torch_conv_kan import from_torch_conv_kan, reference_gradients, to_torch_conv_kan

__all__ = ["from_torch_conv_kan", "reference_gradients", "to_torch_conv_kan"]
