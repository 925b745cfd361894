"""Plugin for the viewer napari: opens scans with their geometry, segments them, and saves masks where they belong.

`napari.yaml` beside this module tells napari what is here (https://napari.org/stable/plugins). A layer is a tuple
(data, attributes, kind), as napari takes it from readers and hands it to writers, so the widget alone needs napari.
Axes of volumes run up, to the back and to the left, in mm: napari shows the last two as rows and columns, and a slice
lies as radiologists look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform

from kanseg.data.case_folders import by_channel, is_called_label
from kanseg.data.class_names import Colour, called, coloured, names_in
from kanseg.data.digests import content_digest
from kanseg.data.images import (
    FULL,
    LPS_TO_RAS,
    Image,
    check_pair,
    label_from,
    read_image,
    read_provenance,
    write_label,
)
from kanseg.data.labels import value_counts
from kanseg.data.listing import LABEL_FOLDERS, with_dicom
from kanseg.data.segmentations import Layers, read_segments
from kanseg.data.suffixes import SEG_NRRD, stem_of, suffix_of
from kanseg.errors import UserError
from kanseg.segmenter import Segmenter, spacing_of

if TYPE_CHECKING:
    from kanseg.data.plan import Plan
    from kanseg.inference.logits import Watch

Layer = tuple[Any, dict[str, Any], str]
REVERSED = np.eye(4)[[2, 1, 0, 3]]  # (x, y, z) of kanseg as (z, y, x) of napari, and back
OWN = "kanseg"  # the key in the metadata of a layer
# Attributes that say where a layer lies.
GRID = ("scale", "translate", "rotate", "shear", "affine", "units", "axis_labels")
PIXEL = "pixel"
MILLIMETRES = {"nanometer": 1e-6, "micrometer": 1e-3, "millimeter": 1.0, "centimeter": 10.0, "meter": 1e3}
MILLIMETRES |= {"nm": 1e-6, "um": 1e-3, "µm": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1e3}
CLEAR = (0.0, 0.0, 0.0, 0.0)  # the background
NAMELESS = (0.5, 0.5, 0.5, 1.0)  # what a hand adds to the classes
AUTO = "a GPU if there is one"


def get_reader(path: str | Sequence[str]) -> Callable[[str], list[Layer]] | None:
    """napari's question: what reads this file or folder, or None."""
    if not isinstance(path, str) or (Path(path).is_dir() and not with_dicom([Path(path)])):
        return None
    return read


def read(path: str) -> list[Layer]:
    """A volume as a layer: an image, or labels where its header names classes or its name or folder says so.

    Several channels are one layer, (C, *S).

    Raises:
        UserError: as `kanseg.data.images.read_image`, or segments that overlap.
    """
    file = Path(path)
    if suffix_of(file) == SEG_NRRD:
        drawn = Layers(file)
        names = dict(enumerate(drawn.names.values(), start=1))
        return [_label_layer(read_segments(file, drawn.image, [*names.values()]), drawn.image, names)]
    image, names = read_image(file, 3), names_in(file)
    if names or is_called_label(file) or file.parent.name in LABEL_FOLDERS:
        with suppress(UserError):  # else it is called so, and is none
            return [_label_layer(label_from(image), image, names)]
    data, attributes = _shown(
        image.array[0] if len(image.array) == 1 else np.moveaxis(image.array, 0, -1), image
    )
    attributes["metadata"][OWN]["scan"] = True
    return [(data, attributes, "image")]


def _label_layer(labels: np.ndarray, image: Image, names: Mapping[int, str]) -> Layer:
    data, attributes = _shown(labels, image)
    attributes["metadata"][OWN]["made by"] = read_provenance(image.path)
    return _with_classes(data, attributes, names, _voxel(image))


def _shown(array: np.ndarray, image: Image) -> tuple[np.ndarray, dict[str, Any]]:
    """Voxels (*S) or (*S, C) on the grid of an image as data of a layer, and where they lie."""
    affine = LPS_TO_RAS @ image.affine
    turn = io_orientation(affine)
    data = nib.apply_orientation(array, turn).transpose()
    matrix = np.eye(data.ndim + 1)
    matrix[-4:, -4:] = REVERSED @ affine @ inv_ornt_aff(turn, array.shape[:3]) @ REVERSED
    units = (*(PIXEL,) * (data.ndim - 3), "mm", "mm", "mm")
    known = {"path": str(image.path), "affine": image.affine}
    where = {"name": stem_of(image.path), "affine": matrix, "units": units, "metadata": {OWN: known}}
    return data, where


