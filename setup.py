"""The optional extension; the rest stands in setup.cfg. Without a compiler kanseg installs too, slower on a CPU."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kanseg/layers/kernels/cpp")
native = Extension(
    "kanseg.layers.kernels._native",
    sources=[str(SOURCES / f"{name}.cpp") for name in ("avx512", "avx2", "plain")],
    depends=[str(SOURCES / name) for name in ("rows.h", "winograd.h", "direct.h", "wavelet.h")],
    extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-g0"],
    language="c++",
    optional=True,
)
setup(ext_modules=[native])
