"""The options of a training run: what can be set, what it means, what it is when nothing is said.

Hydra composes `configs/NAME.yaml`, its groups and `key=value` overrides; the classes here check the result.
Groups are chosen by `model=plain` or `training=sgd`, single keys are set by `training.max_minutes=45`,
`model.options.basis=legendre`. Unknown keys, models and bases are refused with the nearest known name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError

from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.files import an_object, parse_json

DEFAULT_EPOCHS = 100
PLANNED = ("ukanet", "classifier")  # models that plans name
# A resumed run may change these: how long, how closely watched, by how many processes; not what is learned.
CHANGEABLE = {f"training.{key}" for key in ("max_epochs", "max_minutes", "patience", "final_validation")}
CHANGEABLE |= {f"training.{key}" for key in ("device", "save_minutes", "compile", "gradient_checkpointing")}
CHANGEABLE |= {f"logging.{key}" for key in ("tensorboard", "wandb", "mlflow", "project")}
CHANGEABLE |= {"data.workers", *(f"inference.{key}" for key in ("overlap", "blending", "tta"))}

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A group of options; a key that is not declared is refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelConfig(Section):
    """Which network. Options here go over those of plan.json."""

    name: str | None = Field(default=None, description="network of kanseg.list_models(); null for the plan's")
    options: dict[str, Any] = Field(default={}, description="of the network: basis, features_per_stage, ...")


class AdaptConfig(Section):
    """Fine-tuning of changes beside frozen weights, see `kanseg.study.peft`."""

    rank: int = Field(default=0, ge=0, description="of the changes of all weights; 0 for none")
    functions: list[int] = Field(default=[], description="basis functions whose weights change, from 0")
    train: list[str] = Field(default=["*head*"], description="patterns of what is trained as it is")

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.rank or self.functions)


class PenaltyConfig(Section):
    """What is added to the loss, see `kanseg.training.regularization`."""

    l1: Share = Field(default=0.0, description="times the sum of |w| of the weights of KAN layers")
    activation_l1: Share = Field(default=0.0, description="times the mean |y| of what each KAN layer gives")
    activation_l2: Share = Field(default=0.0, description="times the mean of y^2")

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return self.l1 + self.activation_l1 + self.activation_l2 > 0


class TrainingConfig(Section):
    """How long, how fast, with what loss, from what weights, and how often the validation cases are looked at."""

    max_epochs: int | None = Field(
        default=None, gt=0, description="null with max_minutes for no end; else 100"
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="wall-clock budget, counted over resumes"
    )
    steps_per_epoch: int = Field(default=100, gt=0)
    patience: int | None = Field(
        default=None, gt=0, description="stop after so many validations without a better one; null: never"
    )
    batch_size: int | None = Field(
        default=None, gt=0, description="patches at once and process; null for the plan's"
    )
    accumulate: int = Field(default=1, gt=0, description="batches whose gradients make one step")
    foreground: float = Field(
        default=0.5, ge=0, le=1, description="share of patches centred on the foreground"
    )
    balanced: bool = Field(default=False, description="every class as often a patch's centre as any other")
    augmentation: Literal["none", "standard", "strong"] = Field(
        default="standard",
        description="how much patches are changed; strong, also in colour, for few cases or long trainings",
    )
    augment: Literal["auto", "loader", "device"] = Field(
        default="auto",
        description="patches are changed in the loader, or in batches on the device (auto: a GPU)",
    )
    optimizer: str = Field(
        default="adamw", description="adamw, sgd, lion or lbfgs, each with a rate of its own"
    )
    optimizer_options: dict[str, Any] = Field(
        default={}, description="of the optimizer: betas, momentum, ..."
    )
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=3e-5, ge=0)
    schedule: str = Field(
        default="poly", description="of the learning rate after the warm-up: poly, cosine or constant"
    )
    schedule_options: dict[str, Any] = Field(default={}, description="of the schedule: power of poly")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the training in which lr rises")
    gradient_clip: float = Field(default=12.0, gt=0, description="largest norm of the gradient")
    loss: str = "dice_ce"
    loss_options: dict[str, Any] = Field(default={}, description="of the loss: alpha, lambda_ce, weight, ...")
    penalty: PenaltyConfig = PenaltyConfig()
    deep_supervision: bool | None = Field(default=None, description="null for the plan's")
    ema_decay: float | None = Field(
        default=0.999, gt=0, lt=1, description="average of weights; null for none"
    )
    weights: str | None = Field(
        default=None, description="to start from: run, model, checkpoint, state_dict or MONAI bundle"
    )
    adapt: AdaptConfig = AdaptConfig()
    freeze: list[str] = Field(default=[], description="patterns of parameters that stay: ['encoder.*']")
    lr_scale: list[Annotated[str, StringConstraints(pattern=r"^[^=]+=[0-9.eE+-]+$")]] = Field(
        default=[], description="patterns of parameters and their share of lr: ['encoder.*=0.1']"
    )
    layer_decay: float | None = Field(default=None, gt=0, le=1, description="lr of a layer by the next one's")
    validate_every: int = Field(default=1, gt=0, description="epochs between two validations")
    validation_cases: int | None = Field(
        default=None,
        gt=0,
        description="watched while training goes on; null: as many as take no longer than it, 2 at least",
    )
    final_validation: bool = Field(
        default=True, description="all validation cases on their own grid at the end, their label maps kept"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**31, description="of weights and patches; null: data.seed, that of the split"
    )
    save_minutes: float = Field(default=10.0, gt=0, description="between two checkpoints within an epoch")
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        default="auto", description="bf16, fp16 only on CUDA"
    )
    compile: bool = Field(default=False, description="by torch.compile")
    cuda_graph: bool = Field(
        default=False,
        description="record the network's passes once and replay them: less time where patches are small; CUDA only",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute each stage again in the backward pass: less memory, more time"
    )

    @property
    def epochs(self) -> int | None:
        """Epochs to train; None where only the time counts."""
        return DEFAULT_EPOCHS if self.max_epochs is None and self.max_minutes is None else self.max_epochs


class ClassificationConfig(Section):
    """What is special in learning a class for each image."""

    loss: str = Field(default="ce", description="ce or focal; the loss of segmentation is training.loss")
    loss_options: dict[str, Any] = Field(default={}, description="of the loss: gamma, weight of the classes")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of a label for all classes")
    mixup: float = Field(default=0.0, ge=0, description="Beta(a, a) mixes two images; 0 for none")
    cutmix: float = Field(default=0.0, ge=0, description="Beta(a, a) is the area of a box of another image")
    changes: list[str] = Field(
        default=["shift"],
        description="random ones in turn: flip, flips, resized_crop, autoaugment_cifar10, ...",
    )


class DataConfig(Section):
    """Split, randomness and loading."""

    folds: int = Field(default=5, ge=2)
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of splits and intervals; without training.seed of all"
    )
    workers: int = Field(default=1, ge=0, description="processes that prepare patches")


class InferenceConfig(Section):
    """Sliding window over whole images."""

    overlap: float = Field(default=0.5, ge=0, lt=1, description="share of a window")
    blending: Literal["gaussian", "constant"] = Field(default="gaussian", description="weights in a window")
    tta: bool = Field(default=False, description="average over the plan's mirror axes")


class LoggingConfig(Section):
    """log.jsonl is always written; these come on top."""

    tensorboard: bool = False
    wandb: bool = Field(default=False, description="offline with WANDB_MODE=offline")
    mlflow: bool = Field(
        default=False, description="to MLFLOW_TRACKING_URI, else mlflow.db in the run folder"
    )
    project: str = "kanseg"


class Config(Section):
    """All options of a run."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    classification: ClassificationConfig = ClassificationConfig()
    data: DataConfig = DataConfig()
    inference: InferenceConfig = InferenceConfig()
    logging: LoggingConfig = LoggingConfig()
    _named: tuple[str, ...] = PrivateAttr(())  # keys that overrides name, also with the value of the default

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    @property
    def seed(self) -> int:
        """What a training draws by: several seeds on one split differ in `training.seed` alone."""
        return self.data.seed if self.training.seed is None else self.training.seed