def _voxel(image: Image) -> float:
    """ml."""
    return float(abs(np.linalg.det(image.affine[:3, :3]))) / 1e3


def _with_classes(
    data: np.ndarray, attributes: Mapping[str, Any], names: Mapping[int, str], voxel: float | None
) -> Layer:
    """Labels with the colours that kanseg gives them, and a row for each class in the table of the layer.

    Args:
        voxel: ml, where it is known.
    """
    counts = value_counts(data)
    values = [value for value in sorted({*names, *counts}) if value]
    classes = {0: names.get(0, "background"), **dict(zip(values, called(values, names), strict=True))}
    numbers = [counts.get(value, 0) for value in classes]
    features: dict[str, Any] = {"index": [*classes], "class": [*classes.values()], "voxels": numbers}
    if voxel:
        features["ml"] = [round(number * voxel, 4) for number in numbers]
    colours: dict[int | None, Colour] = {None: NAMELESS, 0: CLEAR}
    colours.update((value, colour) for value, _, colour in coloured(classes))
    own = attributes.get("metadata", {}).get(OWN, {})
    own = {**own, "names": classes, "digest": content_digest(data)}
    look = {"features": features, "colormap": colours, "metadata": {OWN: own}}
    return data, {**attributes, **look}, "labels"


def write(path: str, data: Any, attributes: Mapping[str, Any]) -> list[str]:
    """Save a layer of labels in mm, on the grid of the scan that it came from or was made for, else on its own.

    Raises:
        UserError: it is no volume, or see `kanseg.data.images.write_label`.
    """
    labels = np.asarray(data)
    if labels.ndim != 3:
        raise UserError(
            f"{path}: a layer with {labels.ndim} axes, and volumes have 3. Save pictures as .png, with napari's own "
            "writer."
        )
    own = attributes.get("metadata", {}).get(OWN, {})
    if own.get("scan") and Path(path).resolve() == Path(own["path"]).resolve():
        raise UserError(f"{path} is the scan itself, which the mask would replace. Choose another name.")
    made = own.get("made by") or {}
    if made and content_digest(labels) != own.get("digest"):
        made = {**made, "changed by hand": True}
    affine, source = _affine_of(labels, attributes), Path(str(attributes.get("name", "layer")))
    labels = labels.transpose()
    first = own.get("affine")
    if first is not None:  # back to the axes of its file
        turn = ornt_transform(io_orientation(affine), io_orientation(first))
        affine = affine @ inv_ornt_aff(turn, labels.shape)
        labels = nib.apply_orientation(labels, turn)
        if np.allclose(affine, first, atol=1e-4):  # neither cut nor moved: its header goes along
            affine, source = first, Path(own["path"])
    dtype = np.result_type(np.min_scalar_type(int(labels.max(initial=0))), np.uint8).name
    like = Image(labels[None], affine, source, 3)
    write_label(Path(path), labels, like, dtype, "kanseg", names=own.get("names"), provenance=made)
    return [path]


