"""Segmenter: plan, train, predict and evaluate from Python, as `kanseg plan`, `train`, `predict` and `evaluate` do."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kanseg.errors import UsageError, unknown_option
from kanseg.files import temporary_folder
from kanseg.memory import size_in_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from kanseg.config import Config
    from kanseg.data.cases import Case
    from kanseg.data.images import Image
    from kanseg.data.plan import Plan
    from kanseg.inference.predict import Prediction


# Options that go on to `kanseg.inference.predict.predict`.
PREDICT = ("overlap", "blending", "tta", "memory", "device", "watch")


class Segmenter:
    """A segmentation network with everything around it, from a folder of scans to label maps.

    Attributes:
        plan: how images are prepared and the network is sized; None before `fit` or `load`.
        network: the trained network in `eval()`, several of one plan as one; None before.
        info: the rest of the checkpoint (labels, config, versions, where it stands), of several the first; None before.
        rules: post-processing that was chosen for it, see `kanseg.inference.postprocess`.

    Args:
        model: name in `kanseg.list_models()`.
        spatial_dims: 2 or 3; default as the images are.
        options: of the network (basis, features_per_stage, ...); they go over those of the plan.

    Raises:
        UsageError: no such model, or one without such an option; the nearest is named.

    >>> Segmenter("ukanet", spatial_dims=3, basis="legendre")
    Segmenter('ukanet', spatial_dims=3, basis='legendre')
    """

    def __init__(self, model: str = "ukanet", spatial_dims: int | None = None, **options: Any) -> None:
        if spatial_dims not in (None, 2, 3):
            raise UsageError(
                f"spatial_dims must be 2 or 3 (or None for as the images are), got {spatial_dims!r}"
            )
        from kanseg.config import model_options
        from kanseg.models import MODELS

        MODELS.get(model)
        _refuse_unknown(f"Model '{model}'", options, model_options(model))
        self.model, self.spatial_dims, self.options = model, spatial_dims, options
        self.source: Path | None = None  # of the weights
        self.plan: Plan | None = None
        self.network: nn.Module | None = None
        self.rules: list[dict[str, Any]] = []
        self._infos: list[dict[str, Any]] = []  # of each network
        self._digests: list[str] = []  # of their files
        self._others: list[tuple[nn.Module, Plan]] = []  # networks of other plans that predict along
        self._temperatures: list[float] = []  # of the probabilities, one a plan

    def __repr__(self) -> str:
        told: dict[str, Any] = {"spatial_dims": self.spatial_dims}
        if self.plan is None:
            told |= self.options
        else:
            from kanseg.data.cases import few

            told |= {"source": str(self.source), "classes": few(self.plan.label_names[1:])}
        return f"Segmenter({', '.join([repr(self.model), *(f'{key}={value!r}' for key, value in told.items())])})"

    @property
    def info(self) -> dict[str, Any] | None:
        """What the checkpoint says beside plan and weights; see the class."""
        return self._infos[0] if self._infos else None

    def fit(
        self,
        data: Path | str,
        run: Path | str,
        *,
        fold: int | str = 0,
        overrides: Sequence[str] | Mapping[str, Any] | str = (),
        config: str = "default",
        resume: bool = False,
        override: bool = False,
        console: Console | None = None,
        **planned: Any,
    ) -> Segmenter:
        """Plan as `kanseg plan` does (unless the run folder has a plan) and train; then hold the best weights.

        Args:
            data: data set in any layout that `kanseg.data.formats.read_dataset` knows.
            run: run folder; see `kanseg.training.fit`.
            fold: number of the fold that validates; "all" for each in turn (their networks then predict together,
                `summary` tells of all); "final" for a training on every case.
            resume, override: see `kanseg.training.fit`.
            overrides: config keys, e.g. ["training.max_minutes=10"] or {"training.max_minutes": 10}.
            config: name in `configs/`.
            planned: memory, size, slices, mirror, regions, cascade, id_pattern, trial; see
                `kanseg.training.planning.plan_data`.

        Raises:
            UsageError: names or options that do not exist, or that a plan which is there would not follow.
            UserError: the data cannot be used.
        """
        from kanseg.data.formats import read_dataset
        from kanseg.training.cross_validation import cross_validate
        from kanseg.training.fit import fit
        from kanseg.training.planning import require_fold
        from kanseg.training.run_folder import ALL

        checked = self._config(config, _as_pairs(overrides))
        run = Path(run)
        if not (run / "plan.json").exists():
            require_fold(Path(data), fold, checked)
        plan = self._plan(Path(data), run, checked, console, planned)
        dataset = read_dataset(data, id_pattern=plan.id_pattern, regions=plan.given_regions, run=run)
        how: dict[str, Any] = {"resume": resume, "override": override, "console": console}
        if fold == ALL:
            self.summary = cross_validate(checked, plan, dataset, run, **how)
            return self._take(run)
        self.summary = fit(checked, plan, dataset, run, fold=fold, **how)
        return self._take(run / f"fold_{fold}")

    def predict(
        self,
        image: Path | str | np.ndarray | Image,
        out: Path | str | None = None,
        *,
        spacing: Sequence[float] | None = None,
        postprocess: bool = True,
        **options: Any,
    ) -> np.ndarray:
        """Label map of one image, in the label values of the training data, on the image's own grid.

        It is what `kanseg predict` gives for the same run, model or name.

        Args:
            image: a file, a DICOM folder, a `kanseg.data.images.Image` with its geometry, or an array (*S) or (C, *S);
                its axes run to the right, front and top where it is a volume.
            out: file to write the labels to; its suffix decides the format.
            spacing: of an array, mm, one number an axis; default the plan's.
            postprocess: apply the rules that a cross-validation chose.
            options: overlap, blending, tta, memory, device (default where the networks are); see
                `kanseg.inference.logits.whole_logits`.
        """
        from kanseg.inference.postprocess import apply_postprocessing
        from kanseg.inference.predict import write_prediction

        _refuse_unknown("Segmenter.predict", options, ("out", "spacing", "postprocess", *PREDICT))
        with self._predicted(image, spacing, options) as (predicted, case):
            labels, source = predicted.labels(), predicted.source
            if postprocess and self.rules:
                labels = apply_postprocessing(labels, self.rules, source.spacing)
            if out is not None:
                plan = predicted.parts[0].plan
                file = case if isinstance(image, Path | str) else None
                made = self.provenance(postprocess=postprocess, **options)
                write_prediction(Path(out), labels, source, plan, provenance=made, case=file)
        return labels

    def probabilities(
        self,
        image: Path | str | np.ndarray | Image,
        *,
        spacing: Sequence[float] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Probability of each class, (K, *S) float32 on the image's own grid, as `predict --probabilities` writes.

        The classes are those of `plan.label_names`. Regions that overlap stand each for itself, and the first map is
        what none of them has. A temperature that a cross-validation fitted counts; post-processing does not.

        Args:
            image, spacing, options: as in `predict`.
        """
        _refuse_unknown("Segmenter.probabilities", options, ("spacing", *PREDICT))
        with self._predicted(image, spacing, options) as (predicted, _):
            classes = predicted.parts[0].plan.label_names
            return np.stack([predicted.probability(number) for number in range(len(classes))])

    @contextmanager
    def _predicted(
        self, image: Path | str | np.ndarray | Image, spacing: Sequence[float] | None, options: dict[str, Any]
    ) -> Iterator[tuple[Prediction, Case]]:
        """One image predicted, and its case, whose files may be gone later; `options` are completed."""
        from kanseg.inference.predict import predict

        network, plan = self._trained()
        networks, plans = zip((network, plan), *self._others, strict=True)
        options.setdefault("device", next(network.parameters()).device)
        options["memory"] = size_in_bytes(options.get("memory"))
        with temporary_folder() as folder:
            case = _as_case(image, plan, Path(folder), spacing)
            yield predict(networks, case, plans, temperatures=self._temperatures, **options), case

    def provenance(self, *, postprocess: bool = True, **options: Any) -> dict[str, Any]:
        """How label maps of `predict` with these options come to be, as their headers tell it."""
        from kanseg.inference.provenance import by_networks

        _, plan = self._trained()
        return by_networks(plan, self._digests, self.rules if postprocess else [], **options)

    def evaluate(
        self, prediction: Path | str, reference: Path | str, out: Path | str | None = None
    ) -> dict[str, Any]:
        """Scores of a folder of label maps against a folder of references; see `kanseg evaluate`.

        The classes are those of the plan and its ignore label counts nowhere; without a plan they are all values.
        """
        from kanseg.evaluation.folders import evaluate_folders, options_of

        return evaluate_folders(prediction, reference, out, **(options_of(self.plan) if self.plan else {}))

    def save(self, folder: Path | str) -> Path:
        """Write the model (weights, plan, labels, config: all that prediction needs) to `folder`."""
        from kanseg.inference.ensemble import save_members

        network, _ = self._trained()
        if self._others:
            raise UsageError(
                "Networks of several plans make no one model: save each of them, or keep their run."
            )
        return save_members(Path(folder), network, self._infos, self.rules)

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> Segmenter:
        """A trained segmenter from a run folder (all its folds), a fold folder, a saved model, a checkpoint, a name."""
        return cls()._take(Path(path), device)

    def _take(self, path: Path, device: str = "cpu") -> Segmenter:
        from kanseg.inference.ensemble import Loaded
        from kanseg.inference.members import find_members
        from kanseg.training.checkpoint import read_info

        plan = read_info(find_members(path)[0]).get("plan") or {}
        if (task := plan.get("task", "segmentation")) != "segmentation":
            raise UsageError(f"{path} is for {task}. Predict by kanseg.inference.classify.predict_classes.")
        loaded = Loaded([path], device)
        self.source = path
        (self.network, self.plan), *self._others = zip(loaded.networks, loaded.plans, strict=True)
        self.rules, self._infos, self._digests = loaded.rules, loaded.infos, loaded.digests
        self._temperatures = loaded.temperatures
        spec = loaded.infos[0]["model"]
        self.model, self.spatial_dims, self.options = spec["name"], spec["spatial_dims"], spec["options"]
        return self

    def _config(self, name: str, overrides: Sequence[str]) -> Config:
        from kanseg.config import load_config, with_options

        config = load_config(name, overrides)
        options = {**self.options, **config.model.options}
        return with_options(config, "model", name=config.model.name or self.model, options=options)

    def _plan(
        self, data: Path, run: Path, config: Config, console: Console | None, asked: dict[str, Any]
    ) -> Plan:
        from rich.console import Console

        from kanseg.data.image_classes import require_label_maps
        from kanseg.data.plan import Plan
        from kanseg.training.parallel import once
        from kanseg.training.planning import plan_data

        file = run / "plan.json"
        own = {"data", "run", "console", "dim", "same", "config"}
        known = inspect.signature(plan_data).parameters.keys() - own
        _refuse_unknown("Segmenter.fit", asked, ["fold", "overrides", "config", "resume", "override", *known])
        there = file.exists()
        if not there:
            require_label_maps(data)
            how = {"console": console or Console(), "dim": self.spatial_dims, "config": config, **asked}
            once(lambda: plan_data(data, run, **how))
        plan = Plan.load(file)
        if there and (late := _other_wishes(plan, asked)):
            raise UsageError(
                f"{file} is there already and would not follow {late[0]}. Choose another run folder."
            )
        if self.spatial_dims not in (None, plan.spatial_dims):
            raise UsageError(
                f"{file} is {plan.spatial_dims}D, the Segmenter {self.spatial_dims}D. "
                "Choose another run folder, or the plan's spatial_dims."
            )
        return plan

    def _trained(self) -> tuple[nn.Module, Plan]:
        if self.network is None or self.plan is None:
            raise UsageError(
                "This Segmenter is not trained: call fit(data, run), or use Segmenter.load(path)."
            )
        return self.network, self.plan


