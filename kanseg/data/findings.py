"""What the doctor can find in a data set, how bad it is, and what a repair does about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kanseg.data.pairs import BY_CLASS
from kanseg.data.values import BESIDE, TWO_WAYS

ERROR, WARNING, NOTE = "error", "warning", "note"
SHOWN = 3  # findings of a kind
LEFT_OUT = "the case is left out"
# What can be found: how bad it is (an error stops a training), and what a repair does about it, if anything.
KINDS: dict[str, tuple[str, str | None]] = {
    "layout": (ERROR, None),
    "patients": (ERROR, None),
    "patients in part": (WARNING, None),
    "patients alike": (WARNING, None),
    "patients in the test": (WARNING, None),
    "same name": (ERROR, None),
    "missing label": (ERROR, LEFT_OUT),
    "missing file": (ERROR, LEFT_OUT),
    "missing channel": (ERROR, LEFT_OUT),
    "no channel in the name": (ERROR, LEFT_OUT),
    "several series": (ERROR, LEFT_OUT),
    "segments": (ERROR, "they are joined by the names of their segments"),
    "label without image": (WARNING, "it is left out"),
    "several masks": (ERROR, "they are merged"),
    BY_CLASS: (ERROR, "they are numbered in the order of their folders' names"),
    "masks overlap": (WARNING, "the later class has what they share"),
    "unreadable": (ERROR, LEFT_OUT),
    "other dimension": (ERROR, LEFT_OUT),
    "other channels": (ERROR, LEFT_OUT),
    "not finite": (ERROR, "such voxels take the lowest finite value"),
    "4D with one channel": (NOTE, "it is saved as 3D"),
    "crooked axes": (WARNING, "they are turned to right angles"),
    "sheared axes": (WARNING, None),
    "extreme spacing": (WARNING, None),
    "turned by EXIF": (WARNING, None),
    "constant image": (WARNING, None),
    "different grids": (ERROR, LEFT_OUT),
    "grids differ by rounding": (ERROR, "the label takes the grid of its image"),
    "no label map": (ERROR, LEFT_OUT),
    "colours": (ERROR, "they are numbered, black is the background"),
    "colours for values": (ERROR, None),
    "lossy label": (ERROR, "it is split at the middle"),
    "soft edges": (WARNING, "it is split at the middle"),
    "float label": (NOTE, "it is saved as whole numbers"),
    "undeclared values": (ERROR, LEFT_OUT),
    "empty label": (WARNING, None),
    "class without a voxel": (WARNING, None),
    "no labels": (WARNING, None),
    "nothing to learn": (ERROR, None),
    "0 and 255": (NOTE, "255 becomes 1"),
    TWO_WAYS: (ERROR, "255 becomes 1"),
    BESIDE: (WARNING, None),
    "gaps in labels": (NOTE, "they are numbered 0, 1, 2, ..."),
    "duplicate": (ERROR, LEFT_OUT),
    "contradicting duplicates": (ERROR, "both are left out"),
    "near duplicate": (WARNING, "they become one patient"),
    "same patient": (WARNING, "they become one patient"),
    "folds share a patient": (ERROR, "the folds of the list are left aside"),
    "copied label": (WARNING, None),
    "left and right": (NOTE, None),
    "beginnings of names": (WARNING, None),
    # of images with classes (`kanseg.data.class_doctor`)
    "unreadable image": (ERROR, None),
    "values not finite": (ERROR, None),
    "patients in two parts": (ERROR, None),
    "copy with another class": (WARNING, None),
    "copy in another part": (WARNING, None),
    "few images of a class": (WARNING, None),
    "copy": (NOTE, None),
    "uneven classes": (NOTE, None),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind in `KINDS`, the case, what was found in words."""

    kind: str
    case: str
    message: str

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]

    @property
    def repair(self) -> str | None:
        return KINDS[self.kind][1]


def rows(findings: Sequence[Finding], source: Path) -> list[tuple[str, str, str, str]]:
    """For a table: severity, kind with its count, what was found (the first few, below `source`), and the repair."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    order: Mapping[str, int] = {severity: place for place, severity in enumerate((ERROR, WARNING, NOTE))}
    table = []
    for kind, group in sorted(by_kind.items(), key=lambda item: order[item[1][0].severity]):
        messages = [f"{f.case}: {f.message}" if f.case else f.message for f in group[:SHOWN]]
        messages = [message.replace(f"{source}/", "") for message in messages]
        if len(group) > SHOWN:
            messages.append(f"and {len(group) - SHOWN} more")
        count = f"{kind} ({len(group)})" if len(group) > 1 else kind
        table.append((group[0].severity, count, "\n".join(messages), group[0].repair or "not by kanseg"))
    return table
