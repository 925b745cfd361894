"""The task of classification: images in, a class each out; accuracy while training, AUC and more at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from kanseg.config import Config
from kanseg.data.cases import Case
from kanseg.data.class_loader import ImageBatches, TrainingImages, seeded
from kanseg.data.class_plan import ClassPlan
from kanseg.data.image_classes import ImageClasses
from kanseg.data.loaders import EndlessLoader
from kanseg.errors import refused_options
from kanseg.evaluation.class_tables import PATIENT, PREDICTIONS, write_predictions
from kanseg.evaluation.classification import as_truth, mean_auc, score_values
from kanseg.files import make_folder
from kanseg.registry import Registry
from kanseg.training.losses import check_loss
from kanseg.training.task import Batch
from kanseg.training.validate import spread

CLASS_LOSSES = Registry("loss of classes")
LABEL_LOSSES = Registry("loss of classes of which an image has several")  # by the names of `CLASS_LOSSES`


@CLASS_LOSSES.register("ce")
class CrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits (N, K) and classes (N,) or their shares (N, K).

    Args:
        weight: of each class.
    """

    def __init__(self, label_smoothing: float = 0.0, weight: Sequence[float] | None = None) -> None:
        super().__init__(None if weight is None else torch.tensor(weight), label_smoothing=label_smoothing)


@CLASS_LOSSES.register("focal")
class FocalCrossEntropy(CrossEntropy):
    """Cross-entropy whose terms count (1 - p)^gamma, so the sure ones count less (Lin et al., arXiv 1708.02002)."""

    def __init__(
        self, gamma: float = 1.5, label_smoothing: float = 0.0, weight: Sequence[float] | None = None
    ) -> None:
        super().__init__(label_smoothing, weight)
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss; 1 - p is of the smoothed, mixed target's own class shares."""
        classes = logits.shape[1]
        shares = target if target.dim() == 2 else F.one_hot(target, classes).to(logits.dtype)
        shares = shares * (1 - self.label_smoothing) + self.label_smoothing / classes
        logs = logits.log_softmax(1)
        weight = 1.0 if self.weight is None else self.weight
        return -(weight * shares * (1 - logs.exp()) ** self.gamma * logs).sum(1).mean()


