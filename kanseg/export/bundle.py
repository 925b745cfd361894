"""A MONAI bundle around an exported network: MONAI's transforms and inferer, in JSON, do what `kanseg predict` does.

Run in its folder by `RUN`, without kanseg. What is done to label maps after that (`kanseg.inference.postprocess`) is no
part of it. Format: MONAI Bundle Specification.
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
from kanseg.data.plans import AnyPlan
from kanseg.errors import UserError
from kanseg.files import make_folder, write_json, write_text
from kanseg.inference.ensemble import Loaded, save_members
from kanseg.training.checkpoint import BUNDLE_MODELS, EXPORTED

NETWORK = f"{BUNDLE_MODELS}/model.pt2"
CONFIG, METADATA, README = "configs/inference.json", "configs/metadata.json", "docs/README.md"
# The number of the last region whose logit is positive: regions are painted over each other in their order.
LAST_REGION = "$lambda x: ((x > 0) * torch.arange(len(x)).reshape(-1, 1, 1, 1)).amax(0, keepdim=True)"
RUN = f"python -m monai.bundle run --config_file {CONFIG} --bundle_root . --dataset_dir FOLDER"


def check_bundle(plan: AnyPlan) -> None:
    """Raise `UserError` for a plan whose images or classes MONAI's transforms in JSON cannot express."""
    if not isinstance(plan, Plan):
        raise UserError("A MONAI bundle is not made for classifiers. Export --to onnx or torch.")
    alike = all(scheme == plan.normalization[0] for scheme in plan.normalization)
    reasons = {
        "pictures": plan.image_dims == 2,
        "volumes that are learnt slice by slice": plan.slice_axis is not None,
        "channels that are normalised differently": not alike,
    }
    if unfit := [name for name, true in reasons.items() if true]:
        raise UserError(f"A MONAI bundle is not made for {unfit[0]}. Export --to onnx or torch.")


def write_bundle(out: Path, loaded: Loaded) -> None:
    """OUT/configs, OUT/docs/README.md and the saved model OUT/models, for the program in OUT/models/model.pt2."""
    plan = loaded.plan
    save_members(out / BUNDLE_MODELS, loaded.networks[0], loaded.infos, loaded.rules)
    for folder in ("configs", "docs"):
        make_folder(out / folder)
    write_json(out / CONFIG, inference(plan))
    write_json(out / METADATA, metadata(plan))
    write_text(out / README, readme(plan))


def readme(plan: Plan) -> str:
    """How the bundle is run, for its docs."""
    values = (f"{v} {name}" for v, name in zip(plan.label_values, plan.label_names, strict=True))
    axis = " (a fourth axis, in this order)" if plan.in_channels > 1 else ""
    version = torch.__version__.partition("+")[0]
    return f"""# {plan.dataset_name}, exported by kanseg {__version__}

Run it in this folder on a folder of NIfTI images; label maps are written to `eval/`:

    pip install "monai[fire]" nibabel
    {RUN}

- It was written with monai {monai.__version__} and torch {version}.
- Without the package `fire` MONAI's command stops with an error.
- `monai.bundle.create_workflow` takes it as it is. Its `evaluator` writes the same and needs `pytorch-ignite`.
- Channels of an image: {", ".join(plan.channel_names)}{axis}.
- Values of a label map: {", ".join(values)}.
- Post-processing of label maps is not part of the bundle: where `postprocessing` in `model.json` lists rules,
  `kanseg predict` applies them as well.
- The network is a program of `torch.export`, `{NETWORK}`. The same weights by their names, `{EXPORTED}` beside it, are
  for kanseg alone: this folder is a model to predict with, and to start trainings from (`training.weights=`).

Research software; not a medical device.
"""


def inference(plan: Plan) -> dict[str, Any]:
    """What MONAI's ConfigParser runs."""
    program = (
        "torch.export.passes.move_to_device_pass(torch.export.load(@bundle_root + '/"
        + NETWORK
        + "'), @device)"
    )
    window = "{**item, 'pred': @inferer(item['image'][None].to(@device), @network)[0].cpu()}"
    return {
        "imports": [
            f"$import {name}" for name in ("glob", "os", "numpy as np", "torch", "torch.export.passes")
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "network_def": f"$torch.export.unflatten({program})",  # unlike `.module()` it has eval() and train()
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
        # For MONAI's own workflows, which ask for an evaluator; it takes the package pytorch-ignite.
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "val_data_loader": "@dataloader",
            **{name: f"@{name}" for name in ("device", "network", "inferer", "postprocessing")},
        },
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
    if scheme["scheme"] == "minmax":
        return [*steps, {"_target_": "ScaleIntensityd", "keys": "image", "minv": 0.0, "maxv": 1.0}]
    if scheme["scheme"] in ("ct", "fixed"):
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
        {"_target_": "Lambdad", "keys": "pred", "func": LAST_REGION}
        if plan.regions
        else {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
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
