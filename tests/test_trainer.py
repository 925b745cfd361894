"""The loop's options: each does what its name says, and none of them breaks going on from a checkpoint."""

from __future__ import annotations

import io
import math

import pytest
import torch
from conftest import SHORT
from rich.console import Console
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from kanseg.config import load_config
from kanseg.errors import UsageError
from kanseg.training.checkpoint import load_checkpoint, load_model, part
from kanseg.training.devices import checkpoint_stages
from kanseg.training.fit import Trainer, fit
from kanseg.training.losses import LOSSES, create_loss
from kanseg.training.monitor import read_log
from kanseg.training.optimizers import OPTIMIZERS, SCHEDULES, lr_factor
from kanseg.training.parameters import parameter_groups
from kanseg.training.trainer import OPTIMIZED


def weights(run, fold=0):
    return part(load_checkpoint(run / f"fold_{fold}" / "last.safetensors")[0], "model")


def same(one, other, **tolerance):
    close = torch.allclose if tolerance else torch.equal
    return one.keys() == other.keys() and all(close(one[k], other[k], **tolerance) for k in one)


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_is_least_for_the_right_answer_and_has_a_finite_gradient(name):
    label = torch.zeros(2, 1, 8, 8, 8)
    label[:, :, 2:6, 2:6, 2:6] = 1
    label[:, :, 3:5, 3:5, 3:5] = 2
    right = 5 * nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float()
    loss = create_loss(name)
    wrong = right.flip(1).requires_grad_()
    loss(wrong, label).backward()
    assert torch.isfinite(wrong.grad).all()
    assert loss(right, label) < min(loss(right.roll(2, dims=2), label), loss(wrong, label))


def test_options_of_a_loss_reach_it_and_unknown_ones_are_refused():
    label, logits = torch.zeros(1, 1, 4, 4), torch.randn(1, 3, 4, 4)
    label[..., :2] = 1
    one, other = (create_loss("tversky", alpha=a, beta=1 - a)(logits, label) for a in (0.2, 0.8))
    assert one != other
    weighed = create_loss("ce", weight=[0.0, 1.0, 1.0])(logits, label)
    expected = nn.functional.cross_entropy(logits, label[:, 0].long(), torch.tensor([0.0, 1.0, 1.0]))
    assert weighed == pytest.approx(expected)
    heavy = create_loss("dice_boundary", weights=[0.0, 2.0])(logits, label)
    assert heavy == pytest.approx(2 * create_loss("dice_boundary", weights=[0.0, 1.0])(logits, label))
    with pytest.raises(UsageError, match="Did you mean 'alpha'"):
        load_config(overrides=["training.loss=tversky", "training.loss_options.alhpa=0.3"])


@pytest.mark.parametrize(
    "named",
    [[f"training={name}"] for name in OPTIMIZERS.names()]
    + [["training=adamw", "training.optimizer_options={fused: true}"]],
)
def test_every_optimizer_learns_and_goes_on_to_the_bit(fit_balls, tmp_path, monkeypatch, named):
    options = [*named, "training.max_epochs=2", "training.gradient_clip=1000"]
    fit_balls(*options)
    step = Trainer._train_step

    def interrupted(self, batches):
        if self.state.updates == 5 and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            self.stop.signal = 15
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    other = tmp_path / "other"
    with pytest.raises(SystemExit):
        fit_balls(*options, run=other)
    fit_balls(*options, run=other, resume=True)
    assert same(weights(tmp_path / "run"), weights(other))
    losses = [record["loss"] for record in read_log(tmp_path / "run/fold_0/log.jsonl")]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_rises_to_the_full_rate_and_never_above(name):
    factors = [lr_factor(step / 1000, warmup=0.1, schedule=name) for step in range(1001)]
    assert max(factors) <= 1
    assert factors[2:100] == sorted(factors[2:100])
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert lr_factor(0.5, 0, "cosine") == pytest.approx(0.5)


