"""Recipes: validated YAML files that say model, task, data, training and quantization.

    recipe = load_recipe("light-sr-x2", {"train.iterations": 500})

The sections `task` and `train` take the fields of the task's class and of `TrainOptions`, `quant`
those of `get_qmir_qconfig` and `prepare_qat`: what these check is not repeated here.
"""

import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch.ao.quantization import QConfig

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models import list_models
from qmir_ao.recipes.tasks import TASKS, Task, create_task
from qmir_ao.recipes.train import TrainOptions
from qmir_ao.recipes.yaml_source import MAX_BYTES, Keys, YamlSource, parse_yaml

T = TypeVar("T")

CONFIGS = Path(__file__).resolve().parent / "configs"
WEIGHTS = ("fresh", "pretrained")
"""What `model.weights` may be besides a file."""
SECTIONS = ("model", "task", "data", "train", "quant")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """Network: a name of the zoo, and "pretrained", "fresh" or a file with weights to start from.

    Without weights a float training starts afresh; a quantization needs them.
    """

    name: str
    weights: str | None = None


class DataSection(_Section):
    """Folders: ground truth to train on and to evaluate on, and inputs where they are given.

    With inputs there is one folder of them for each folder of ground truth.
    """

    train: list[Path] = []
    train_inputs: list[Path] | None = None
    eval: list[Path] = []
    eval_inputs: list[Path] | None = None


@functools.cache
def _train_section() -> type[BaseModel]:
    return _from_dataclass("TrainSection", TrainOptions)


@functools.cache
def _task_section(name: str) -> type[BaseModel]:
    return _from_dataclass("TaskSection", TASKS[name], name=(Literal[name], ...))


@functools.cache
def _quant_section() -> type[BaseModel]:
    """Parameters of `get_qmir_qconfig`, and the placement of `prepare_qat`."""
    from qmir_ao.quant.qconfig import get_qmir_qconfig

    hints = get_type_hints(get_qmir_qconfig)
    known: dict[str, Any] = {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(get_qmir_qconfig).parameters.items()
    }
    made: type[BaseModel] = create_model(
        "QuantSection", __base__=_Section, **known, placement=(str, "paper")
    )
    return made


def _from_dataclass(title: str, source: type[Any], **extra: Any) -> type[BaseModel]:
    hints = get_type_hints(source)
    known: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(source)}
    made: type[BaseModel] = create_model(title, __base__=_Section, **known, **extra)
    return made


@dataclass(frozen=True)
class Quantization:
    """Section `quant`, ready to use: the QConfig, where quantizers go, and the settings."""

    qconfig: QConfig
    placement: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        name: file name without suffix.
        model: section `model`.
        task: the restoration task.
        data: section `data`.
        train: settings of the training.
        quant: None for a float training.
    """

    name: str
    model: ModelSection
    task: Task
    data: DataSection
    train: TrainOptions
    quant: Quantization | None

    def to_dict(self) -> dict[str, Any]:
        """All settings, defaults included, as plain data that `parse_recipe` takes again."""
        options = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self.train).items()
        }
        return {
            "model": self.model.model_dump(mode="json"),
            "task": {"name": self.task.name, **dataclasses.asdict(self.task)},  # type: ignore[call-overload]
            "data": self.data.model_dump(mode="json"),
            "train": options,
            "quant": None if self.quant is None else dict(self.quant.settings),
        }

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        import yaml

        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text


def list_recipes() -> list[str]:
    """Names of the recipes that come with this package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """File of a recipe.

    Args:
        name: one of `list_recipes()`, or path of a YAML file.

    Raises:
        ConfigError: neither.
    """
    if str(name) in list_recipes():
        return CONFIGS / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"{path}: no such recipe; give a file, or one of {_names()}")
    raise ConfigError(
        f"recipe {str(name)!r} is unknown; {_did_you_mean(str(name), list_recipes())}give a .yaml "
        f"file, or one of {_names()}"
    )


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        name: one of `list_recipes()`, or path of a YAML file.
        overrides: values by dotted key, such as `{"train.iterations": 500}`.

    Raises:
        ConfigError: unknown recipe or key (with a suggestion and the line), wrong type, or a value
            out of its range.
    """
    path = recipe_path(name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: too large for a recipe; at most {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return parse_recipe(text, str(path), path.stem, overrides)


def parse_recipe(
    text: str, where: str, name: str = "recipe", overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Validate the text of a recipe; see `load_recipe`."""
    source = _overridden(parse_yaml(text, where), overrides or {})
    for key in source.data:
        if key not in SECTIONS:
            raise _unknown(source, (str(key),), SECTIONS)
    model = _validated(source, "model", ModelSection)
    assert isinstance(model, ModelSection)
    if model.name not in list_models():
        hint = _did_you_mean(model.name, list_models())
        raise ConfigError(
            f"{source.place(('model', 'name'))}: model.name {model.name!r} is unknown; {hint}"
            f"known: {', '.join(list_models())}"
        )
    data = _validated(source, "data", DataSection, optional=True)
    assert isinstance(data, DataSection)
    return Recipe(name, model, _task(source), data, _train(source), _quant(source))