def with_options(config: Config, section: str, *, named: bool = False, **options: Any) -> Config:
    """The config with other options in one of its sections, checked anew.

    Args:
        named: they count as named by the user: a training that is resumed takes them in place of its own.
    """
    values = config.model_dump()
    values[section] |= options
    made = make_config(values)
    made._named = (*config._named, *(f"{section}.{name}" for name in options if named))
    return made


def load_config(name: str = "default", overrides: Sequence[str] = ()) -> Config:
    """Compose `configs/NAME.yaml` with `key=value` overrides and check every key and name in it.

    Raises:
        UsageError: unknown config, key, model, basis, loss or optimizer (the nearest is named); a bad value.
    """
    folder = config_folder()
    runs = [path.stem for path in folder.glob("*.yaml")]
    if name not in runs:
        raise UsageError(f"Unknown config '{name}'.{did_you_mean(name, runs)}")
    overrides = [_as_hydra_override(override, folder) for override in _with_rates(overrides, folder)]
    config = make_config(_composed(name, overrides))
    config._named = tuple(override.partition("=")[0].lstrip("+~") for override in overrides)
    return config


def default_config() -> Config:
    """What holds where nothing is said. Its names are known, so no network is imported to look them up."""
    return _with_values(_composed("default", []))


def _composed(name: str, overrides: list[str]) -> dict[str, Any]:
    """The values of `configs/NAME.yaml` and of overrides as Hydra takes them."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return cast("dict[str, Any]", OmegaConf.to_container(compose(name, overrides), resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"The options {overrides} cannot be read: {str(error).splitlines()[0]}") from error


def _with_rates(overrides: Sequence[str], folder: Path) -> list[str]:
    """With the group of an optimizer that is named by `training.optimizer=`: each wants a learning rate of its own."""
    named = [
        override.partition("=")[2] for override in overrides if override.startswith("training.optimizer=")
    ]
    chosen = any(override.startswith("training=") for override in overrides)
    group = (
        named[-1:] if named and not chosen and (folder / "training" / f"{named[-1]}.yaml").is_file() else []
    )
    return [*(f"training={name}" for name in group), *overrides]


def make_config(values: Mapping[str, Any]) -> Config:
    """A checked `Config` from nested dictionaries; raises `UsageError` as `load_config` does."""
    config = _with_values(values)
    check_names(config)
    recorded = config.training.compile or config.training.cuda_graph
    if recorded and (config.training.penalty.activation_l1 or config.training.penalty.activation_l2):
        raise UsageError(
            "Penalties of activations need training.compile=false and training.cuda_graph=false."
        )
    return config


def _with_values(values: Mapping[str, Any]) -> Config:
    """A `Config` whose keys and kinds of values are checked, and its names not yet."""
    _check_keys(values, Config)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"Option {key}={first['input']!r} does not fit: {first['msg']}.") from error


def check_names(config: Config) -> None:
    """Raise `UsageError` for an unknown model, model option, encoder, basis, loss or optimizer."""
    from kanseg.data.class_loader import CHANGES
    from kanseg.encoders import check_encoder_name
    from kanseg.layers.families import family_name
    from kanseg.models import table_of
    from kanseg.training.classification import class_loss
    from kanseg.training.losses import create_loss
    from kanseg.training.optimizers import OPTIMIZERS, lr_factor

    create_loss(config.training.loss, **config.training.loss_options)
    class_loss(config)
    for change in config.classification.changes:
        CHANGES.get(change)
    OPTIMIZERS.get(config.training.optimizer)
    lr_factor(1.0, 0.0, config.training.schedule, **config.training.schedule_options)
    check_encoder = check_encoder_name
    if config.model.name is not None:
        model = table_of(config.model.name).get(config.model.name)
        check_encoder = getattr(model, "check_encoder", check_encoder_name)
    names = PLANNED if config.model.name is None else (config.model.name,)
    known = list(dict.fromkeys(option for name in names for option in model_options(name)))
    for option in config.model.options:
        if option not in known:
            raise UsageError(f"Unknown config key 'model.options.{option}'.{did_you_mean(option, known)}")
    basis = config.model.options.get("basis")
    for one in basis if isinstance(basis, list) else [basis]:
        family_name(one)
    check_encoder(config.model.options.get("encoder"))


def model_options(name: str) -> list[str]:
    """Names of the options that the constructor of a model takes beside its channels."""
    from kanseg.models import table_of

    given = ("self", "spatial_dims", "in_channels", "out_channels", "kwargs")
    return [
        option for option in inspect.signature(table_of(name).get(name)).parameters if option not in given
    ]


def config_folder() -> Path:
    """Where the YAML files are: in `kanseg.configs` when installed, in `configs` beside it in a checkout."""
    spec = find_spec("kanseg.configs")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent.resolve()
    folder = Path(__file__).resolve().parents[1] / "configs"
    if not (folder / "default.yaml").is_file():
        raise UserError(f"The configs of kanseg are missing (looked for {folder}). Install kanseg again.")
    return folder


def read_config(path: Path) -> Config:
    """The config of an earlier run."""
    values = parse_json(path, "a config", "Start a new run folder.", an_object)
    try:
        return make_config(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def resumed_config(path: Path, given: Config, override: bool = False) -> Config:
    """The config in `path` that a resumed run goes on with; only `CHANGEABLE` keys may be set anew.

    Args:
        override: take every option given now (named, or not at its default) instead of the stored one.

    Raises:
        UsageError: without `override`, where other options differ from the stored ones; all are named.
    """
    stored = read_config(path)
    changed = changed_options(stored, given)
    fixed = [key for key in changed if key not in CHANGEABLE]
    if fixed and not override:
        new = flat(given)
        shown = ", ".join(changes(flat(stored), {key: new[key] for key in fixed}).values())
        raise UsageError(
            f"A resumed run keeps its options: {path} has {shown}. "
            "Leave it out, say --override to go on with the new, or start a new run folder."
        )
    if adapted := [key for key in changed if key.startswith("training.adapt.")]:
        raise UsageError(
            f"{', '.join(adapted)} cannot change in a training that has begun. Start a new run from its weights "
            "(training.weights)."
        )
    values = stored.model_dump()
    for key in changed:
        *sections, name = key.split(".")
        reduce(lambda inner, section: inner[section], sections, values)[name] = flat(given)[key]
    return make_config(values)


def changes(before: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, str]:
    """The options that were others before, in words by their names.

    >>> changes({"minutes": 5, "size": "small"}, {"minutes": 10, "size": "small"})
    {'minutes': 'minutes=5, not 10'}
    """
    return {
        key: f"{key}={before.get(key)!r}, not {value!r}"
        for key, value in asked.items()
        if before.get(key) != value
    }


def changed_options(stored: Config, given: Config) -> list[str]:
    """Keys of the options that are given (named, or not at their default) and differ from the stored ones."""
    old, new, default = flat(stored), flat(given), flat(default_config())
    named = {key for key in new if any(f"{word}.".startswith(f"{key}.") for word in given._named)}
    return [key for key in new if new[key] != old[key] and (key in named or new[key] != default[key])]


def unlike(stored: Config, given: Config) -> list[str]:
    """Keys whose values differ, but those that any training may change."""
    old, new = flat(stored), flat(given)
    return [key for key in new if new[key] != old[key] and key not in CHANGEABLE]


def meanings(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """ "section.key" -> what it means and which values it takes, where they are few.

    >>> meanings()["training.balanced"]
    "every class as often a patch's centre as any other"
    """
    found: dict[str, str] = {}
    groups = _groups(section)
    for name, field in section.model_fields.items():
        if name in groups:
            found |= meanings(groups[name], f"{prefix}{name}.")
            continue
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        words = [field.description or "", ", ".join(choices)]
        found[f"{prefix}{name}"] = ": ".join(filter(None, words))
    return found


def flat(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """ "section.key" -> value."""
    found: dict[str, Any] = {}
    for name, value in section:
        key = f"{prefix}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, BaseModel) else {key: value}
    return found


def _as_hydra_override(override: str, folder: Path) -> str:
    """Let any key be set without Hydra's `+`; `Config` checks whether it exists, in better words."""
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"Option '{override}' is not of the form key=value, e.g. training.max_minutes=45")
    if key[0] in "+~":
        return override
    if (folder / key).is_dir():
        choices = [path.stem for path in (folder / key).glob("*.yaml")]
        value = override[len(key) + 1 :]
        if value not in choices:
            networks = " A network is chosen by model.name=NAME." if key == "model" else ""
            raise UsageError(f"Unknown {key} config '{value}'.{did_you_mean(value, choices)}{networks}")
        return override
    return f"++{key}={_quoted(key, override[len(key) + 1 :])}"


