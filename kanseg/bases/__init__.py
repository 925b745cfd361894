"""Univariate bases: the functions a KAN convolution expands each voxel in, by name in `BASES`."""

from kanseg.bases import bernstein, bspline, orthogonal, rbf, relu, wavelet  # noqa: F401  (they register)
from kanseg.bases.basis import BASES, Basis, create_basis

__all__ = ["BASES", "Basis", "create_basis"]