def test_the_gradient_of_a_step_is_no_longer_than_the_clip(fit_balls):
    lengths = []

    def measure(optimizer, *_):
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        lengths.append(float(torch.nn.utils.get_total_norm(gradients)))

    watching = register_optimizer_step_post_hook(measure)
    try:
        fit_balls("training.max_epochs=1", "training.gradient_clip=0.001")
    finally:
        watching.remove()
    assert lengths == pytest.approx([0.001] * 4, rel=1e-2)  # every step would have been longer


def test_accumulated_batches_make_the_step_of_the_large_batch(fit_balls, tmp_path):
    options = ["training.max_epochs=1", "training.loss_options.batch=false", "training.optimizer=sgd"]
    fit_balls(*options, "training.batch_size=4")
    fit_balls(*options, "training.batch_size=1", "training.accumulate=4", run=tmp_path / "small")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "small"), rtol=1e-3, atol=1e-5)


def test_patience_ends_a_training_that_gets_no_better(fit_balls, tmp_path):
    summary = fit_balls("training.max_epochs=50", "training.patience=2", "training.lr=1e-12")
    assert summary["epochs"] < 10
    assert summary["epochs"] - 1 - summary["best_epoch"] == 2
    assert fit_balls("training.max_epochs=50", resume=True)["epochs"] == summary["epochs"]


def test_an_early_end_is_told_and_a_full_training_tells_none(balls, tmp_path):
    dataset, plan = balls
    for epochs, early in ((50, True), (1, False)):
        told = io.StringIO()
        options = [f"training.max_epochs={epochs}", "training.patience=2", "training.lr=1e-12"]
        config = load_config(overrides=[*SHORT, *options])
        fit(config, plan, dataset, tmp_path / f"run{epochs}", console=Console(file=told))
        assert ("Ended early: 2 validations" in told.getvalue()) == early


def test_checkpointed_stages_give_the_same_gradients_and_keep_less(balls):
    _, plan = balls
    from kanseg.training.checkpoint import build_model, model_spec

    def gradients(checkpointed):
        torch.manual_seed(0)
        model = build_model(model_spec(load_config(), plan)).train()
        if checkpointed:
            checkpoint_stages(model)
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = sum(out.square().mean() for out in model(torch.ones(2, 1, 8, 8, 8)))
            held = kept
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, held

    (plain, all_kept), (recomputed, few_kept) = gradients(False), gradients(True)
    assert same(plain, recomputed)
    assert few_kept < 0.5 * all_kept


def test_a_training_with_checkpointed_stages_takes_the_same_steps(fit_balls, tmp_path):
    fit_balls("training.max_epochs=1")
    fit_balls("training.max_epochs=1", "training.gradient_checkpointing=true", run=tmp_path / "lean")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "lean"))


@pytest.mark.slow
def test_a_compiled_training_takes_nearly_the_same_steps(fit_balls, tmp_path):
    fit_balls("training.max_epochs=1")
    fit_balls("training.max_epochs=1", "training.compile=true", run=tmp_path / "compiled")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "compiled"), rtol=1e-2, atol=1e-3)


