"""Writes a config file for a model of another format, from the model's own settings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gengram_megatron.config.layout import check_model
from gengram_megatron.config.load import check_tree, tree_at, with_overrides
from gengram_megatron.config.schema import Config, Model
from gengram_megatron.config.tree import Tree, inline_yaml, parse_yaml
from gengram_megatron.engine.exchange.importing import ForeignModel
from gengram_megatron.engine.exchange.settings import refuse_differences
from gengram_megatron.errors import UserError

_REQUIRED = tuple(name for name, key in Model.model_fields.items() if key.is_required())
_STEPS = 1000
_DATA = "datasets/mine"
_COMMENTS = {
    "run.dir": "the folder of the run, relative to the current folder",
    "model.seq_length": "bases per sample of the new run",
    "data.path": "CHOOSE the output of gengram-data build, relative to the current folder",
    "train.global_batch_size": "samples per step, over all processes",
    "train.micro_batch_size": "samples per forward pass; a larger value needs more memory",
    "train.steps": "CHOOSE how long the new run trains; it starts at step 0",
    "train.samples": "CHOOSE how long the new run trains; it starts at step 0",
    "train.precision": "the precision of weights and activations",
}


def new_config(path: Path, foreign: ForeignModel, overrides: list[str]) -> tuple[str, Config]:
    """Returns the text of a config file for a model, and the parsed config.

    path: the path by which the user named the model; the run is named after it. overrides:
    `key=value` words, which take precedence over the model's own settings.

    Raises UserError if a required key is given neither by the model nor by the overrides, or if
    the model computes something other than the config, or something that no config can express.
    """
    source = str(foreign.path)
    tree, problems = with_overrides(_tree(_keys(path, foreign), source), overrides)
    tree = _without_overridden_choices(tree, source)
    model = tree.nearest(("model",))
    missing = [key for key in _REQUIRED if model.nearest((key,)) is model]
    if missing and not problems:
        words = " ".join(f"model.{key}=..." for key in missing)
        raise UserError(
            f"{foreign.path} does not state all that a config needs: add {words}, or give a CONFIG "
            "for the model"
        )
    config = check_tree(tree, Path(path), Config, problems)
    check_model(config)
    refuse_differences(foreign.path, foreign.differences(config))
    plain = tree.plain()
    if config.data.tokenizer is not None:  # the resolved path: the config file may be elsewhere
        plain["data"]["tokenizer"] = config.data.tokenizer
    lines = "\n".join(_lines(plain))
    text = f"""\
# The model of {foreign.path}, for a run that starts from its weights.
# All other keys have their defaults; `gengram config --keys` lists them.
{lines}
"""
    return text, check_tree(parse_yaml(text, str(path)), Path(path), Config)


def _keys(path: Path, foreign: ForeignModel) -> dict[str, object]:
    """Returns dotted keys and their values, in the order of the file."""
    keys: dict[str, object] = {"run.dir": f"runs/{path.resolve().name}"}
    keys |= {f"model.{key}": value for key, value in foreign.model.items()}
    keys |= {"data.path": _DATA, "train.global_batch_size": 1}
    keys |= {f"train.{key}": value for key, value in foreign.train.items()}
    if not keys.keys() & {"train.steps", "train.samples"}:
        keys["train.steps"] = _STEPS
    return keys | {"train.precision": foreign.precision}


def _without_overridden_choices(tree: Tree, source: str) -> Tree:
    """Returns the tree without keys of the model that exclude a key of the command line.

    source: the origin that the tree records for the model's own keys.
    """
    kept = {name: group.value for name, group in tree.value.items()}
    for name, exclusive in (("train", ("steps", "samples")), ("data", ("path", "blend"))):
        group = kept[name]
        if isinstance(group, dict) and all(key in group for key in exclusive):
            kept[name] = {
                key: value
                for key, value in group.items()
                if key not in exclusive or value.location != source
            }
    return Tree(
        {name: Tree(value, tree.value[name].location) for name, value in kept.items()}, source
    )


def _tree(keys: dict[str, object], source: str) -> Tree:
    """Returns the tree of dotted keys, which all come from `source`."""
    tree = Tree({}, source)
    for key, value in keys.items():
        if isinstance(value, list):
            value = [Tree(item, source) for item in value]
        tree = tree.merged_with(tree_at(key.split("."), Tree(value, source)))
    return tree


def _lines(group: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the lines of a group of keys as YAML, with comments on keys that a user may change."""
    indent = "  " * prefix.count(".")
    for name, value in group.items():
        key = prefix + name
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, f"{key}.")
            continue
        line = f"{indent}{name}: {_value(value)}"
        yield f"{line:42}  # {_COMMENTS[key]}" if key in _COMMENTS else line


def _value(value: object) -> str:
    """Returns a value as YAML on one line."""
    if isinstance(value, dict | list):  # JSON is YAML, on one line however deep
        return json.dumps(value)
    return inline_yaml(value)
