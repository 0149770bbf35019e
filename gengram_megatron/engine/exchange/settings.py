"""Settings, other than the weights, that decide a model's logits: foreign values against ours.

If such a setting differed, the weights would load and compute something else. All differences are
therefore reported at once, with the values of both sides.
"""

import json
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from gengram_megatron.config.schema import Model
from gengram_megatron.config.tree import inline_yaml
from gengram_megatron.errors import UserError


@dataclass(frozen=True)
class Difference:
    """One setting in which the foreign model differs from the config.

    name, foreign_value: the setting in the other format. key: our key, or None if no key of the
    config can express the setting. our_value: the value that the config leads to.
    """

    name: str
    foreign_value: object
    key: str | None
    our_value: object


@dataclass(frozen=True)
class MappedSetting:
    """A setting of another format with its value, and the key below `model.` that expresses it,
    with the value that the key must have."""

    name: str
    foreign_value: object
    key: str
    value: object


def value_of(model: Model, key: str) -> object:
    """Returns the value of a dotted key below `model.`."""
    return attrgetter(key)(model)


def refuse_differences(path: Path, differences: list[Difference]) -> None:
    """Raises UserError with a table of all differences, if there are any."""
    if not differences:
        return
    rows = [("model setting", "model value", "config key", "config value")]
    for one in differences:
        rows.append(
            (
                one.name,
                format_value(one.foreign_value),
                one.key or "no key for it",
                format_value(one.our_value),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )
    remedies = []
    if any(one.key for one in differences):
        remedies.append(
            "set the keys to the model's values, or let --print-config write a config for this "
            "model"
        )
    if not all(one.key for one in differences):
        remedies.append(
            "a model that differs in a setting without a key cannot be imported: this program "
            "always computes with the value in the last column"
        )
    remedy = "\n".join(remedies)
    raise UserError(
        f"{path} holds a different model from the config's; its weights would load and compute "
        f"something else:\n{table}\n{remedy}"
    )


def format_value(value: object) -> str:
    """Returns the value of an argument or a key as text on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict | float):
        return json.dumps(value)
    return inline_yaml(list(value) if isinstance(value, tuple) else value)
