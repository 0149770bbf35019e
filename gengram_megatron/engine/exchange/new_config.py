"""A config for a model of another format: what it says of itself, as a file of ours."""

import json
from collections.abc import Iterator
from pathlib import Path

from gengram_megatron.config.layout import check_model
from gengram_megatron.config.load import check_tree, tree_at, with_overrides
from gengram_megatron.config.schema import Config, Model
from gengram_megatron.config.tree import Tree, inline_yaml, parse_yaml
from gengram_megatron.engine.exchange.importing import Foreign
from gengram_megatron.engine.exchange.settings import refuse
from gengram_megatron.errors import UserError

_NEEDED = tuple(name for name, key in Model.model_fields.items() if key.is_required())
_STEPS = 1000
_DATA = "datasets/mine"
_COMMENTS = {
    "run.dir": "the folder of the run, relative to the current one",
    "model.seq_length": "bases a sample of the new run",
    "data.path": "CHOOSE what gengram-data build wrote, relative to the current folder",
    "train.global_batch_size": "samples a step, over all processes",
    "train.micro_batch_size": "samples of one forward pass; more of them need more memory",
    "train.steps": "CHOOSE how long the new run trains; it starts at step 0",
    "train.samples": "CHOOSE how long the new run trains; it starts at step 0",
    "train.precision": "of weights and activations",
}


def new_config(path: Path, foreign: Foreign, overrides: list[str]) -> tuple[str, Config]:
    """The text of a config file for a model, and the config that it stands for.

    path: as the user named the model; the run is named for it. overrides: `key=value` words, which
    win over what the model says of itself.

    Raises UserError: the model or the words lack a key; the model computes what no config, or
    not this one, can say.
    """
    place = str(foreign.path)
    tree, problems = with_overrides(_tree(_wanted(path, foreign), place), overrides)
    tree = _without_other_choice(tree, place)
    model = tree.nearest(("model",))
    missing = [key for key in _NEEDED if model.nearest((key,)) is model]
    if missing and not problems:
        words = " ".join(f"model.{key}=..." for key in missing)
        raise UserError(
            f"{foreign.path} does not say of its model what a config needs: add {words}, or give "
            "the CONFIG of the model that is there"
        )
    config = check_tree(tree, Path(path), Config, problems)
    check_model(config)
    refuse(foreign.path, foreign.differences(config))
    plain = tree.plain()
    if config.data.tokenizer is not None:  # for the file may lie in another folder
        plain["data"]["tokenizer"] = config.data.tokenizer
    lines = "\n".join(_lines(plain))
    text = f"""\
# The model of {foreign.path}, for a run that starts from its weights.
# All other keys have their defaults; `gengram config --keys` lists them.
{lines}
"""
    return text, check_tree(parse_yaml(text, str(path)), Path(path), Config)


def _wanted(path: Path, foreign: Foreign) -> dict[str, object]:
    """Keys with dots, in the order of a file."""
    found = {"run.dir": f"runs/{path.resolve().name}"}
    found |= {f"model.{key}": value for key, value in foreign.model.items()}
    found |= {"data.path": _DATA, "train.global_batch_size": 1}
    found |= {f"train.{key}": value for key, value in foreign.train.items()}
    if not found.keys() & {"train.steps", "train.samples"}:
        found["train.steps"] = _STEPS
    return found | {"train.precision": foreign.precision}


def _without_other_choice(tree: Tree, place: str) -> Tree:
    """Of keys that exclude each other, those of the command line without those from `place`."""
    kept = {name: group.value for name, group in tree.value.items()}
    for name, keys in (("train", ("steps", "samples")), ("data", ("path", "blend"))):
        group = kept[name]
        if isinstance(group, dict) and all(key in group for key in keys):
            kept[name] = {
                key: value
                for key, value in group.items()
                if key not in keys or value.place != place
            }
    return Tree({name: Tree(value, tree.value[name].place) for name, value in kept.items()}, place)


def _tree(keys: dict[str, object], place: str) -> Tree:
    tree = Tree({}, place)
    for key, value in keys.items():
        if isinstance(value, list):
            value = [Tree(item, place) for item in value]
        tree = tree.merged_with(tree_at(key.split("."), Tree(value, place)))
    return tree


def _lines(group: dict, prefix: str = "") -> Iterator[str]:
    """A group of keys as YAML, with comments where a person may want to choose."""
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
    if isinstance(value, dict | list):  # JSON is YAML, on one line however deep
        return json.dumps(value)
    return inline_yaml(value)