def segment(
    layers: Sequence[Layer],
    model: Path | str,
    *,
    device: str = "cpu",
    tta: bool = False,
    watch: Watch | None = None,
) -> Layer:
    """Labels on the grid of an image layer, or of several that are the channels of one image.

    They are what `kanseg predict` gives for the image. Layers called as the model's channels go to them; others count
    in their order.

    Args:
        model: a run, a model or the name of weights; see `Segmenter.load`.
        watch: told of windows that are done.

    Returns:
        A layer whose metadata under "kanseg" has "notes": sentences on what looks wrong, to be told.

    Raises:
        UserError: layers that do not fit the model or each other, or no such model.
    """
    from kanseg.data.fingerprint import exchanged_channels, unlike_training

    segmenter = Segmenter.load(model, device)
    plan: Any = segmenter.plan
    layers = _in_order(layers, plan.channel_names)
    images = [_image_of(layer, plan) for layer in layers]
    for other in images[1:]:
        check_pair(images[0], other)
    array = np.concatenate([image.array for image in images])
    told = ", ".join(f"'{image.path}'" for image in images)
    if len(array) != len(plan.channel_names):
        raise UserError(
            f"{told}: {len(array)} channels, the model takes {len(plan.channel_names)} "
            f"({', '.join(plan.channel_names)}). Choose the layers of its channels, in this order."
        )
    image = Image(array, images[0].affine, images[0].path, plan.image_dims)
    labels = segmenter.predict(image, tta=tta, watch=watch)
    notes = [
        unlike_training(array.shape[1:], image.affine, plan.fingerprint),
        exchanged_channels(array, plan.fingerprint, plan.channel_names),
        "mirroring changes nothing: the plan names no axes for it" if tta and not plan.mirror_axes else None,
        None if (labels != plan.label_values[0]).any() else "nothing was found in it",
    ]
    data, attributes, _ = layers[0]
    own = attributes.get("metadata", {}).get(OWN, {})
    own = {key: own[key] for key in ("path", "affine", "scan") if key in own}
    own |= {"made by": segmenter.provenance(tta=tta), "notes": [note for note in notes if note]}
    made = {**_grid_of(data, attributes, labels.ndim), "name": f"{image.path} by {Path(model).name}"}
    voxel = _voxel(image) if labels.ndim == 3 and _is_placed(data, attributes) else None
    names = dict(zip(plan.label_values, plan.label_names, strict=True))
    data = labels.transpose() if labels.ndim == 3 else labels
    return _with_classes(data, {**made, "metadata": {OWN: own}}, names, voxel)


def _in_order(layers: Sequence[Layer], names: Sequence[str]) -> list[Layer]:
    """Layers in the order of the channels that their names end with; as they are where not all tell."""
    by_name = {Path(str(layer[1].get("name"))): layer for layer in layers}
    whole = [one for one in by_channel(by_name, names).values() if len(one) == len(names) == len(layers)]
    return [by_name[whole[0][name]] for name in names] if whole else list(layers)


def _image_of(layer: Layer, plan: Plan) -> Image:
    """An image layer as the model of a plan takes it; where nothing says how large voxels are, they are the plan's.

    Of pictures pixels count, whatever their size.
    """
    data, attributes, _ = layer
    array, dims = np.asarray(data[0] if attributes.get("multiscale") else data), plan.image_dims
    name = Path(str(attributes.get("name", "layer")))
    if attributes.get("rgb"):
        array = np.moveaxis(array[..., :3], -1, 0) * (FULL if array.dtype.kind == "f" else 1)
    elif array.ndim == dims:
        array = array[None]
    if array.ndim != dims + 1:
        raise UserError(
            f"'{name}' has the shape {np.shape(data)}; the model takes {dims}D images of {len(plan.channel_names)} "
            f"channels ({', '.join(plan.channel_names)}). Choose a layer of {dims} axes, or with channels before them."
        )
    affine = np.diag([*spacing_of(plan), *[1.0] * (4 - dims)])
    if dims == 3:
        affine = _affine_of(data, attributes) if _is_placed(data, attributes) else LPS_TO_RAS @ affine
        array = array.transpose(0, 3, 2, 1)
    return Image(np.asarray(array, np.float32), affine, name, dims)


def _affine_of(data: Any, attributes: Mapping[str, Any]) -> np.ndarray:
    """From voxels (x, y, z), the last axes of a layer from behind, to mm in RAS+."""
    return LPS_TO_RAS @ REVERSED @ _matrix(data, attributes)[-4:, -4:] @ REVERSED


def _is_placed(data: Any, attributes: Mapping[str, Any]) -> bool:
    """Whether something says how large voxels are: a unit of length, or a transform."""
    matrix = _matrix(data, attributes)[:-1, :-1]
    return _units(data, attributes)[-1] in MILLIMETRES or not np.allclose(matrix, np.eye(len(matrix)))


