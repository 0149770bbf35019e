"""Reads pickled files from untrusted sources without running code that they might hold.

Besides tensors, Megatron-LM's checkpoints hold the arguments of the run and random number states,
which are objects of many classes. Classes that are known to occur are replaced by an empty
stand-in, which keeps their plain values; a file that names any other class is refused.
"""

import pickle
from pathlib import Path

import torch

from gengram_megatron.errors import UserError

_REPLACED = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.", "signal.Signals", "_io.BytesIO",
    "collections.deque", "collections.defaultdict", "numpy.", "megatron.", "transformer_engine.",
    "builtins.getattr",  # early releases of Python 3.11 pickle enum members with it
)  # fmt: skip


class StandIn:
    """Accepts whatever the original class was built from; its plain attributes can be read."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def values_of(arguments: object) -> dict[str, object]:
    """Returns the arguments of a run by name; an empty dict if there are none.

    They are stored in a StandIn, in a dictionary, or in a Namespace, which torch loads as it is
    once megatron-core has registered the class as safe.
    """
    values = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
    return {str(name): value for name, value in values.items()}


def read_untrusted(path: Path) -> object:
    """Returns the content of a file written by torch.save; its tensors stay on disk until used.

    The content may be of any type. Raises UserError if the file would run code or cannot be read.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if refused := [name for name in names if not name.startswith(_REPLACED)]:
            raise UserError(
                f"{path} is refused, as it would run {refused[0]}: save it without that object, "
                "with nothing but tensors and the arguments of the run"
            )
        with torch.serialization.safe_globals([(StandIn, name) for name in names]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): if it was cut off or changed, "
            "copy or download it again"
        ) from None
