"""A config file and `key=value` words to a checked config, and back to YAML."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from gengram_megatron.config.keys import Keys, Section, dotted
from gengram_megatron.config.tree import Tree, describe, dump_yaml, parse_yaml, read_tree
from gengram_megatron.errors import UserError

COMMAND_LINE = "command line"
ALTERNATIVE = re.compile(r"(constrained-)?(int|float|str)$|literal\[")
"""What pydantic puts behind a key that may have values of several kinds: the kind it tried."""

AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: Path, overrides: list[str], schema: type[AnySection]) -> AnySection:
    """Read a config file, the files it builds on and the `key=value` words that win over them.

    Raises UserError with one line for each thing that is wrong.
    """
    tree = read_tree(Path(path))
    refuse_other_kinds(tree, path, set(schema.model_fields))
    tree, problems = with_overrides(tree, overrides)
    return check_tree(tree, path, schema, problems)


@dataclass(frozen=True)
class _Kind:
    """A kind of config file: the keys that only it has, and the command that takes it."""

    keys: tuple[str, ...]
    what: str
    command: str


_SWEEP = _Kind(("sweep",), "a sweep", "gengram sweep")
_KINDS = (
    _SWEEP,
    _Kind(("model", "train"), "the config of a run", "gengram train"),
    _Kind(("groups",), "the config of a data set", "gengram-data build"),
    _Kind(("ncbi", "indexes", "files"), "a download list", "gengram-data download"),
)


def refuse_other_kinds(tree: Tree, path: Path, allowed: set[str]) -> None:
    """Raise UserError if a file is of a kind that another command takes, and name that command.

    allowed: the top-level keys of the kind that is wanted. A file that has keys of the wanted kind
    is one, whatever else it has; but the config of a run with a section sweep is a sweep.
    """
    there = [kind for kind in _KINDS if tree.value.keys() & set(kind.keys)]
    wanted = [kind for kind in there if allowed.intersection(kind.keys)]
    if there and (not wanted or (there[0] is _SWEEP and _SWEEP not in wanted)):
        kind = there[0]
        key = next(key for key in kind.keys if key in tree.value)
        raise UserError(
            f"{path}: this is {kind.what}, as its key {key} says: use `{kind.command} {path}`"
        )


def with_overrides(tree: Tree, overrides: list[str]) -> tuple[Tree, list[str]]:
    """A tree with `key=value` words on top of it, and what is wrong with those words."""
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
    """The config that a tree read from `path` stands for.

    Raises UserError with one line for each thing that is wrong, after the `problems` known before.
    """
    problems = list(problems or [])
    folder = None if schema.absolute_inputs else Path(os.path.normpath(path)).parent
    for key in schema.input_files:
        tree = _with_input_path(tree, key.split("."), folder)
    try:
        # As JSON, because strict checking of JSON takes text for a path and a list for a tuple,
        # yet never text for a number.
        config = schema.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        keys = Keys(schema)
        found = error.errors(include_url=False)
        problems += dict.fromkeys(_sentence(one, tree, keys, path) for one in found)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _with_input_path(tree: Tree, parts: list[str], folder: Path | None) -> Tree:
    """A tree whose values at a key are paths that hold wherever they are read: relative to a folder,
    or absolute where that is None. Values that are no paths, URLs among them, stay."""
    if parts and isinstance(tree.value, dict):
        children = {
            name: _with_input_path(child, parts[1:], folder) if parts[0] in ("*", name) else child
            for name, child in tree.value.items()
        }
        return Tree(children, tree.place)
    if parts or not isinstance(tree.value, str) or not tree.value or "://" in tree.value:
        return tree
    from_file = tree.place != COMMAND_LINE
    named_in = Path(tree.place.rpartition(":")[0]).parent if from_file else Path()
    if folder is None:
        return Tree(os.path.abspath(named_in / tree.value), tree.place)
    if named_in == folder or os.path.isabs(tree.value):
        return tree
    return Tree(os.path.relpath(named_in / tree.value, folder), tree.place)


def dump_config(config: Section) -> str:
    """The whole config as YAML, in the schema's order; it loads back to an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def _override(word: str) -> Tree:
    """`a.b=value` as a tree. Values are YAML, so they mean what they mean in a file."""
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            f"{COMMAND_LINE}: {word!r} is not of the form key=value, such as optimizer.lr=3e-4"
        )
    if not text.strip():
        raise UserError(
            f"{COMMAND_LINE}: {key.strip()} has no value; write {key.strip()}=null for none"
        )
    tree = parse_yaml(text, f"{COMMAND_LINE}, value of {key.strip()}", numbered=False)
    return tree_at(parts, Tree(tree.value, COMMAND_LINE))


def tree_at(parts: list[str], value: Tree) -> Tree:
    """A tree with nothing but a value under the key of these parts, all in the value's place."""
    for part in reversed(parts):
        value = Tree({part: value}, value.place)
    return value


def _sentence(error: dict, tree: Tree, keys: Keys, path: Path) -> str:
    """One of pydantic's errors in plain words."""
    where: tuple[str | int, ...] = error["loc"]
    while where and ALTERNATIVE.match(str(where[-1])):
        where = where[:-1]
    name = dotted(where)
    found = tree.nearest(where)
    if error["type"] == "json_invalid":
        return f"{path}: a text holds half of a Unicode character, such as \\ud800; write it whole"
    if where and where[-1] == "[key]":
        pattern = keys.allowed_name(where[:-2])
        return (
            f"{found.place}: {dotted(where[:-2])} has an entry {where[-2]!r}; "
            f"such names must be of the pattern {pattern}"
        )
    if error["type"] == "extra_forbidden":
        return f"{found.place}: there is no key {name}; {keys.suggestion(where)}"
    if error["type"] == "missing":
        place = path if found is tree or found.place == COMMAND_LINE else found.place
        meaning = f" ({text})" if (text := keys.description(where).rstrip(".")) else ""
        return f"{place}: the key {name} is missing; it must be {keys.allowed(where)}{meaning}"
    if error["type"] == "value_error":
        place = f"{found.place}: {name}" if where else str(path)
        was = "" if isinstance(found.value, dict) else f" is {describe(found.plain())}"
        return f"{place}{was}: {error['ctx']['error']}"
    allowed = keys.allowed(where) or error["msg"].lower()
    return f"{found.place}: {name} is {describe(found.plain())}; it must be {allowed}"
