"""Post-processing does what its rule says, and is chosen only where it helps."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from kanseg.errors import UserError
from kanseg.evaluation.metrics import dice_of_values
from kanseg.inference.postprocess import (
    LEAST_GAIN,
    SHARES,
    Rule,
    Triple,
    apply_postprocessing,
    choose_postprocessing,
)


def scene(dims: int = 3) -> np.ndarray:
    """A large block of 1 with a hole, a small one of 1, and a block of 2."""
    labels = np.zeros((20,) * dims, np.uint8)
    labels[(slice(2, 9),) * dims] = 1
    labels[(slice(5, 6),) * dims] = 0
    labels[(slice(16, 18),) * dims] = 1
    labels[(slice(11, 14),) * dims] = 2
    return labels


@pytest.mark.parametrize("dims", [2, 3])
def test_each_rule_changes_what_it_names_and_nothing_else(dims: int) -> None:
    labels = scene(dims)
    before = labels.copy()
    largest = apply_postprocessing(labels, [{"labels": [1], "largest": True}])
    assert (largest == 1).sum() == 7**dims - 1
    filled = apply_postprocessing(labels, [{"labels": [1], "fill_holes": True}])
    assert (filled == 1).sum() == 7**dims + 2**dims
    for changed in (largest, filled):
        np.testing.assert_array_equal(changed == 2, labels == 2)
    whole = apply_postprocessing(labels, [{"labels": [1, 2], "largest": True}])
    assert set(np.unique(whole)) == {0, 1}
    np.testing.assert_array_equal(labels, before)


@pytest.mark.parametrize("dims", [2, 3])
def test_what_touches_by_a_corner_is_one_component(dims: int) -> None:
    labels = np.zeros((12,) * dims, np.uint8)
    labels[(slice(1, 5),) * dims] = labels[(slice(5, 8),) * dims] = 1
    touching = labels.copy()
    labels[(slice(9, 11),) * dims] = 1  # a voxel lies between
    largest = apply_postprocessing(labels, [{"labels": [1], "largest": True}])
    np.testing.assert_array_equal(largest, touching)
    sized = apply_postprocessing(labels, [{"labels": [1], "min_mm3": 4.0**dims + 1}])
    np.testing.assert_array_equal(sized, touching)


def test_the_smallest_size_is_in_cubic_millimetres() -> None:
    labels = scene()
    rule = [{"labels": [1], "min_mm3": 9.0}]
    assert (apply_postprocessing(labels, rule, (1, 1, 1))[16, 16, 16]) == 0
    np.testing.assert_array_equal(apply_postprocessing(labels, rule, (1, 1, 2)), labels)


def test_holes_are_filled_where_no_other_label_is() -> None:
    labels = np.ones((9, 9, 9), np.uint8)
    labels[3:6, 3:6, 3:6] = 0
    labels[4, 4, 4] = 2
    filled = apply_postprocessing(labels, [{"labels": [1], "fill_holes": True}])
    assert filled[4, 4, 4] == 2
    assert (filled == 1).sum() == 9**3 - 1


def test_what_helps_is_chosen_and_what_harms_is_not() -> None:
    """Class 1 has stray blocks in every prediction; class 2 truly comes in two pieces."""
    truth = np.zeros((24, 24, 24), np.uint8)
    truth[2:10, 2:10, 2:10] = 1
    truth[14:18, 2:6, 2:6] = truth[14:18, 14:18, 2:6] = 2
    guess = truth.copy()
    guess[20:23, 20:23, 20:23] = 1
    rules = choose_postprocessing([(guess, truth, (1.0, 1.0, 1.0))] * 3, {"organ": 1, "lesion": 2})
    assert rules
    np.testing.assert_array_equal(apply_postprocessing(guess, json.loads(json.dumps(rules))), truth)
    np.testing.assert_array_equal(apply_postprocessing(truth, rules), truth)
    assert choose_postprocessing([(truth, truth)], [1, 2]) == []
    assert choose_postprocessing([], [1, 2]) == []


def test_a_rule_from_a_file_is_checked() -> None:
    with pytest.raises(UserError, match="no key 'largst'. Did you mean 'largest'"):
        apply_postprocessing(scene(), [{"labels": [1], "largst": True}])
    for rule in ({"labels": "1"}, {"labels": [None]}, {"labels": [1], "min_mm3": "few"}, ["labels"]):
        with pytest.raises(UserError, match="Post-processing rule .* needs"):
            apply_postprocessing(scene(), [rule])  # type: ignore[list-item]


def test_labels_up_to_255_and_without_prediction_are_taken() -> None:
    """Masks are often 0 and 255, which fills a byte."""
    truth = np.zeros((24, 24), np.uint8)
    truth[4:16, 4:16] = 255
    guess = truth.copy()
    guess[20:22, 20:22] = 255
    assert choose_postprocessing([(guess, truth)] * 2, [255]) == [{"labels": [255], "largest": True}]
    assert choose_postprocessing([(np.zeros_like(truth), truth)] * 2, [255]) == []


def test_label_maps_on_the_disk_give_the_same_rules() -> None:
    truth = scene()
    guess = truth.copy()
    guess[18:20, 0:2, 0:2] = 1
    cases = [(guess, truth, (1.0, 1.0, 2.0)), (truth, truth, (1.0, 1.0, 1.0))]
    assert choose_postprocessing(cases, [1, 2], memory=0) == choose_postprocessing(cases, [1, 2])


@pytest.mark.parametrize("seed", range(4))
def test_rules_are_those_that_scores_of_whole_volumes_choose(seed: int) -> None:
    """Only the box of a label is looked at, which is found once and which no rule leaves."""
    random, pairs = np.random.default_rng(seed), []
    for _ in range(3):
        truth = np.zeros((24, 22, 20), np.int32)
        for value in (1, 2, 300):
            low = random.integers(0, 12, 3)
            truth[tuple(slice(start, start + 8) for start in low)] = value
        guess = np.where(random.random(truth.shape) < 0.02, random.choice([0, 1, 2, 300], truth.shape), truth)
        guess[random.integers(12, 20) :] = 0  # so that no box is the whole
        pairs.append((guess, truth, (1.0, 2.0, 0.5)))
    values, chosen = [1, 2, 300], choose_postprocessing(pairs, [1, 2, 300])
    before: list[Rule] = []
    for group in (values, *([value] for value in values)):
        score = partial(mean_dice, pairs, group)
        median = np.median([np.isin(truth, group).sum() * np.prod(spacing) for _, truth, spacing in pairs])
        sizes = [{"largest": True}, *({"min_mm3": share * median} for share in SHARES)]
        holes = [{"fill_holes": True}] if len(group) == 1 else []
        tried = [{"labels": group, **size, **hole} for size in ({}, *sizes) for hole in ({}, *holes)]
        best = max(score([*before, rule]) for rule in tried)
        if rule := next((rule for rule in chosen if rule["labels"] == group), None):
            assert score([*before, rule]) == best >= score(before) + LEAST_GAIN
            before.append(rule)
        else:
            assert best < score(before) + LEAST_GAIN
    assert chosen == before
    assert chosen


def mean_dice(pairs: list[Triple], group: list[int], rules: list[Rule]) -> float:
    """Of all cases after the rules, over the labels of a group."""
    done = [(apply_postprocessing(guess, rules, spacing), truth) for guess, truth, spacing in pairs]
    return float(np.mean([np.mean(dice_of_values(one, other, group)) for one, other in done]))