@LABEL_LOSSES.register("ce")
class BinaryCrossEntropy(nn.Module):
    """Mean cross-entropy of each class being there or not, of logits (N, K) and shares (N, K).

    Args:
        weight: of each class.
    """

    def __init__(self, label_smoothing: float = 0.0, weight: Sequence[float] | None = None) -> None:
        super().__init__()
        self.weight: Any
        self.label_smoothing, self.gamma = label_smoothing, 0.0
        self.register_buffer("weight", None if weight is None else torch.tensor(weight))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over images and classes; with `gamma` sure answers count less, as in `FocalCrossEntropy`."""
        shares = target * (1 - self.label_smoothing) + self.label_smoothing / 2
        terms = [(shares, F.logsigmoid(logits)), (1 - shares, F.logsigmoid(-logits))]
        losses = torch.stack([-share * (1 - logs.exp()) ** self.gamma * logs for share, logs in terms]).sum(0)
        return (losses if self.weight is None else losses * self.weight).mean()


@LABEL_LOSSES.register("focal")
class FocalBinaryCrossEntropy(BinaryCrossEntropy):
    """The same, whose terms count (1 - p)^gamma."""

    def __init__(
        self, gamma: float = 1.5, label_smoothing: float = 0.0, weight: Sequence[float] | None = None
    ) -> None:
        super().__init__(label_smoothing, weight)
        self.gamma = gamma


class Classification:
    """A fold's images, learned in shuffled passes and scored by accuracy, or by AUC where they have several classes.

    See `task.Task`.

    Args:
        main: whether this process writes files.
    """

    def __init__(
        self,
        config: Config,
        plan: ClassPlan,
        training: Sequence[Case],
        validation: Sequence[Case],
        device: torch.device,
        *,
        dataset: ImageClasses,
        main: bool = True,
    ) -> None:
        self.config, self.options, self.classes = config, config.training, config.classification
        self.plan, self.dataset, self.training, self.validation = plan, dataset, training, validation
        self.device, self.main = device, main
        self.batch_size = self.options.batch_size or plan.batch_size
        self.prepared = ImageBatches(dataset.read, plan, config.data.workers)
        self.tested: Sequence[Case] = dataset.test_cases or validation
        self.folder: Path | None = None
        self.metric = plan.metric
        self.criterion = class_loss(config, plan.multilabel).to(device)
        count = len(plan.label_names)
        example = torch.zeros(1, count, device=device)
        check_loss(self.criterion, f"classification.loss {self.classes.loss}", example, example)
        mixers = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
        chosen = {name: getattr(self.classes, name) for name in mixers}
        self.mixers = [
            mixers[name](num_classes=count, alpha=alpha) for name, alpha in chosen.items() if alpha
        ]
        self._samples(1)  # unknown changes are refused before any training

    def batches(self, epoch: int, step: int, rank: int, ranks: int) -> Iterator[Batch]:
        """Prepared images after random changes."""
        steps = self.options.steps_per_epoch * self.options.accumulate
        loader = EndlessLoader(
            self._samples(steps * self.batch_size * ranks),
            batch_size=self.batch_size,
            steps=steps,
            workers=self.config.data.workers,
            rank=rank,
            ranks=ranks,
            pin=self.device.type == "cuda",
        )
        return loader.batches(epoch, step)

    def augmented(self, batch: Batch) -> Batch:
        """The images mixed in pairs by one of mixup and cutmix, and their classes as shares (N, K)."""
        if not self.mixers or len(batch["image"]) < 2:
            return batch
        image, volumes = batch["image"], batch["image"].dim() == 5
        with seeded(int(batch["seed"][0])):
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            # Slices of volumes stand for frames: one box is cut through all of them.
            mixed, shares = mixer(tv_tensors.Video(image) if volumes else image, batch["label"])
        return {**batch, "image": torch.Tensor(mixed) if volumes else mixed, "label": shares}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Loss of logits; of the list of a nested head the sum over its members."""
        outputs = [output] if isinstance(output, Tensor) else output
        return torch.stack([self.criterion(logits, batch["label"]) for logits in outputs]).sum()

    def watched(self) -> Sequence[Sequence[Case]]:
        """Validation images, a batch an item."""
        return self._in_batches(spread(self.validation, self.options.validation_cases))

    def score(self, model: nn.Module, item: Sequence[Case], device: torch.device) -> list[float]:
        """How many are right, and of how many; for an AUC the probabilities, and what is there."""
        probabilities = self._probabilities(model, item, device)
        if self.plan.multilabel:
            truth = as_truth([case.values for case in item], len(self.plan.label_names))
            return [*probabilities.ravel().tolist(), *truth.ravel().tolist()]
        right = sum(
            int(row.argmax()) == case.values[0] for row, case in zip(probabilities, item, strict=True)
        )
        return [float(right), float(len(item))]

    def mean(self, scores: Sequence[list[float]]) -> Mapping[str, float]:
        """Accuracy of all watched images, or their mean AUC over the classes, if there is one."""
        if not self.plan.multilabel:
            right, count = np.sum(scores, axis=0)
            return {"top-1": float(right / count)}
        halves = [np.array(one).reshape(2, -1, len(self.plan.label_names)) for one in scores]
        area = mean_auc(*np.concatenate(halves, axis=1))
        return {} if area is None else {"mean": area}

    def held_out(self) -> Sequence[Sequence[Case]]:
        """The test images that the data come with, else those of validation."""
        return self._in_batches(self.tested) if self.options.final_validation else []

    def final_score(
        self, model: nn.Module, item: Sequence[Case], device: torch.device, folder: Path, digest: str
    ) -> list[list[float]]:
        """Probabilities of each image."""
        self.folder = folder
        return self._probabilities(model, item, device).tolist()

    def summarize(self, scores: Sequence[list[list[float]]]) -> Mapping[str, Any]:
        """Scores of the held-out images, whose probabilities are kept in FOLDER/predictions.csv."""
        probabilities = np.array([row for batch in scores for row in batch])
        names, several = self.plan.label_names, self.plan.multilabel
        values = [case.values for case in self.tested]
        groups = [case.group for case in self.tested]
        if self.folder is not None and self.main:
            path, ids = make_folder(self.folder) / PREDICTIONS, [case.id for case in self.tested]
            how: dict[str, Any] = {"multilabel": several, "more": {PATIENT: groups}}
            write_predictions(path, ids, probabilities, names, values, **how)
        found = score_values(probabilities, values, names, groups, self.config.data.seed, multilabel=several)
        return {"held_out": "test" if self.dataset.test_cases else "validation", **found}

    def _samples(self, epoch_size: int) -> TrainingImages:
        return TrainingImages(
            self.dataset.read,
            self.training,
            self.plan,
            changes=self.classes.changes,
            epoch_size=epoch_size,
            seed=self.config.seed,
            balanced=self.options.balanced,
        )

    def _in_batches(self, cases: Sequence[Case]) -> list[Sequence[Case]]:
        return [cases[start : start + self.batch_size] for start in range(0, len(cases), self.batch_size)]

    @torch.inference_mode()
    def _probabilities(self, model: nn.Module, cases: Sequence[Case], device: torch.device) -> np.ndarray:
        return self.plan.probabilities(model(self.prepared(cases).to(device))).cpu().numpy()


def class_loss(config: Config, multilabel: bool = False) -> nn.Module:
    """The loss of a config; `UsageError` for one that is not known or has no such option."""
    classes = config.classification
    options = {"label_smoothing": classes.label_smoothing, **classes.loss_options}
    with refused_options(f"The loss '{classes.loss}'"):
        return (LABEL_LOSSES if multilabel else CLASS_LOSSES).create(classes.loss, **options)