def test_frozen_parameters_stay_and_the_others_learn(fit_balls, tmp_path):
    fit_balls("training.max_epochs=1")
    fit_balls("training.max_epochs=2", "training.freeze=['encoder.*']", run=tmp_path / "part")
    first = part(load_checkpoint(tmp_path / "run/fold_0/last.safetensors")[0], "model")
    with pytest.raises(UsageError, match="leaves no parameter"):
        fit_balls("training.freeze=['*']", run=tmp_path / "none")
    with pytest.raises(UsageError, match="leaves no parameter"):
        fit_balls("training.freeze=['encoder.*']", "training.lr_scale=['*=0']", run=tmp_path / "none")
    for wrong in ("encoder.*=-1", "encoder.*=1e-"):
        with pytest.raises(UsageError, match="needs a share of 0 or more"):
            fit_balls(f"training.lr_scale=['{wrong}']", run=tmp_path / "none")
    with pytest.raises(UsageError, match=r"'encodr\.\*'.*Did you mean"):
        fit_balls("training.lr_scale=['encodr.*=0.1']", run=tmp_path / "none")
    with pytest.raises(UsageError, match=r"'encodr\.\*'.*Did you mean"):
        fit_balls("training.freeze=['encodr.*']", run=tmp_path / "none")
    with pytest.raises(UsageError, match=r"say 'encoder\.\*'"):
        fit_balls("training.freeze=['encoder']", run=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    from kanseg.training.checkpoint import build_model

    torch.manual_seed(0)
    _, _, info = load_model(tmp_path / "part")
    frozen = weights(tmp_path / "part")
    from accelerate.utils import set_seed

    set_seed(0)
    fresh = build_model(info["model"]).state_dict()
    for name, value in frozen.items():
        assert torch.equal(value, fresh[name]) == name.startswith("encoder."), name
    assert not same(first, frozen)


def test_layers_learn_at_their_share_of_the_rate():
    model = nn.ModuleDict(
        {"encoder": nn.ModuleList(nn.Linear(1, 1) for _ in range(3)), "head": nn.Linear(1, 1)}
    )
    shares = {
        name: group["lr_scale"]
        for group in parameter_groups(model, {"head.bias": 0.0}, decay=0.5)
        for name, parameter in model.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    by_layer = [shares[f"encoder.{i}.weight"] for i in range(3)] + [shares["head.weight"]]
    assert by_layer == [0.125, 0.25, 0.5, 1.0]
    assert shares["head.bias"] == 0


def test_a_rate_of_nothing_changes_nothing(fit_balls, tmp_path):
    options = ["training.max_epochs=1", "training.weight_decay=0"]
    fit_balls(*options, "training.lr_scale=['heads.*=0']")
    fit_balls(*options, "training.freeze=['heads.*']", run=tmp_path / "frozen")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "frozen"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("option", ["precision=bf16", "precision=fp16", "cuda_graph=true"])
def test_what_needs_a_gpu_is_refused_without_one(fit_balls, option):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=f"training.{option}"):
        fit_balls(f"training.{option}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_recorded_passes_take_nearly_the_same_steps(fit_balls, precision, tmp_path):
    options = ["training.max_epochs=1", f"training.precision={precision}"]
    fit_balls(*options)
    fit_balls(*options, "training.cuda_graph=true", run=tmp_path / "recorded")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "recorded"), rtol=1e-2, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_passes_are_not_recorded_where_that_would_be_wrong(fit_balls):
    with pytest.raises(UsageError, match="accumulate=1"):
        fit_balls("training.cuda_graph=true", "training.accumulate=2")


def test_override_goes_on_with_other_options_and_without_it_they_are_named(fit_balls, tmp_path):
    fit_balls("training.max_epochs=1")
    changes = ["training.max_epochs=2", "training.lr=0.005", "training.optimizer=sgd"]
    with pytest.raises(UsageError, match=r"optimizer='adamw', not 'sgd'.*lr=0\.001, not 0\.005.*--override"):
        fit_balls(*changes, resume=True)
    assert fit_balls(*changes, resume=True, override=True)["epochs"] == 2
    assert "optimizer" in OPTIMIZED
    info = load_checkpoint(tmp_path / "run/fold_0/last.safetensors")[1]
    assert info["config"]["training"]["optimizer"] == "sgd"
    assert math.isclose(info["optimizer"]["param_groups"][0]["momentum"], 0.99)


def test_waiting_for_data_is_told(fit_balls, tmp_path):
    summary = fit_balls("training.max_epochs=2")
    records = read_log(tmp_path / "run/fold_0/log.jsonl")
    assert 0 < summary["data_wait"] < 1
    assert all(0 < record["data_wait"] < 1 for record in records)
