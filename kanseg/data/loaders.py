"""Batches: random patches for training, whole preprocessed cases for validation.

Every case is preprocessed once and kept in memory, or on the disk where they are too many for the plan's memory.
Sample `i` of epoch `e` depends on (seed, e, i) alone: neither the number of workers nor of processes nor an
interruption changes what the network sees.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kanseg.data.cascade import with_previous
from kanseg.data.cases import Case
from kanseg.data.labels import known_values, targets
from kanseg.data.plan import Plan
from kanseg.data.shelf import Shelf
from kanseg.data.sizing import CACHE_SHARE, loader_bytes
from kanseg.data.transforms import Item, augmentation, keys_of, load_case, preparation
from kanseg.errors import UserError
from kanseg.memory import for_data, free_memory, settle
from kanseg.progress import note, progress

Batch = dict[str, Tensor]
TRAINING_SHARE = 0.8  # of the memory for prepared cases; the rest is for those that validate
SHARED = Path("/dev/shm")  # through which Linux's processes hand over tensors
PLENTY = 2**30  # bytes of it that nobody needs to count
AHEAD, IN_USE = 2, 2  # batches: of a worker (torch's prefetch_factor), and at the training
# How workers start: forked they share the cases, where Python 3.14 would copy these; elsewhere as the system does it.
START = "fork" if sys.platform == "linux" else None


class Patches(Dataset):
    """Random patches of random cases: {"image": (C, *patch), "label": (1 or K, *patch), "seed": ()}.

    In a cascade "previous" (1, *patch) has the class numbers of the stage before. A patch is asked for by (epoch,
    index); its `seed` is what further random changes of it may start from.

    Args:
        pools: places in `items`; a pool is chosen first, then a case of it: one pool of all, or one a class for
            balance.
    """

    def __init__(
        self,
        plan: Plan,
        items: Sequence[Item],
        pools: Sequence[Sequence[int]],
        augment: Compose,
        seed: int,
    ) -> None:
        self.plan, self.items, self.pools, self.augment, self.seed = plan, items, pools, augment, seed

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        random = np.random.RandomState(np.random.SeedSequence((self.seed, *place)).generate_state(4))
        pool = self.pools[random.randint(len(self.pools)) if len(self.pools) > 1 else 0]
        item = self.items[pool[random.randint(len(pool))]]
        seed = int(random.randint(2**31))
        self.augment.set_random_state(seed=seed)
        (sample,) = self.augment(item)
        found = {key: torch.as_tensor(np.asarray(sample[key])) for key in keys_of(self.plan)}
        found["label"] = targets(found["label"], self.plan)
        return {**{key: x.contiguous() for key, x in found.items()}, "seed": torch.tensor(seed)}


class EndlessLoader:
    """Batches from any epoch and step on, of samples that are asked for by (epoch, index).

    Args:
        batch_size: samples a batch of this process.
        steps: batches an epoch.
        rank, ranks: this process of how many; together they see what one with `ranks` times the batch would.
        pin: keep batches in page-locked memory, for a GPU.
    """

    def __init__(
        self,
        samples: Dataset,
        *,
        batch_size: int,
        steps: int,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        pin: bool = False,
    ) -> None:
        self.samples, self.batch_size, self.steps = samples, batch_size, steps
        self.workers, self.rank, self.ranks, self.pin = workers, rank, ranks, pin

    def batches(self, epoch: int = 0, step: int = 0) -> Iterator[Batch]:
        """Batches without end, from a step of an epoch on; the workers run ahead over the ends of epochs."""
        workers = self._workers_that_fit(epoch)
        loader = DataLoader(
            self.samples,
            batch_sampler=self._places(epoch, step),  # type: ignore[arg-type]  # an iterator without end
            num_workers=workers,
            multiprocessing_context=START if workers else None,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # or the global one would lose a number here
            pin_memory=self.pin,
        )
        return iter(loader)

    def _workers_that_fit(self, epoch: int) -> int:
        """As many as wanted, or as can hand over their batches in what a container has of shared memory."""
        free = _shared_memory() if self.workers else PLENTY
        if free >= PLENTY:
            return self.workers
        batch = self.batch_size * sum(torch.as_tensor(x).nbytes for x in self.samples[epoch, 0].values())
        workers = min(self.workers, max(0, free // batch - IN_USE) // AHEAD)
        if workers < self.workers:
            note(
                f"data.workers={self.workers} hand over their batches ({batch / 2**20:.0f} MiB) in {SHARED}, which has "
                f"{free / 2**20:.0f} MiB: {workers or 'no other processes'} prepare patches. In a container more is "
                f"given by docker run --shm-size=2g (or --ipc=host)."
            )
        return workers

    def _places(self, epoch: int, step: int) -> Iterator[list[tuple[int, int]]]:
        epoch, step = epoch + step // self.steps, step % self.steps
        while True:
            first = (step * self.ranks + self.rank) * self.batch_size
            yield [(epoch, index) for index in range(first, first + self.batch_size)]
            step += 1
            if step == self.steps:
                epoch, step = epoch + 1, 0


class Prepared:
    """Cases to cut patches from, each read and prepared once, whichever folds of a plan train on it.

    Attributes:
        items: of all cases so far, in the order in which they were asked for.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.items = plan, Shelf(_share(plan, TRAINING_SHARE))
        self._places: dict[tuple[str, bool], int] = {}

    def places(self, cases: Sequence[Case], balanced: bool) -> list[int]:
        """Where the cases lie in `items`; see `kanseg.data.transforms.preparation`."""
        prepare = preparation(self.plan, balanced)
        for case in progress([c for c in cases if (c.id, balanced) not in self._places], "Loading cases"):
            item, keys = prepare(load_case(case, self.plan)[0]), keys_of(self.plan)
            self.items.append({key: item[key] for key in item if key in keys or key.endswith("_indices")})
            self._places[case.id, balanced] = len(self.items) - 1  # only now: a full disk may end a fold
            del item
            settle(for_data(self.plan.memory_bytes))
        return [self._places[case.id, balanced] for case in cases]


