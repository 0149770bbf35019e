"""Pickled files of others, read without running what they might hold.

Megatron-LM's checkpoints hold, beside tensors, the arguments of the run and random states, which
are objects of many classes. Those that are known to occur are replaced by an empty stand-in, which
keeps their plain values; a file that names anything else is refused.
"""

import pickle
from pathlib import Path

import torch

from gengram_megatron.errors import UserError

_REPLACED = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.", "signal.Signals", "_io.BytesIO",
    "collections.deque", "collections.defaultdict", "numpy.", "megatron.", "transformer_engine.",
    "builtins.getattr",  # so early Pythons 3.11 pickle members of enumerations
)  # fmt: skip


class StandIn:
    """Takes whatever its original was made from; attributes that are plain values can be read."""

    def __init__(self, *_, **__): ...

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def values_of(arguments: object) -> dict[str, object]:
    """The arguments of a run by name, which lie in a StandIn, in the Namespace itself where
    megatron-core has told torch to let it through, or in a dictionary; none where they are
    missing."""
    found = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
    return {str(name): value for name, value in found.items()}


def read_untrusted(path: Path) -> dict:
    """The content of a file of torch.save; its tensors stay on the disk until they are used."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if refused := [name for name in names if not name.startswith(_REPLACED)]:
            raise UserError(
                f"{path} is refused, as it would run {refused[0]}: save it without that object, "
                "with tensors and the arguments of the run alone"
            )
        with torch.serialization.safe_globals([(StandIn, name) for name in names]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): if it was cut off or changed, copy or "
            "download it again"
        ) from None
