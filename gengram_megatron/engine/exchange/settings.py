"""What decides the logits of a model besides its weights, in another format and in our config.

A setting that differs would let weights load that then compute something else. All differences
are told at once, with the values of both sides.
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
    """One setting that the model which is there has otherwise than the config.

    name, theirs: in the other format. key: ours, or None where no key of the config can say what
    is there. ours: what the config makes of it.
    """

    name: str
    theirs: object
    key: str | None
    ours: object


@dataclass(frozen=True)
class Wanted:
    """A setting of another format, its value, and the key below `model.` that says it here, with
    the key's value."""

    name: str
    theirs: object
    key: str
    value: object


def value_of(model: Model, key: str) -> object:
    """The value of a key below `model.`, with dots."""
    return attrgetter(key)(model)


def refuse(path: Path, differences: list[Difference]) -> None:
    """UserError with a table of all differences, if there are any."""
    if not differences:
        return
    rows = [("there", "value there", "key here", "value here")]
    for one in differences:
        rows.append((one.name, shown(one.theirs), one.key or "no key for it", shown(one.ours)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )
    remedies = []
    if any(one.key for one in differences):
        remedies.append(
            "set the keys to the values that are there, or let --print-config write the config of "
            "this model"
        )
    if not all(one.key for one in differences):
        remedies.append(
            "a model with a setting that has no key here cannot be imported: this program always "
            "computes with the value here"
        )
    remedy = "\n".join(remedies)
    raise UserError(
        f"{path} holds another model than the config's; its weights would load and compute "
        f"something else:\n{table}\n{remedy}"
    )


def shown(value: object) -> str:
    """A value of an argument or a key on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict | float):
        return json.dumps(value)
    return inline_yaml(list(value) if isinstance(value, tuple) else value)
