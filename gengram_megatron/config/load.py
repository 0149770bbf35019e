"""Turns a config file and `key=value` overrides into a validated config, and back into YAML."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gengram_megatron.config.keys import Keys, Section, dotted
from gengram_megatron.config.tree import Tree, describe, dump_yaml, parse_yaml, read_tree
from gengram_megatron.errors import UserError

COMMAND_LINE = "command line"
ALTERNATIVE = re.compile(r"(constrained-)?(int|float|str)$|literal\[")
"""Matches what pydantic appends to the path of a key with several allowed kinds of value: the kind
it tried."""

AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: Path, overrides: list[str], schema: type[AnySection]) -> AnySection:
    """Reads a config file and its base files, and applies the `key=value` overrides.

    Raises UserError with one line for each problem.
    """
    tree = read_tree(Path(path))
    refuse_other_kinds(tree, path, set(schema.model_fields))
    tree, problems = with_overrides(tree, overrides)
    return check_tree(tree, path, schema, problems)


@dataclass(frozen=True)
class _Kind:
    """A kind of config file: the top-level keys that only it has, and the command that reads it."""

    keys: tuple[str, ...]
    description: str
    command: str


_SWEEP = _Kind(("sweep",), "a sweep", "gengram sweep")
_KINDS = (
    _SWEEP,
    _Kind(("model", "train"), "the config of a run", "gengram train"),
    _Kind(("groups",), "the config of a data set", "gengram-data build"),
    _Kind(("ncbi", "indexes", "files"), "a download list", "gengram-data download"),
)


def refuse_other_kinds(tree: Tree, path: Path, allowed: set[str]) -> None:
    """Raises UserError, which names the right command, if a file is of a kind that another command
    reads.

    Args:
        allowed: the top-level keys of the wanted kind. A file with any of its keys counts as that
            kind, whatever else it has, except that a config of a run with a section sweep counts
            as a sweep.
    """
    matching = [kind for kind in _KINDS if tree.value.keys() & set(kind.keys)]
    wanted = [kind for kind in matching if allowed.intersection(kind.keys)]
    if matching and (not wanted or (matching[0] is _SWEEP and _SWEEP not in wanted)):
        kind = matching[0]
        key = next(key for key in kind.keys if key in tree.value)
        raise UserError(
            f"{path}: this is {kind.description}, because it has the key {key}: "
            f"use `{kind.command} {path}`"
        )


def with_overrides(tree: Tree, overrides: list[str]) -> tuple[Tree, list[str]]:
    """Applies `key=value` overrides to a tree. Returns the new tree, and one message for each
    override that is not valid."""
    problems = []
    for word in overrides:
        try:
            tree = tree.merged_with(_override(word))
        except UserError as error:
            problems.append(str(error))
    return tree, problems


def check_tree(
    tree: Tree, path: Path, schema: type[AnySection], problems: list[str] | None = None
) -> AnySection:
    """Validates a tree that was read from `path`, and returns its config.

    Raises UserError with one line for each problem, after the given `problems`.
    """
    problems = list(problems or [])
    folder = None if schema.absolute_inputs else Path(os.path.normpath(path)).parent
    for key in schema.input_files:
        tree = _with_input_path(tree, key.split("."), folder)
    try:
        # Strict validation of JSON accepts text for a path and a list for a tuple, but never text
        # for a number.
        config = schema.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        keys = Keys(schema)
        details = error.errors(include_url=False)
        problems += dict.fromkeys(_sentence(detail, tree, keys, path) for detail in details)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _with_input_path(tree: Tree, parts: list[str], folder: Path | None) -> Tree:
    """Returns the tree with the paths at a key made relative to `folder`, or absolute if that is
    None. Values that are not paths, such as URLs, are unchanged."""
    if parts and isinstance(tree.value, dict):
        children = {
            name: _with_input_path(child, parts[1:], folder) if parts[0] in ("*", name) else child
            for name, child in tree.value.items()
        }
        return Tree(children, tree.location)
    if parts or not isinstance(tree.value, str) or not tree.value or "://" in tree.value:
        return tree
    from_file = tree.location != COMMAND_LINE
    named_in = Path(tree.location.rpartition(":")[0]).parent if from_file else Path()
    if folder is None:
        return Tree(os.path.abspath(named_in / tree.value), tree.location)
    if named_in == folder or os.path.isabs(tree.value):
        return tree
    return Tree(os.path.relpath(named_in / tree.value, folder), tree.location)


def dump_config(config: Section) -> str:
    """Returns the whole config as YAML, in the schema's order. It loads back to an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def _override(word: str) -> Tree:
    """Parses `a.b=value` into a tree. The value is parsed as YAML, as in a file."""
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            f"{COMMAND_LINE}: {word!r} is not of the form key=value, such as optimizer.lr=3e-4"
        )
    if not text.strip():
        raise UserError(
            f"{COMMAND_LINE}: {key.strip()} has no value; write {key.strip()}=null to unset it"
        )
    tree = parse_yaml(text, f"{COMMAND_LINE}, value of {key.strip()}", numbered=False)
    return tree_at(parts, Tree(tree.value, COMMAND_LINE))


def tree_at(parts: list[str], value: Tree) -> Tree:
    """Returns a tree that holds only this value, under the key with these parts. All its groups get
    the value's location."""
    for part in reversed(parts):
        value = Tree({part: value}, value.location)
    return value


def _sentence(error: ErrorDetails, tree: Tree, keys: Keys, path: Path) -> str:
    """Returns the message for one of pydantic's errors."""
    where: tuple[str | int, ...] = error["loc"]
    while where and ALTERNATIVE.match(str(where[-1])):
        where = where[:-1]
    name = dotted(where)
    nearest = tree.nearest(where)
    if error["type"] == "json_invalid":
        return (
            f"{path}: a text contains half of a Unicode character, such as \\ud800; "
            "write the whole character"
        )
    if where and where[-1] == "[key]":
        pattern = keys.allowed_name(where[:-2])
        return (
            f"{nearest.location}: {dotted(where[:-2])} has an entry {where[-2]!r}; "
            f"such names must match the pattern {pattern}"
        )
    if error["type"] == "extra_forbidden":
        return f"{nearest.location}: there is no key {name}; {keys.suggestion(where)}"
    if error["type"] == "missing":
        location = path if nearest is tree or nearest.location == COMMAND_LINE else nearest.location
        meaning = f" ({text})" if (text := keys.description(where).rstrip(".")) else ""
        return f"{location}: the key {name} is missing; it must be {keys.allowed(where)}{meaning}"
    if error["type"] == "value_error":
        location = f"{nearest.location}: {name}" if where else str(path)
        value = "" if isinstance(nearest.value, dict) else f" is {describe(nearest.plain())}"
        return f"{location}{value}: {error['ctx']['error']}"
    allowed = keys.allowed(where) or error["msg"].lower()
    return f"{nearest.location}: {name} is {describe(nearest.plain())}; it must be {allowed}"
