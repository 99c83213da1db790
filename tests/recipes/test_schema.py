"""Recipes: the shipped ones are the paper's, and every mistake is named with its place."""

from dataclasses import fields
from pathlib import Path

import pytest

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.registry import MODELS
from qmir_ao.recipes.schema import CONFIGS, list_recipes, load_recipe, parse_recipe
from qmir_ao.recipes.train import TrainOptions
from qmir_ao.recipes.yaml_source import MAX_BYTES, parse_yaml

BASE = (CONFIGS / "light-sr-x2.yaml").read_text(encoding="utf-8")
# Iterations, batch, side of the ground truth, learning rate: sections 3.1 and 6.1 of the paper.
PAPER = {
    **{f"classic-sr-x{s}": (20000, 4, 192, 1e-4) for s in (2, 3, 4)},
    **{f"light-sr-x{s}": (20000, 2, 192, 2e-4) for s in (2, 3, 4)},
    **dict.fromkeys(("jpeg", "denoise", "real-denoise"), (20000, 4, 128, 0.0001)),
}


def test_the_paper_is_covered() -> None:
    assert set(list_recipes()) == {*PAPER, "tiny-sr-x2"}


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    train = recipe.train
    side = train.patch * recipe.task.scale
    assert (train.iterations, train.batch, side, train.learning_rate) == PAPER[name]
    assert (train.schedule, train.warmup, train.ema, train.seed) == ("steps", 0, 0.0, 10)
    assert recipe.quant is not None
    assert recipe.quant.settings["preset"] == "paper"
    arguments = MODELS[recipe.model.name]
    assert arguments.get("scale", 1) == recipe.task.scale
    assert arguments.get("in_channels", 3) == recipe.task.channels


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_survives_its_own_yaml(name: str) -> None:
    recipe = load_recipe(name)
    again = parse_recipe(recipe.to_yaml(), "again", name)
    assert again.to_dict() == recipe.to_dict()
    assert (again.task, again.train, again.data) == (recipe.task, recipe.train, recipe.data)


def test_every_training_option_is_a_key() -> None:
    assert set(load_recipe("jpeg").to_dict()["train"]) == {f.name for f in fields(TrainOptions)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight_bits: 4", "weigth_bits: 4", r"line 27.*quant\.weigth_bits.*'weight_bits'"),
        ("quant:", "quants:", r"line 26: key 'quants' is unknown; did you mean 'quant'"),
        ("  scale: 2", "  quality: 2", r"line 9: key 'task\.quality' is unknown"),
        ("name: sr", "name: srr", r"line 8: task\.name must be one of .* did you mean 'sr'"),
        ("mambair-light-x2", "mambair-lite-x2", r"line 5.*did you mean 'mambair-light-x2'"),
        ("batch: 2", "batch: two", r"line 18: train\.batch: input should be a valid integer"),
        ("batch: 2", "batch: true", r"line 18: train\.batch: input should be a valid integer"),
        ("batch: 2", "batch: 0", r"line 15: section train: .*batch must be at least 1, got 0"),
        ("2e-4", ".nan", "learning_rate must be between"),
        ("act_bits: 4", "act_bits: 9", r"line 26: section quant: .*9"),
        ("placement: paper", "placement: papr", "section quant: placement='papr'"),
        ("  train: []", "  train: [3]", r"line 12: data\.train\.0: input should be a valid string"),
        ("  train: []", "  train: photos", r"line 12: data\.train: input should be a valid array"),
        ("act_bits: 4", "act_bits: 4\n  act_bits: 2", "line 29: key 'quant.act_bits' is given tw"),
        ("model:", "model: &a", "line 4: anchors and aliases are not allowed"),
        ("task:\n", "task: 3\nother:\n", "key 'other' is unknown"),
        ("model:\n", "model: [\n", "this is not YAML"),
        ("seed: 10", "seed: " + "9" * 5000, "a value cannot be read"),
        ("seed: 10", "seed: " + "[" * 20 + "]" * 20, "nested deeper"),
    ],
)
def test_mistakes_are_named(old: str, new: str, message: str) -> None:
    assert old in BASE
    with pytest.raises(ConfigError, match=message) as caught:
        parse_recipe(BASE.replace(old, new, 1), "my.yaml")
    assert str(caught.value).startswith("my.yaml")


@pytest.mark.parametrize(
    "text", ["", "[]", "text", "3: 4", "? [a]\n: b", "\x00", "!!python/name:os"]
)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="junk"):
        parse_recipe(text, "junk")


def test_long_texts_are_refused(tmp_path: Path) -> None:
    long = "#" * (MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="at most"):
        parse_yaml(long, "long")
    (tmp_path / "long.yaml").write_text(long)
    with pytest.raises(ConfigError, match="too large"):
        load_recipe(tmp_path / "long.yaml")


def test_missing_sections_and_names() -> None:
    with pytest.raises(ConfigError, match="section 'model' is missing"):
        parse_recipe("task: {name: sr}", "x")
    with pytest.raises(ConfigError, match=r"model\.name is missing"):
        parse_recipe("model: {}\ntask: {name: sr}", "x")
    recipe = parse_recipe("model: {name: mambair-tiny-x2}\ntask: {name: sr}", "x")
    assert recipe.train == TrainOptions()
    assert recipe.quant is None


def test_overrides() -> None:
    changed = load_recipe("denoise", {"task.sigma": 50, "train.iterations": 7, "quant": None})
    assert changed.task.title.endswith("sigma 50")
    assert changed.train.iterations == 7
    assert changed.quant is None
    with pytest.raises(ConfigError, match=r"overridden train\.batch: train\.batch: input should"):
        load_recipe("denoise", {"train.batch": "x"})
    with pytest.raises(ConfigError, match="did you mean 'iterations'"):
        load_recipe("denoise", {"train.iteratons": 5})
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        load_recipe("denoise", {"trian.batch": 5})


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'light-sr-x2'"):
        load_recipe("lihgt-sr-x2")
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "latin.yaml")