def _quoted(key: str, value: str) -> str:
    """A value in quotes where Hydra cannot read it without: of a list [encoder.*=0.1], of a path Müller (2)/model."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"value={value}")
    except HydraException:
        listed = value[:1] == "[" and value[-1:] == "]"
        if value[:1] in "[{" and not listed:
            raise UsageError(
                f"Option '{key}={value}' cannot be read: is a bracket or a sign missing?"
            ) from None
        parts = [part.strip(" '\"") for part in value[1:-1].split(",")] if listed else [value]
        quoted = ",".join('"{}"'.format(part.replace('"', '\\"')) for part in parts)
        return f"[{quoted}]" if listed else quoted
    return value


def _groups(section: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Groups of options by name."""
    kinds = ((name, field.annotation) for name, field in section.model_fields.items())
    return {name: kind for name, kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _check_keys(values: Mapping[str, Any], section: type[BaseModel], prefix: str = "") -> None:
    fields, groups = section.model_fields, _groups(section)
    for key, value in values.items():
        if key not in fields:
            inside = [
                f"{prefix}{group}.{key}" for group, inner in groups.items() if key in inner.model_fields
            ]
            hint = f" Did you mean '{inside[0]}'?" if inside else ""
            raise UsageError(f"Unknown config key '{prefix}{key}'.{hint or did_you_mean(key, fields)}")
        if key in groups:
            inner = groups[key]
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"Config key '{prefix}{key}' is a group; set one of: {', '.join(inner.model_fields)}"
                )
            _check_keys(value, inner, f"{prefix}{key}.")
