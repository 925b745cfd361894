"""A MONAI bundle around an exported network: MONAI's transforms and inferer, in JSON, do what `kanseg predict` does.

Run by `python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir FOLDER` in its
folder, without kanseg. Format: MONAI Bundle Specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch

from kanseg import __version__
from kanseg.data.plan import Plan
from kanseg.errors import UserError
from kanseg.training.files import make_folder, write_json

NETWORK = "models/model.pt2"
CONFIG, METADATA = "configs/inference.json", "configs/metadata.json"


def check_bundle(plan: Plan) -> None:
    """Raise `UserError` for a plan whose images or classes MONAI's transforms in JSON cannot express."""
    alike = all(scheme == plan.normalization[0] for scheme in plan.normalization)
    reasons = {
        "pictures": plan.image_dims == 2,
        "volumes that are learnt slice by slice": plan.slice_axis is not None,
        "regions that overlap": bool(plan.regions),
        "channels that are normalised differently": not alike,
    }
    if unfit := [name for name, true in reasons.items() if true]:
        raise UserError(f"A MONAI bundle is not made for {unfit[0]}. Export --to onnx or torch.")


def write_bundle(out: Path, plan: Plan) -> None:
    """OUT/configs/inference.json and OUT/configs/metadata.json, for the network in OUT/models/model.pt2."""
    make_folder(out / "configs")
    write_json(out / CONFIG, inference(plan))
    write_json(out / METADATA, metadata(plan))


def inference(plan: Plan) -> dict[str, Any]:
    """What MONAI's ConfigParser runs."""
    program = (
        "torch.export.passes.move_to_device_pass(torch.export.load(@bundle_root + '/"
        + NETWORK
        + "'), @device)"
    )
    window = "{**item, 'pred': @inferer(item['image'][None].to(@device), @network)[0].cpu()}"
    return {
        "imports": ["$import glob", "$import os", "$import numpy as np", "$import torch.export.passes"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "network_def": f"${program}.module()",
        "network": "@network_def",
        "preprocessing": {"_target_": "Compose", "transforms": _before(plan)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(plan.patch_size),
            "sw_batch_size": 2,
            "overlap": 0.5,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _after(plan)},
        "run": [f"$[@postprocessing({window}) for item in @dataset]"],
    }


def _before(plan: Plan) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": plan.orientation, "labels": None},
        {
            "_target_": "Spacingd",
            "keys": "image",
            "pixdim": list(plan.spacing),
            "mode": "bilinear",
            "padding_mode": "border",
        },
    ]
    scheme: Mapping[str, Any] = plan.normalization[0]
    if scheme["scheme"] == "ct":
        for above, end in ((True, "lower"), (False, "upper")):
            step = {"_target_": "ThresholdIntensityd", "keys": "image", "above": above}
            steps.append({**step, "threshold": scheme[end], "cval": scheme[end]})
        numbers = {"subtrahend": scheme["mean"], "divisor": scheme["std"]}
        return [*steps, {"_target_": "NormalizeIntensityd", "keys": "image", **numbers}]
    how = {"nonzero": scheme["scheme"] == "zscore_nonzero", "channel_wise": True}
    return [*steps, {"_target_": "NormalizeIntensityd", "keys": "image", **how}]


def _after(plan: Plan) -> list[dict[str, Any]]:
    numbers = list(range(len(plan.label_values)))
    steps: list[dict[str, Any]] = [
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    ]
    if list(plan.label_values) != numbers:
        values = {"orig_labels": numbers, "target_labels": list(plan.label_values)}
        steps.append({"_target_": "MapLabelValued", "keys": "pred", **values})
    saved = {"output_dir": "@output_dir", "output_postfix": "seg", "output_dtype": f"$np.{plan.label_dtype}"}
    return [*steps, {"_target_": "SaveImaged", "keys": "pred", "separate_folder": False, **saved}]


def metadata(plan: Plan) -> dict[str, Any]:
    """What MONAI's schema asks a bundle to say of itself."""
    image = {"type": "image", "num_channels": plan.in_channels, "spatial_shape": list(plan.patch_size)}
    image |= {"dtype": "float32", "is_patch_data": True}
    classes = dict(zip(map(str, range(len(plan.label_names))), plan.label_names, strict=True))
    channels = {str(number): name for number, name in enumerate(plan.channel_names)}
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by kanseg {__version__}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": nib.__version__},
        "task": f"segmentation of {', '.join(plan.label_names[1:])}",
        "description": f"A network of kanseg trained on {plan.dataset_name}",
        "intended_use": "Research; not a medical device.",
        "network_data_format": {
            "inputs": {"image": {**image, "format": "magnitude", "channel_def": channels}},
            "outputs": {
                "pred": {
                    **image,
                    "format": "segmentation",
                    "num_channels": len(classes),
                    "channel_def": classes,
                }
            },
        },
    }
