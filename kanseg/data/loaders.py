"""Batches: random patches for training, whole preprocessed cases for validation.

Every case is preprocessed once and kept in memory. Sample `i` of epoch `e` depends on (seed, e, i) alone: neither the
number of workers nor an interruption changes what the network sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kanseg.data.formats import Case
from kanseg.data.labels import targets
from kanseg.data.plan import Plan
from kanseg.data.transforms import KEYS, Item, augmentation, load_case, preparation
from kanseg.errors import UserError
from kanseg.progress import progress

Batch = dict[str, Tensor]


class Patches(Dataset):
    """Sample `i` is a random patch of a random case, {"image": (C, *patch), "label": (1, *patch)}."""

    def __init__(
        self, plan: Plan, items: Sequence[Item], augment: Compose, seed: int, epoch: int, count: int
    ) -> None:
        self.plan, self.items, self.augment = plan, items, augment
        self.seed, self.epoch, self.count = seed, epoch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        random = np.random.RandomState(
            np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(4)
        )
        item = self.items[random.randint(len(self.items))]
        self.augment.set_random_state(seed=int(random.randint(2**31)))
        (sample,) = self.augment(item)
        image, label = (torch.as_tensor(np.asarray(sample[key])) for key in KEYS)
        return {"image": image.contiguous(), "label": targets(label, self.plan).contiguous()}


class TrainLoader:
    """Batches {"image": (B, C, *patch), "label": (B, 1, *patch)}; `set_epoch` chooses which."""

    def __init__(
        self, plan: Plan, cases: Sequence[Case], *, batch_size: int, steps: int, seed: int, workers: int
    ) -> None:
        if not cases:
            raise UserError("There are no cases to train on.")
        prepare = preparation(plan)
        loaded = progress(cases, "Loading cases")
        self.items = [prepare(load_case(case, plan)[0]) for case in loaded]
        self.plan, self.augment = plan, augmentation(plan)
        self.batch_size, self.steps, self.seed, self.workers = batch_size, steps, seed, workers
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose patches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        count = self.steps * self.batch_size
        patches = Patches(self.plan, self.items, self.augment, self.seed, self.epoch, count)
        return iter(
            DataLoader(patches, self.batch_size, num_workers=self.workers, worker_init_fn=_one_thread)
        )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def train_loader(
    plan: Plan, cases: Sequence[Case], *, batch_size: int, steps: int, seed: int, workers: int = 0
) -> TrainLoader:
    """A loader of `steps` batches an epoch; preprocesses and keeps all cases now."""
    return TrainLoader(plan, cases, batch_size=batch_size, steps=steps, seed=seed, workers=workers)


def val_loader(plan: Plan, cases: Sequence[Case]) -> list[Batch]:
    """Whole preprocessed cases, {"image": (1, C, *S), "label": (1, 1 or K, *S)}, kept in memory."""
    items = (load_case(case, plan)[0] for case in cases)
    return [
        {"image": item["image"].as_tensor()[None], "label": targets(item["label"].as_tensor(), plan)[None]}
        for item in items
    ]
