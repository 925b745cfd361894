"""Published weights of torch-conv-kan as kanseg models: VGG networks of Gram layers, from a local file.

The reference multiplies the Gram recurrence by 4 n^2 - 1 where it should divide, times a learned factor. The factor
takes that up exactly, so a converted model is an ordinary one of ours, with nothing of the reference's errors in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kanseg.bases.orthogonal import Gram
from kanseg.compat.legacy import multiplied_gram
from kanseg.compat.torch_conv_kan import from_torch_conv_kan
from kanseg.encoders.transfer import read_weights
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.files import make_folder
from kanseg.layers import BottleneckKANConv, ConvLayer, KANAttention
from kanseg.models import Classifier

# Published name -> the reference's function and arguments. Classes, degree and width are read off the weights.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "vgg_kagn11_v2": ("vggkagn", {"vgg_type": "VGG11v2"}),
    "vgg_kagn11_v4": ("vggkagn", {"vgg_type": "VGG11v4"}),
    "vgg_kagn_bn11_v4": ("vggkagn_bn", {"vgg_type": "VGG11v4"}),
    "vgg_kagn_bn11sa_v4": ("vggkagn_bn", {"vgg_type": "VGG11v4", "last_attention": True}),
}
FIRST, LAST = "features.0.base_conv.0.weight", "classifier.1.weight"
PREFIXES = ("", "model.", "module.")
KINDS = ("kagn", "bottleneck_kagn")  # of layers, ordinary and narrow


def convert_published(path: Path | str, architecture: str | None = None) -> tuple[Classifier, dict[str, Any]]:
    """A classifier of ours with the published weights, in `eval()`, and the options that make it again.

    Args:
        path: .safetensors file, or a state_dict that torch saved.
        architecture: name in `PUBLISHED`; default the one whose keys fit.

    Raises:
        UserError: the weights do not fit the architecture; the first keys that do not are named.
    """
    stored = read_weights(path)
    state = _without_prefix(stored)
    name = architecture or _guess(state, path)
    if name not in PUBLISHED:
        raise UsageError(f"Unknown architecture '{name}'.{did_you_mean(name, PUBLISHED)}")
    function, chosen = PUBLISHED[name]
    args = {**chosen, **_sizes(state)}
    narrow = [key for key in state if ".inner_proj." in key]
    if narrow and not function.endswith("_bn"):
        raise UserError(f"{path} is no {name}, which has none of {narrow[:3]}: its layers are narrow ones.")
    try:
        reference: Any = from_torch_conv_kan(function, args, state).network
    except UserError as error:
        raise UserError(f"{path} is no {name}: {error}") from error
    options = _options(args, reference)
    model = Classifier(2, args["input_channels"], args["num_classes"], **options)
    model.load_state_dict(reference.state_dict())
    for module in model.modules():
        if isinstance(module, Gram):
            _take_up(module)
    return model.eval(), options


def write_published(path: Path | str, out: Path | str, architecture: str | None = None) -> dict[str, Any]:
    """Convert and write OUT/model.safetensors: weights, and how to make the network; returns the latter."""
    from kanseg.training.checkpoint import EXPORTED, named, save_checkpoint

    model, options = convert_published(path, architecture)
    spec = {"name": "classifier", "spatial_dims": 2, "in_channels": model.in_channels}
    spec |= {"out_channels": model.out_channels, "options": options}
    info = {"model": spec, "source": f"torch-conv-kan {Path(path).name}"}
    save_checkpoint(make_folder(Path(out)) / EXPORTED, named("model", model.state_dict()), info)
    return spec


def _guess(state: Mapping[str, Tensor], path: Path | str) -> str:
    """The published architecture whose layers are named as in the file."""
    narrow = any(".inner_proj.0.weight" in key for key in state)
    numbers = [int(match[1]) for match in (re.match(r"features\.(\d+)\.", key) for key in state) if match]
    last = state.get(f"features.{max(numbers, default=0)}.base_conv.0.weight")
    widening = 0 if last is None or FIRST not in state else last.shape[0] // state[FIRST].shape[0]
    fits = {
        "vgg_kagn11_v2": not narrow and widening == 8,
        "vgg_kagn11_v4": not narrow and widening == 16,
        "vgg_kagn_bn11_v4": narrow and last is not None,
        "vgg_kagn_bn11sa_v4": narrow and last is None,  # attention is the last
    }
    for name, fit in fits.items():
        if fit:
            return name
    first = ", ".join(list(state)[:3])
    raise UserError(
        f"{path} is none of {', '.join(PUBLISHED)} of torch-conv-kan: its first keys are {first}. Name the "
        "architecture, or load other networks by kanseg.compat.from_torch_conv_kan."
    )


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what a wrapper has put before all names."""
    prefix = max(PREFIXES, key=lambda p: (all(key.startswith(p) for key in state), len(p)))
    return {key[len(prefix) :]: value for key, value in state.items()}


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments that the shapes of the weights tell; where the weights are missing, as published."""
    args: dict[str, Any] = {"input_channels": 3, "num_classes": 1000, "degree": 5, "width_scale": 2}
    if FIRST in state:
        args.update(input_channels=state[FIRST].shape[1], width_scale=state[FIRST].shape[0] / 16)
    if LAST in state:
        args["num_classes"] = state[LAST].shape[0]
    if "features.0.beta_weights" in state:
        args["degree"] = len(state["features.0.beta_weights"]) - 1
    return {**args, "expected_feature_shape": (1, 1)}


def _options(args: Mapping[str, Any], reference: Classifier) -> dict[str, Any]:
    """Options of our `Classifier` for the reference's arguments, norms and widths as in the converted network."""
    modules: list[Any] = list(reference.modules())
    layers = [layer for layer in modules if isinstance(layer, ConvLayer)]
    narrow = isinstance(layers[0].conv, BottleneckKANConv)
    encoder_options: dict[str, Any] = {"width": args["width_scale"]}
    for attention in (module for module in modules if isinstance(module, KANAttention)):
        own = [attention.query, attention.key, attention.value]
        layers = [layer for layer in layers if layer not in own]
        chosen: dict[str, Any] = {"gate": attention.gate, "scale": attention.scale, "norm": _norm(attention)}
        chosen["layer_options"] = {**_of_layers(own), "norm": _norm(own[0])}
        encoder_options |= {"attention": KINDS[narrow], "attention_at": "last", "attention_options": chosen}
    return {
        "encoder": args["vgg_type"].lower().replace("vgg", "vggkan"),
        "basis": KINDS[narrow],
        "pool_size": list(args["expected_feature_shape"]),
        "norm": _norm(layers[0]),
        "layer_options": _of_layers(layers),
        "encoder_options": encoder_options,
    }


def _norm(layer: Any) -> list[Any]:
    """MONAI's spec of the norm of a layer."""
    return ["batch" if isinstance(layer.norm, nn.BatchNorm2d) else "instance", {"affine": layer.norm.affine}]


def _of_layers(layers: Sequence[Any]) -> dict[str, Any]:
    """Degree and, of narrow layers, by what their channels are divided, told by the widest."""
    conv = layers[-1].conv
    if not isinstance(conv, BottleneckKANConv):
        return {"degree": conv.basis.degree}
    return {
        "degree": conv.inner.basis.degree,
        "dim_reduction": max(conv.in_channels, conv.out_channels) / conv.inner.in_channels,
    }


def _take_up(basis: Gram) -> None:
    """Multiply the learned factors by what the reference's recurrence has in excess of ours."""
    reference = multiplied_gram(basis.degree)
    for n, ((_, _, ours), (_, _, theirs)) in enumerate(
        zip(basis.recurrence, reference.recurrence, strict=True)
    ):
        if n:
            basis.beta.data[n - 1] *= theirs / ours


SOURCES = {"torch-conv-kan": write_published}