def _task(source: YamlSource) -> Task:
    raw = source.data.get("task")
    name = raw.get("name") if isinstance(raw, dict) else None
    if not isinstance(name, str) or name not in TASKS:
        hint = _did_you_mean(str(name), list(TASKS))
        raise ConfigError(
            f"{source.place(('task', 'name'))}: task.name must be one of {', '.join(TASKS)}, "
            f"got {name!r}; {hint}"
        )
    values = _validated(source, "task", _task_section(name)).model_dump()
    return _checked(source, "task", lambda: create_task(**values))


def _train(source: YamlSource) -> TrainOptions:
    values = _validated(source, "train", _train_section(), optional=True).model_dump()
    return _checked(source, "train", lambda: TrainOptions(**values))


def _quant(source: YamlSource) -> Quantization | None:
    if source.data.get("quant") is None:
        return None
    from qmir_ao.quant.placement import check_placement
    from qmir_ao.quant.qconfig import get_qmir_qconfig

    settings = _validated(source, "quant", _quant_section()).model_dump()
    placement = settings["placement"]
    _checked(source, "quant", lambda: check_placement(placement))
    names = {key: value for key, value in settings.items() if key != "placement"}
    qconfig = _checked(source, "quant", lambda: get_qmir_qconfig(**names))
    return Quantization(qconfig, placement, settings)


def _checked(source: YamlSource, section: str, build: Callable[[], T]) -> T:
    """Run a check of another module and say which section it is about."""
    try:
        return build()
    except ConfigError as error:
        raise ConfigError(f"{source.place((section,))}: section {section}: {error}") from error


def _validated(
    source: YamlSource, section: str, model: type[BaseModel], optional: bool = False
) -> BaseModel:
    raw = source.data.get(section)
    if raw is None and (optional or section in source.data):
        raw = {}
    if raw is None:
        raise ConfigError(f"{source.where}: section {section!r} is missing")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{source.place((section,))}: section {section} must be a mapping, got {raw!r}"
        )
    try:
        # JSON, because strict validation takes lists and paths from it as they are written.
        return model.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise _explained(source, section, model, error) from error


def _explained(
    source: YamlSource, section: str, model: type[BaseModel], error: ValidationError
) -> ConfigError:
    first = error.errors(include_url=False)[0]
    keys: Keys = (section, *first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(source, keys, list(model.model_fields))
    if first["type"] == "missing":
        return ConfigError(f"{source.place(keys)}: {_dotted(keys)} is missing")
    # A union adds the type that it tried to the location.
    shown = keys[: 2 + sum(isinstance(key, int) for key in keys)]
    return ConfigError(
        f"{source.place(keys)}: {_dotted(shown)}: {first['msg'][0].lower()}{first['msg'][1:]}, "
        f"got {first['input']!r}"
    )


def _unknown(source: YamlSource, keys: Keys, known: Any) -> ConfigError:
    hint = _did_you_mean(str(keys[-1]), list(known))
    return ConfigError(
        f"{source.place(keys)}: key {_dotted(keys)!r} is unknown; {hint}"
        f"allowed here: {', '.join(known)}"
    )


def _overridden(source: YamlSource, overrides: Mapping[str, Any]) -> YamlSource:
    """The same document with some values replaced; errors then name the override."""
    data, changed = dict(source.data), set()
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        if section not in SECTIONS:
            raise _unknown(YamlSource(f"override {dotted!r}", {}, {}), (section,), SECTIONS)
        plain = json.loads(json.dumps(value, default=str))
        data[section] = {**(data.get(section) or {}), key: plain} if key else plain
        changed.add((section, key) if key else (section,))
    return YamlSource(source.where, data, source.lines, frozenset(changed))


def _dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _names() -> str:
    return ", ".join(list_recipes())
