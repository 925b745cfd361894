"""What a label map holds, and how it came to be."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from kanseg.data.class_names import called, names_in
from kanseg.data.images import label_from, read_image, read_provenance
from kanseg.data.labels import value_counts
from kanseg.data.segmentations import Layers
from kanseg.data.suffixes import SEG_NRRD, suffix_of


def facts_of_label_map(path: Path) -> dict[str, Any]:
    """Size, spacing, classes and provenance of a label map, by words for a table.

    Returns:
        "classes": by name (of segments that share one, with the segment's number) value (of segments none), voxels
        and, of volumes, ml. "made by": what the header tells of the model, see
        `kanseg.data.images.read_provenance`.

    Raises:
        UserError: there is no such file, or it is no label map.
    """
    counts: list[tuple[str, int | None, int]]
    if suffix_of(path) == SEG_NRRD:
        drawn = Layers(path)
        image = drawn.image
        told = Counter(drawn.names.values())
        names = {n: f"{name} (segment {n})" if told[name] > 1 else name for n, name in drawn.names.items()}
        counts = [(name, None, len(drawn.voxels(n, path, image)[0])) for n, name in names.items()]
    else:
        image = read_image(path)
        found = {value: count for value, count in value_counts(label_from(image)).items() if value}
        counts = list(zip(called([*found], names_in(path)), found, found.values(), strict=True))
    flat = image.spatial_dims == 2
    voxel = prod(image.spacing) / 1e3
    classes = {
        name: {"value": value, "voxels": count, "ml": None if flat else round(count * voxel, 4)}
        for name, value, count in counts
    }
    kept = {n: {key: one for key, one in facts.items() if one is not None} for n, facts in classes.items()}
    known = {
        "size": image.array.shape[1:],
        "spacing": None if flat else [round(size, 4) for size in image.spacing],
        "classes": kept,
        "made by": read_provenance(path),
    }
    return {key: value for key, value in known.items() if value not in (None, {})}