class TrainLoader(EndlessLoader):
    """Batches {"image": (B, C, *patch), "label": (B, 1, *patch), "seed": (B,)} of random patches.

    Args:
        prepared: that other loaders of the plan use, too.
        foreground, balanced, changes, strength: see `kanseg.data.transforms.augmentation`.
        how: batch_size, steps, workers, rank, ranks, pin; see `EndlessLoader`.
    """

    def __init__(
        self,
        plan: Plan,
        cases: Sequence[Case],
        *,
        seed: int,
        foreground: float = 0.5,
        balanced: bool = False,
        changes: bool = True,
        strength: str = "standard",
        prepared: Prepared | None = None,
        **how: Any,
    ) -> None:
        if not cases:
            raise UserError("There are no cases to train on.")
        prepared = prepared or Prepared(plan)
        items, places = prepared.items, prepared.places(cases, balanced)
        how["workers"] = affordable_workers(
            plan, how.get("workers", 0), how["batch_size"], how.get("pin", False)
        )
        options: dict[str, Any] = {"foreground": foreground, "balanced": balanced}
        augment = augmentation(plan, changes=changes, strength=strength, **options)
        pools = _pools(items, places, len(known_values(plan))) if balanced else [places]
        super().__init__(Patches(plan, items, pools, augment, seed), **how)


def affordable_workers(plan: Plan, asked: int, batch_size: int, gpu: bool = False) -> int:
    """As many processes as asked for, or as fit beside the training into the plan's memory, but one at least.

    Args:
        gpu: the plan's memory is that of a GPU, and the machine's own is what is free.
    """
    if not gpu and not plan.training_bytes:
        return asked
    room = free_memory() if gpu else plan.memory_bytes - plan.training_bytes
    workers = min(asked, max(1, int(room // loader_bytes(plan, batch_size))))
    if workers < asked:
        size = loader_bytes(plan, batch_size) / 2**20
        note(f"data.workers={asked} would pass the memory ({size:.0f} MiB each): {workers} prepare patches")
    return workers


def _pools(items: Sequence[Item], places: Sequence[int], classes: int) -> list[list[int]]:
    """The places of cases that have a class, for each foreground class that any has; all where none has any."""
    present = {i: set(np.unique(items[i]["label"]).tolist()) for i in places}
    pools = [[i for i, found in present.items() if number in found] for number in range(1, classes)]
    return [pool for pool in pools if pool] or [list(places)]


def _share(plan: Plan, share: float) -> int | None:
    """Bytes of memory for prepared cases; a plan without a figure sets no limit."""
    memory = for_data(plan.memory_bytes)
    return int(share * CACHE_SHARE * memory) if memory else None


def _shared_memory() -> int:
    """Bytes through which processes can hand over tensors; other systems than Linux have no such folder."""
    if sys.platform != "linux":
        return PLENTY
    return disk_usage(SHARED).free if os.access(SHARED, os.W_OK) else 0


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class ValidationCases(Sequence[Batch]):
    """Whole preprocessed cases, {"image": (1, C, *S), "label": (1, 1 or K, *S)}, kept as training cases are.

    In a cascade the last channel of the image is what the stage before said; see `kanseg.data.cascade`.
    """

    def __init__(self, plan: Plan, cases: Sequence[Case]) -> None:
        self.plan, self.items = plan, Shelf(_share(plan, 1 - TRAINING_SHARE))
        for case in cases:
            item = load_case(case, plan)[0]
            self.items.append({key: item[key] for key in keys_of(plan)})
            del item
            settle(for_data(plan.memory_bytes))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        item = self.items[index]
        return {"image": with_previous(item)[None], "label": targets(item["label"], self.plan)[None]}


def val_loader(plan: Plan, cases: Sequence[Case]) -> Sequence[Batch]:
    """The cases, preprocessed now."""
    return ValidationCases(plan, cases)
