"""Describes a schema in plain words: its keys, their allowed values, and the key that a misspelled
one was probably meant to be.

`Section` is the base class of the sections of every config file.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A group of keys. Unknown keys are errors, and strings are never converted to numbers."""

    input_files: ClassVar[tuple[str, ...]] = ()
    """Dotted keys whose values are paths of the user's files; * stands for a name that the config
    chooses. A relative path is resolved from the file that gives it, or from the current folder if
    the command line gives it."""
    absolute_inputs: ClassVar[bool] = False
    """Whether loading makes these paths absolute, so that a copy of the config refers to the same
    files wherever it is stored. Otherwise they become relative to the loaded config's folder."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )


Path = tuple[str | int, ...]
Node = dict[str, Any]
"""A node of a JSON schema, which describes one value."""
ENTRY = "NAME"
"""Placeholder in a key's name for a name that the config chooses, such as that of a group."""


@dataclass(frozen=True)
class Key:
    """One key of a schema. `default` is a plain YAML value, and None if the key is required."""

    name: str
    allowed: str
    default: Any
    required: bool
    description: str


def dotted(path: Path) -> str:
    """Returns a path as people write it, such as `data.blend entry 1.path`. List entries count
    from 1."""
    name = ""
    for part in path:
        name += f" entry {part + 1}" if isinstance(part, int) else f".{part}" if name else part
    return name