def _grid_of(data: Any, attributes: Mapping[str, Any], dims: int) -> dict[str, Any]:
    """Attributes that put a layer of `dims` axes where another lies, whose channels may stand before them."""
    units = _units(data, attributes)
    if len(units) == dims:
        return {key: attributes[key] for key in GRID if key in attributes}
    matrix = _matrix(data, attributes)[-dims - 1 :, -dims - 1 :]
    return {"affine": matrix, "units": ["mm" if unit in MILLIMETRES else unit for unit in units[-dims:]]}


def _matrix(data: Any, attributes: Mapping[str, Any]) -> np.ndarray:
    """From the indices of a layer's n axes to napari's world, lengths in mm: (n + 1, n + 1)."""
    units = _units(data, attributes)
    n = len(units)
    shear = np.asarray(attributes.get("shear", np.eye(n)))
    if shear.ndim == 1:  # what stands above the diagonal
        above, shear = shear, np.eye(n)
        shear[np.triu_indices(n, 1)] = above
    own = np.eye(n + 1)
    scale, rotate = attributes.get("scale", np.ones(n)), attributes.get("rotate", np.eye(n))
    own[:n, :n] = np.asarray(rotate) @ shear * scale
    own[:n, n] = attributes.get("translate", 0)
    lengths = np.diag([*(MILLIMETRES.get(unit, 1.0) for unit in units), 1.0])
    return lengths @ np.asarray(attributes.get("affine", np.eye(n + 1))) @ own


def _units(data: Any, attributes: Mapping[str, Any]) -> list[str]:
    """The unit of each axis of a layer."""
    full = data[0] if attributes.get("multiscale") else data
    axes = np.ndim(full) - bool(attributes.get("rgb"))
    return [str(unit) for unit in attributes.get("units") or (PIXEL,) * axes]


def segment_widget() -> Any:
    """napari's widget around `segment`, which works in a thread of its own."""
    import torch
    from magicgui import magicgui
    from napari import current_viewer
    from napari.layers import Image as ImageLayer
    from napari.layers import Layer as AnyLayer
    from napari.qt.threading import create_worker
    from napari.utils.notifications import show_error, show_warning
    from superqt.utils import ensure_main_thread

    from kanseg.training.checkpoint import shipped

    def images(_: Any) -> list[ImageLayer]:
        viewer = current_viewer()
        return [layer for layer in viewer.layers if isinstance(layer, ImageLayer)] if viewer else []

    @magicgui(
        call_button="Segment",
        layers={"widget_type": "Select", "choices": images, "label": "image"},
        model={"widget_type": "ComboBox", "choices": [*shipped()]},
        folder={"widget_type": "FileEdit", "mode": "d", "nullable": True, "label": "or its folder"},
        device={"widget_type": "ComboBox", "choices": [AUTO, "cpu"]},
        tta={"widget_type": "CheckBox", "label": "mirrored, too"},
    )
    def widget(layers, model, folder=None, device=AUTO, tta=False):  # magicgui reads no annotations here
        chosen = layers or (images(None) if len(images(None)) == 1 else [])
        if not chosen:
            show_error("Choose an image layer, or those of all channels of one image.")
            return
        viewer, tuples = current_viewer(), [layer.as_layer_data_tuple() for layer in chosen]
        processor = "cuda" if device == AUTO and torch.cuda.is_available() else "cpu"

        @ensure_main_thread
        def watch(done: int, total: int) -> None:
            worker.pbar.total = total
            worker.pbar.update(done - worker.pbar.n)

        def work() -> Layer | str:
            try:
                return segment(tuples, folder or model, device=processor, tta=tta, watch=watch)
            except UserError as error:  # to be told as a sentence, not as a traceback
                return str(error)

        def show(found: Layer | str) -> None:
            if isinstance(found, str):
                show_error(found)
                return
            viewer.add_layer(AnyLayer.create(*found))
            for note in found[1]["metadata"][OWN]["notes"]:
                show_warning(f"{found[1]['name']}: {note}")

        def free() -> None:
            button.enabled = True

        connect = {"returned": show, "finished": free}
        worker = create_worker(work, _start_thread=False, _connect=connect, _progress={"desc": "kanseg"})
        button.enabled = False
        worker.start()

    button: Any = widget.call_button
    return widget
