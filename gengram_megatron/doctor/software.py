"""Versions, as the installed packages' own descriptions give them: nothing is imported here."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from gengram_megatron.doctor.ask import try_import

NEEDED = ("torch", "megatron-core")
OPTIONAL = {
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "apex",
    "deepspeed": "deepspeed",
    "flash-attn": "flash_attn",
    "triton": "triton",
}
"""Their names for pip, and what is imported of each."""


def software(try_imports: bool) -> dict[str, dict]:
    """Version of each package (None: not installed), and why it cannot be imported (None: it can,
    or was not tried)."""
    found = {"python": {"version": platform.python_version(), "error": None}}
    for name in NEEDED:
        found[name] = {"version": _version(name), "error": None}
    for name, package in OPTIONAL.items():
        there = _version(name)
        if there is None and find_spec(package.split(".")[0]):
            there = "unknown"  # put on the path without being installed
        found[name] = {"version": there, "error": None}
        if there and try_imports:
            found[name]["error"] = try_import(package)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
