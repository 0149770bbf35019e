"""Reads YAML files into trees in which every value knows where it was written.

The dialect is that of YAML 1.2: `1e-4` is a number, and `no`, `010`, `1:30` and dates are text.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from yaml.resolver import BaseResolver

from gengram_megatron.errors import UserError


@dataclass(frozen=True)
class Tree:
    """A value of a config, which is a dict or list of trees or a scalar, and the place where it was
    given, such as FILE:LINE."""

    value: Any
    location: str

    def plain(self) -> Any:
        """Returns the value without places, as plain Python objects."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def nearest(self, path: tuple[str | int, ...]) -> "Tree":
        """Returns the value at the path, or the innermost group on the way to it that exists."""
        node = self
        for part in path:
            children = node.value
            if isinstance(children, list):
                children = dict(enumerate(children))
            if not isinstance(children, dict) or part not in children:
                break
            node = children[part]
        return node

    def merged_with(self, later: "Tree") -> "Tree":
        """Merges a later tree into this one: groups are merged, other values are replaced."""
        if not (isinstance(self.value, dict) and isinstance(later.value, dict)):
            return later
        merged = dict(self.value)
        for key, child in later.value.items():
            merged[key] = merged[key].merged_with(child) if key in merged else child
        return Tree(merged, later.location)


RESOLVERS = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


GROUP_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


LoaderOrDumper = TypeVar("LoaderOrDumper", bound=BaseResolver)


def _with_resolvers(cls: type[LoaderOrDumper]) -> type[LoaderOrDumper]:
    """Gives a PyYAML loader or dumper the YAML dialect of config files."""
    cls.yaml_implicit_resolvers = {}
    for name, pattern, first in RESOLVERS:
        letters = ["" if letter == "\0" else letter for letter in first]
        cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), letters
        )
    return cls


@_with_resolvers
class ConfigLoader(yaml.SafeLoader):
    """Reads config files."""


@_with_resolvers
class ConfigDumper(yaml.SafeDumper):
    """Writes config files. Text that ConfigLoader would read as a number is quoted."""


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


ConfigDumper.add_representer(list, _represent_list)


def dump_yaml(value: Any) -> str:
    """Returns the value as YAML, with keys in their given order and lists of scalars on one
    line."""
    return yaml.dump(value, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=100)


def parse_yaml(text: str, source: str, numbered: bool = True) -> Tree:
    """Parses one YAML document. Places are `source:line`, or only the source if not numbered.

    Raises UserError for syntax errors, repeated keys and keys that are not text.
    """

    def location(mark: yaml.Mark | None) -> str:
        return f"{source}:{mark.line + 1}" if numbered and mark else source

    problems: list[str] = []

    def to_tree(node: yaml.Node) -> Tree:
        here = location(node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return Tree(loader.construct_object(node), here)
        if node.tag not in GROUP_TAGS:
            problems.append(f"{here}: the tag {node.tag} is not supported; remove it")
        if isinstance(node, yaml.SequenceNode):
            return Tree([to_tree(child) for child in node.value], here)
        children: dict[str, Tree] = {}
        for key_node, child in node.value:
            key, where = key_node.value, location(key_node.start_mark)
            if key_node.tag != "tag:yaml.org,2002:str":
                problems.append(f"{where}: a key must be a word, not {_shown(key_node)}")
            elif key in children:
                problems.append(
                    f"{where}: the key {key} is given twice, first at {children[key].location}; "
                    "keep one of them"
                )
            else:
                children[key] = Tree(to_tree(child).value, where)
        return Tree(children, here)

    try:
        loader = ConfigLoader(text)
        root = loader.get_single_node()
        tree = Tree(None, source) if root is None else to_tree(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(str(error.problem or error.context).split())
        raise UserError(f"{location(mark)}: this is not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{source}:{line}" if numbered else source
        raise UserError(f"{where}: the character {error.character!r:.20} is not allowed") from None
    except ValueError as error:  # an explicit tag that the value does not fit, such as `!!int x`
        raise UserError(f"{source}: a value does not fit its tag: {error}") from None
    except RecursionError:
        raise UserError(
            f"{source}: an alias contains itself, or groups are nested too deeply"
        ) from None
    if problems:
        raise UserError("\n".join(problems))
    return tree


def _shown(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a group"


def read_tree(path: Path, chain: tuple[Path, ...] = ()) -> Tree:
    """Reads a file and the base files that its `base:` names. Later base files override earlier
    ones, and the file itself overrides them all.

    `chain` lists the files from the requested one to the one whose base this file is.
    """
    path = Path(os.path.normpath(path))
    tree = parse_yaml(_read_text(path), str(path))
    if tree.value is None:
        raise UserError(f"{path}: the file is empty; it must hold keys, such as `run:`")
    if not isinstance(tree.value, dict):
        raise UserError(
            f"{path}: the file must hold keys, such as `run:`, not {describe(tree.plain())}"
        )
    base = tree.value.pop("base", None)
    if base is None:
        return tree
    chain = (*chain, path)
    merged = Tree({}, str(path))
    for name in _base_names(base):
        file = Path(os.path.normpath(path.parent / name))
        if not file.is_file():
            raise UserError(f"{base.location}: base names {name}, but there is no file {file}")
        if any(file.samefile(above) for above in chain):
            cycle = " -> ".join(map(str, [*chain, file]))
            raise UserError(f"{base.location}: base goes round in a circle: {cycle}")
        merged = merged.merged_with(read_tree(file, chain))
    return merged.merged_with(tree)


def _base_names(base: Tree) -> list[str]:
    names = base.plain() if isinstance(base.value, list) else [base.value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"{base.location}: base is {describe(base.plain())}; "
            "it must be the name of a file or a list of such names"
        )
    return names


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        absolute = "" if path.is_absolute() else f" (that would be {path.absolute()})"
        raise UserError(f"there is no config file {path}{absolute}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the file is not UTF-8 text (byte {error.start} cannot be read); save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read: {error.strerror}") from None


def flattened(group: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested groups as one flat group with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in group.items():
        is_group = isinstance(value, dict)
        flat |= flattened(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat


def inline_yaml(value: Any) -> str:
    """Returns a scalar or a list of scalars as it would be written in a YAML file."""
    return dump_yaml(value).removesuffix("...\n").strip()


def describe(value: Any) -> str:
    """Returns a value as error messages show it."""
    if isinstance(value, dict):
        return "a group of keys" if value else "an empty group"
    if isinstance(value, str):
        return f"the text {value!r}"
    return inline_yaml(value)
