"""Univariate bases: the functions a KAN convolution expands each voxel in, by name in `BASES`."""

from kanseg.bases import (  # noqa: F401  (they register)
    bernstein,
    bspline,
    fourier,
    orthogonal,
    rational,
    rbf,
    relu,
    wavelet,
)
from kanseg.bases.basis import BASES, Basis
from kanseg.bases.create import check_left_aside, create_basis

__all__ = ["BASES", "Basis", "check_left_aside", "create_basis"]
