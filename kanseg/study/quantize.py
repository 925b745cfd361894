"""Networks of whole numbers: the convolutions and matrix products of an ONNX file in int8, by onnxruntime.

Static quantisation after training: weights by output channel, activations by their range on windows of real images. All
else stays in float32, as do the functions of KAN layers (their recurrences and fractions, norms, activations), the
convolutions that see the image itself, and those that give the logits: with these in int8, label maps differ far more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from kanseg.files import temporary_folder

PRODUCTS = ("Conv", "MatMul", "Gemm")  # operations that are quantised


def quantize(source: Path, out: Path, windows: Sequence[Tensor]) -> list[str]:
    """Write the ONNX file `source` in int8 to `out`; returns the names of its products that stay in float32.

    Args:
        windows: inputs that show the ranges of all activations, (N, C, *patch) each.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Windows(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left: Iterator[Tensor] = iter(windows)
            self.name = name

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]  # None ends it
            window = next(self.left, None)
            return None if window is None else {self.name: window.numpy()}

    # Beside the result, which may be too large for where temporary files lie.
    with temporary_folder(out.parent) as folder, _for_temporary_files(folder):
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared, load_external_data=False).graph
        kept = ends(graph.node)
        quantize_static(
            prepared,
            out,
            Windows(graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
        )
    return kept


@contextmanager
def _for_temporary_files(folder: str) -> Iterator[None]:
    """Within it those that onnxruntime makes, which a kill would leave, lie in this folder."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def ends(nodes: Sequence[Any]) -> list[str]:
    """Names of the products of a graph that no other stands before, and of those that no other stands behind.

    Args:
        nodes: of ONNX, in the order of their computation.
    """
    first = _first((node, node.input, node.output) for node in nodes)
    last = _first((node, node.output, node.input) for node in reversed(nodes))
    return list(dict.fromkeys(first + last))


def _first(nodes: Iterable[tuple[Any, Iterable[str], Iterable[str]]]) -> list[str]:
    found: list[str] = []
    behind: set[str] = set()
    for node, given, made in nodes:
        follows = not behind.isdisjoint(given)
        product = node.op_type in PRODUCTS
        if product and not follows:
            found.append(node.name)
        if product or follows:
            behind.update(made)
    return found