def _refuse_unknown(owner: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for option in options:
        if option not in known:
            raise unknown_option(owner, option, known)


def _other_wishes(plan: Plan, asked: Mapping[str, Any]) -> list[str]:
    """What was asked of a plan and is not what a plan that is there was made by."""
    from kanseg.data.labels import parse_regions
    from kanseg.data.mirror import parse_mirror

    def same(name: str, value: Any) -> bool:
        if name == "memory":
            return size_in_bytes(value) in (None, plan.memory_bytes)
        if name == "mirror":
            axes = parse_mirror(value) if isinstance(value, str) else value
            return axes is None or plan.slice_axis is not None or sorted(axes) == sorted(plan.mirror_axes)
        if name == "regions":
            named = parse_regions(value) if isinstance(value, str) else value
            return not named or list(named) == list(plan.label_names[1:])
        if name == "cascade":
            return bool(value) == bool(plan.previous_stage)
        return name == "trial" or value == getattr(plan, name)

    return sorted(name for name, value in asked.items() if not same(name, value))


def _as_pairs(overrides: Sequence[str] | Mapping[str, Any] | str) -> list[str]:
    """Overrides as key=value; one alone may be a string, several a dictionary, also with dictionaries within.

    >>> _as_pairs("training=sgd"), _as_pairs({"training": {"lr": 0.1}, "model.options.basis": None})
    (['training=sgd'], ['training.lr=0.1', 'model.options.basis=null'])
    """
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(overrides)
    pairs: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            pairs += _as_pairs({f"{key}.{inner}": one for inner, one in value.items()})
        else:
            value = value.item() if isinstance(value, np.generic) else value
            text = str(value) if isinstance(value, str | Path) else json.dumps(value)
            pairs.append(f"{key}='{text}'" if isinstance(value, Path) else f"{key}={text}")
    return pairs


def spacing_of(plan: Plan, given: Sequence[float] | None = None) -> list[float]:
    """Of an array, mm: what is given, else the plan's; across slices that it learns the median of the training."""
    if given is None:
        found = list(plan.spacing)
        if plan.slice_axis is not None:
            across = plan.fingerprint.get("spacing", {}).get("median", [max(found)] * 3)[plan.slice_axis]
            found.insert(plan.slice_axis, across)
        return found
    found = [float(length) for length in given]
    if len(found) != plan.image_dims or not all(0 < length < math.inf for length in found):
        raise UsageError(f"spacing takes {plan.image_dims} lengths in mm, one an axis, got {tuple(given)}.")
    return found


def _as_case(
    image: Path | str | np.ndarray | Image, plan: Plan, folder: Path, spacing: Sequence[float] | None = None
) -> Case:
    """The image as a case; an array goes through files in `folder`, to be read like any image."""
    from kanseg.data.cases import Case
    from kanseg.data.images import Image, write_array
    from kanseg.data.unlabelled import find_images

    if not isinstance(image, np.ndarray) and spacing is not None:
        raise UsageError(f"spacing is for arrays; {getattr(image, 'path', image)} has its own.")
    if isinstance(image, Path | str):
        cases = find_images(image, names=plan.channel_names)
        if len(cases) != 1:
            raise UsageError(f"{image} holds {len(cases)} images, predict takes one; use `kanseg predict`.")
        return cases[0]
    dims, channels = plan.image_dims, len(plan.channel_names)
    if isinstance(image, Image):
        array, affine = image.array, image.affine
    else:
        array = image[None] if image.ndim == dims else image
        affine = np.diag([*spacing_of(plan, spacing), *[1.0] * (4 - dims)])
    if array.ndim != dims + 1 or len(array) != channels:
        axes = ", ".join("DHW"[-dims:])
        raise UsageError(f"predict takes an array ({channels}, {axes}), got shape {array.shape}.")
    array = np.asarray(array, dtype=np.float32)
    grid = Image(array, affine, folder / "array.mha", dims)
    names = [folder / f"array_{index:04d}.mha" for index in range(channels)]
    for name, channel in zip(names, array, strict=True):
        write_array(name, channel, grid, channel.dtype)
    return Case("array", tuple(names), None, "array")
