"""kanseg.config: what composes, what is refused, and with which words."""

from __future__ import annotations

import json

import pytest

from kanseg.config import (
    DEFAULT_EPOCHS,
    config_folder,
    load_config,
    make_config,
    read_config,
    resumed_config,
)
from kanseg.errors import UsageError, UserError
from kanseg.files import write_json
from kanseg.training.losses import LOSSES
from kanseg.training.optimizers import OPTIMIZERS


@pytest.mark.parametrize("name", [path.stem for path in config_folder().glob("*.yaml")])
def test_every_config_in_the_package_is_valid(name):
    load_config(name)


@pytest.mark.parametrize(
    "choice", [f"{path.parent.name}={path.stem}" for path in config_folder().glob("*/*.yaml")]
)
def test_every_choice_of_a_group_is_valid(choice):
    load_config(overrides=[choice])


@pytest.mark.parametrize(
    "path", ["/data/Müller/run", "/data/run (2)", "/data/lr=0.1/run", r"C:\runs\mine", "/data/my run"]
)
def test_paths_need_no_quotes_of_hydra(path: str) -> None:
    assert load_config(overrides=[f"training.weights={path}"]).training.weights == path


@pytest.mark.parametrize("value", ["[encoder.*=0.1,heads.*=2]", "['encoder.*=0.1','heads.*=2']"])
def test_rates_of_layers_are_read_with_and_without_quotes(value: str) -> None:
    """A shell takes quotes away that are not quoted themselves."""
    rates = load_config(overrides=[f"training.lr_scale={value}"]).training.lr_scale
    assert rates == ["encoder.*=0.1", "heads.*=2"]


def test_a_value_with_half_a_bracket_is_named_alone() -> None:
    with pytest.raises(UsageError, match=r"'training\.freeze=\[encoder' cannot be read: is a bracket"):
        load_config(overrides=["training.steps_per_epoch=3", "training.freeze=[encoder"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lbfgs"])
def test_an_optimizer_brings_its_own_learning_rate(name: str) -> None:
    given, group = (
        load_config(overrides=[f"{key}={name}"]).training for key in ("training.optimizer", "training")
    )
    assert (given.lr, given.weight_decay) == (group.lr, group.weight_decay)
    assert load_config(overrides=[f"training.optimizer={name}", "training.lr=0.5"]).training.lr == 0.5


def test_overrides_reach_their_keys_in_order():
    config = load_config(
        overrides=[
            "training=sgd",
            "training.max_minutes=1.5",
            "model.options.basis=legendre",
            "model.options.features_per_stage=[4,8]",
            "training.ema_decay=null",
        ]
    )
    assert (config.training.optimizer, config.training.lr) == ("sgd", 0.01)
    assert config.training.max_minutes == 1.5
    assert config.training.ema_decay is None
    assert config.model.options == {"basis": "legendre", "features_per_stage": [4, 8]}


def test_epochs_end_a_training_that_has_no_other_budget():
    assert load_config().training.epochs == DEFAULT_EPOCHS
    assert load_config(overrides=["training.max_minutes=1"]).training.epochs is None


def test_the_plain_twin_is_one_word():
    assert load_config(overrides=["model=plain"]).model.options == {"basis": None}


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("training.max_epoch=3", "max_epochs"),
        ("trainning.lr=3", "training"),
        ("model.name=ukante", "ukanet"),
        ("model.options.basis=legendr", "legendre"),
        ("model.options.bassis=gram", "basis"),
        ("model.options.encoder=reskanet81", "reskanet18"),
        ("model=plian", "plain"),
        ("training.loss=dice_cee", "dice_ce"),
        ("training.optimizer=adamv", "adamw"),
        ("training.lr=fast", "training.lr"),
        ("training.lr=-1", "training.lr"),
        ("training.lr", "key=value"),
        ("training=3", "adamw"),
        ("data.seed.x=3", "data"),
        ("model.options.layer_options=[", "options"),
    ],
)
def test_a_wrong_override_is_refused_with_the_nearest_name(override, names):
    with pytest.raises(UsageError, match=names):
        load_config(overrides=[override])


def test_an_unknown_config_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="'default'"):
        load_config("defualt")


def test_a_config_survives_its_file(tmp_path):
    config = load_config(overrides=["model.options.kan_stages=[1,2]", "data.workers=0"])
    assert read_config(write_json(tmp_path / "config.json", config.model_dump())) == config


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"trainin": {}})])
def test_a_broken_config_file_is_one_clear_message(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match="config"):
        read_config(path)


def test_a_resumed_run_keeps_its_options_but_may_get_more_time(tmp_path):
    stored = load_config(overrides=["training.max_minutes=1", "training.lr=0.01"])
    path = write_json(tmp_path / "config.json", stored.model_dump())
    assert resumed_config(path, load_config()) == stored
    assert resumed_config(path, stored) == stored
    assert resumed_config(path, load_config(overrides=["training.max_epochs=100"])).training.epochs == 100
    longer = resumed_config(path, load_config(overrides=["training.max_minutes=2"]))
    assert (longer.training.max_minutes, longer.training.lr) == (2, 0.01)
    with pytest.raises(UsageError, match=r"training\.lr"):
        resumed_config(path, load_config(overrides=["training.lr=0.1"]))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("training.lr=0.01", "training.lr=0.001"),
        ("training.ema_decay=null", "training.ema_decay=0.999"),
        ("model.options.basis=legendre", "model.options={}"),
    ],
)
def test_an_option_that_is_named_counts_also_with_the_value_of_the_default(tmp_path, before, after):
    path = write_json(tmp_path / "config.json", load_config(overrides=[before]).model_dump())
    given = load_config(overrides=[after])
    with pytest.raises(UsageError, match="--override"):
        resumed_config(path, given)
    assert resumed_config(path, given, override=True) == given


def test_what_may_change_can_be_switched_off_again(tmp_path):
    stored = load_config(overrides=["training.patience=3", "logging.tensorboard=true"])
    path = write_json(tmp_path / "config.json", stored.model_dump())
    given = load_config(overrides=["training.patience=null", "logging.tensorboard=false"])
    assert resumed_config(path, given) == load_config()


@pytest.mark.parametrize("registry", [LOSSES, OPTIMIZERS])
def test_every_registered_name_can_be_chosen(registry):
    for name in registry:
        assert make_config({"training": {registry.kind: name}})


def test_encoders_of_smp_are_checked_by_its_own_names():
    smp = ["model.name=smp", "model.options.network=Unet"]
    assert (
        load_config("default", [*smp, "model.options.encoder=resnet34"]).model.options["encoder"]
        == "resnet34"
    )
    with pytest.raises(UsageError, match="smp has no encoder 'resnet35'. Did you mean 'resnet"):
        load_config("default", [*smp, "model.options.encoder=resnet35"])
