"""YAML text as plain data with the line of every key; hostile documents are refused."""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from qmir_ao.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 8
Keys = tuple[str | int, ...]

# YAML 1.1 reads 1e-4 as text, because it has no point.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader that knows 1e-4."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


@dataclass(frozen=True)
class YamlSource:
    """A parsed document.

    Attributes:
        where: file or other origin, for errors.
        data: mappings, lists and scalars, as JSON knows them.
        lines: line of every key, by its path.
        overridden: paths of values that did not come from the document.
    """

    where: str
    data: dict[str, Any]
    lines: dict[Keys, int]
    overridden: frozenset[Keys] = frozenset()

    def place(self, keys: Keys) -> str:
        """Origin and line of a key, or of the nearest key above it."""
        for path in self.overridden:
            if keys[: len(path)] == path:
                return f"{self.where}, overridden {'.'.join(map(str, path))}"
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return f"{self.where}, line {self.lines[keys]}" if keys else self.where


def parse_yaml(text: str, where: str) -> YamlSource:
    """Parse a document whose top level is a mapping.

    Raises:
        ConfigError: no YAML, no mapping, a key twice, anchors, too long or too deep.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: {len(text)} characters are no recipe; at most {MAX_BYTES}")
    try:
        # Aliases make a small document unfold to any size, and deep nesting breaks the parser.
        _check_events(text, where)
        node = yaml.compose(text, _Loader)
        # Dates become text; what JSON cannot hold has no place in a recipe.
        data = json.loads(json.dumps(yaml.load(text, _Loader), default=str))
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: this is not YAML: {reason}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{where}: a value cannot be read: {error}") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(data, dict):
        raise ConfigError(
            f"{where}: a recipe is a mapping with the sections model, task, data, train and "
            f"quant, got {type(data).__name__}"
        )
    lines: dict[Keys, int] = {}
    _collect(node, (), lines, where)
    return YamlSource(where, data, lines)


def parse_scalar(text: str, where: str) -> Any:
    """Value of `KEY=VALUE`, read as YAML.

    Raises:
        ConfigError: no YAML.
    """
    return parse_yaml(f"value: {text}", where).data["value"]


def _check_events(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, _Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{where}, line {line}: anchors and aliases are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}, line {line}: nested deeper than {MAX_DEPTH} levels")


def _collect(node: yaml.Node, keys: Keys, lines: dict[Keys, int], where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*keys, str(key.value))
            if path in lines:
                raise ConfigError(
                    f"{where}, line {key.start_mark.line + 1}: key {'.'.join(map(str, path))!r} is "
                    f"given twice, first on line {lines[path]}"
                )
            lines[path] = key.start_mark.line + 1
            _collect(value, path, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*keys, index] = value.start_mark.line + 1
            _collect(value, (*keys, index), lines, where)