class Keys:
    """The keys of a schema, read from the JSON schema that pydantic generates for it."""

    def __init__(self, schema: type[BaseModel]):
        self._root = schema.model_json_schema()
        self.all = list(self._walk(self._root, "", entries=False))

    def with_entries(self) -> list[Key]:
        """Returns all keys, including those inside list entries (`data.blend[].path`) and inside
        maps whose names the config chooses (`groups.NAME.weight`)."""
        return list(self._walk(self._root, "", entries=True))

    def named(self, name: str) -> list[Key]:
        """Returns the key of this name, or all keys in a section of this name.

        A name that the config chooses, such as human in groups.human.weight, matches NAME, and []
        may be left out.
        """
        wanted = name.replace("[]", "").split(".")

        def matches(key: Key) -> bool:
            parts = key.name.replace("[]", "").split(".")[: len(wanted)]
            return len(parts) == len(wanted) and all(
                part in (ENTRY, word) for part, word in zip(parts, wanted, strict=True)
            )

        return [key for key in self.with_entries() if matches(key)]

    def _deref(self, node: Node) -> Node:
        if "$ref" not in node:
            return node
        target: Node = self._root["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        return target | {key: value for key, value in node.items() if key != "$ref"}

    def _choices(self, node: Node) -> list[Node]:
        node = self._deref(node)
        choices = node.get("anyOf") or node.get("oneOf") or [node]
        return [self._deref(choice) for choice in choices]

    def _walk(self, group: Node, prefix: str, entries: bool) -> Iterator[Key]:
        for name, node in group.get("properties", {}).items():
            node, full = self._deref(node), prefix + name
            inner = [choice for choice in self._choices(node) if "properties" in choice]
            if inner != self._choices(node):
                yield Key(
                    full,
                    self._words(node),
                    node.get("default"),
                    name in group.get("required", []),
                    node.get("description", "") if not inner else inner[0].get("description", ""),
                )
            for choice in inner:
                yield from self._walk(choice, full + ".", entries)
            if entries:
                yield from self._walk_entries(node, full)

    def _walk_entries(self, node: Node, name: str) -> Iterator[Key]:
        for choice in self._choices(node):
            below = [(f"{name}.{ENTRY}.", entry) for entry in _free_entries(choice)]
            below += [(f"{name}[].", choice["items"])] if "items" in choice else []
            for prefix, entry in below:
                for group in self._choices(entry):
                    yield from self._walk(group, prefix, entries=True)

    def _at(self, path: Path) -> Node | None:
        nodes = [self._root]
        for part in path:
            below = []
            for choice in (choice for node in nodes for choice in self._choices(node)):
                if isinstance(part, int):
                    below += [choice["items"]] if "items" in choice else []
                elif part in choice.get("properties", {}):
                    below.append(choice["properties"][part])
                else:
                    below += _free_entries(choice)
            if not below:
                return None
            nodes = below
        return nodes[0]

    def allowed(self, path: Path) -> str | None:
        """Describes the values allowed at a path, such as "a whole number at least 1, or null"."""
        node = self._at(path)
        return self._words(node) if node is not None else None

    def description(self, path: Path) -> str:
        """Returns the description of the key at a path, or "" if the schema has none."""
        node = self._at(path)
        return "" if node is None else self._deref(node).get("description", "")

    def names_in(self, path: Path) -> list[str]:
        """Returns the names of the keys in the group at a path."""
        node = self._at(path)
        choices = self._choices(node) if node is not None else []
        return [name for choice in choices for name in choice.get("properties", {})]

    def allowed_name(self, path: Path) -> str | None:
        """Returns the pattern that names must match in the map at a path whose names the config
        chooses, or None if there is none."""
        node = self._at(path)
        choices = self._choices(node) if node is not None else []
        return next(
            (name for choice in choices for name in choice.get("patternProperties", {})), None
        )

    def _words(self, node: Node) -> str:
        words = [_kind(choice, self._words) for choice in self._choices(node)]
        return ", or ".join(dict.fromkeys(words))

    def meant(self, path: Path) -> list[str]:
        """Returns the keys that an unknown key was most likely meant to be, best first."""
        leaf, group = str(path[-1]), path[:-1]
        names = self._all_names()
        same = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
        if same:
            return sorted(same, key=lambda name: name.count("."))[:3]
        siblings = [str(name) for name in self.names_in(group)]
        near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
        if near:
            return [dotted((*group, near[0]))]
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
        return [leaves[near[0]]] if near else []

    def suggestion(self, path: Path) -> str:
        """Returns a hint what to write instead of the unknown key at a path."""
        meant = self.meant(path)
        if meant:
            return f"did you mean {' or '.join(meant)}?"
        above = path[:-1]
        while not (names := self.names_in(above)):
            above = above[:-1]  # a section that is not there either
        of_section = f"of {dotted(above)} " if above else ""
        return f"the keys {of_section}are {', '.join(names)}"

    def _all_names(self) -> list[str]:
        """Returns the names of all keys and groups, outer ones first, except those inside lists
        and maps."""
        names: dict[str, None] = {}
        for key in self.all:
            parts = key.name.split(".")
            for depth in range(1, len(parts) + 1):
                names[".".join(parts[:depth])] = None
        return list(names)


def _free_entries(node: Node) -> list[Node]:
    """Returns the schemas of the entries of a map whose names the config chooses."""
    any_name = node.get("additionalProperties")
    entries = list(node.get("patternProperties", {}).values())
    return [*entries, any_name] if isinstance(any_name, dict) else entries


def _kind(node: Node, words_of: Callable[[Node], str]) -> str:
    """Describes one kind of value in words."""
    if "enum" in node or "const" in node:
        values = node.get("enum", [node.get("const")])
        return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))
    kind = node.get("type", "")
    if kind == "array":
        entries = words_of(node["items"]) if node.get("items") else "anything"
        return f"a list{_length(node)}, each entry {entries}"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
        "object": "a group of keys",
    }
    if kind == "object" and node.get("minProperties"):
        return f"a group of at least {node['minProperties']} keys"
    return words.get(kind, "another value") + _bounds(node)


def _length(node: Node) -> str:
    low, high = node.get("minItems"), node.get("maxItems")
    if low is not None and low == high:
        return f" of exactly {low} entries"
    return f" of at least {low} {'entry' if low == 1 else 'entries'}" if low else ""


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _bounds(node: Node) -> str:
    parts = [
        f"{words} {_number(node[name])}"
        for name, words in {
            "exclusiveMinimum": "greater than",
            "minimum": "at least",
            "exclusiveMaximum": "less than",
            "maximum": "at most",
        }.items()
        if name in node
    ]
    if node.get("minLength"):
        parts.append("that is not empty")
    if "pattern" in node:
        parts.append(f"of the pattern {node['pattern']}")
    return " " + " and ".join(parts) if parts else ""
