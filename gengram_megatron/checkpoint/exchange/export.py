"""A checkpoint as a folder that transformers loads: tensor by tensor, never the whole model."""

import json
import math
import os
import shutil
from pathlib import Path

import torch

from gengram_megatron.checkpoint.exchange.card import model_card
from gengram_megatron.checkpoint.exchange.huggingface import (
    check_expressible,
    check_installed,
    write_description,
)
from gengram_megatron.checkpoint.exchange.names import huggingface_weights
from gengram_megatron.checkpoint.exchange.weights import Weight
from gengram_megatron.checkpoint.stored import StoredTensors, read_config
from gengram_megatron.errors import UserError
from gengram_megatron.files import flush

LARGEST_FILE = 5 * 10**9
"""Bytes of weights in one file."""


def export(checkpoint: Path, out: Path, largest_file: int = LARGEST_FILE) -> None:
    """Write `out`, which must not exist yet. At most one file's weights, and the parts of one
    tensor of the checkpoint, are in memory at a time."""
    check_installed()
    config = read_config(checkpoint)
    check_expressible(config.model)
    stored, weights = StoredTensors(checkpoint), huggingface_weights(config.model)
    missing = [weight.key for weight in weights if weight.key not in stored.names]
    if missing:
        raise UserError(f"{checkpoint} cannot be exported: it lacks {missing[0]}")
    if out.exists():
        raise UserError(f"{out} is there already; give another folder")
    card = model_card(checkpoint, config)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, stored, weights, largest_file)
        write_description(partial, config)
        (partial / "README.md").write_text(card)
        _share(partial)
        for path in (*partial.iterdir(), partial):
            flush(path)
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _share(folder: Path) -> None:
    """Let those read the files who may read the folder: the umask decided that, and safetensors
    writes files that only their owner may read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)


def _write_weights(folder: Path, stored: StoredTensors, weights: list[Weight], limit: int) -> None:
    sizes = {
        part.name: math.prod(part.shape) * stored.dtype(weight.key).itemsize
        for weight in weights
        for part in weight.parts
    }
    files = _files(sizes, limit)
    left = {name: list(files.values()).count(name) for name in files.values()}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for weight in weights:
        for name, tensor in weight.split(stored.read(weight.key)):
            file = files[name]
            waiting.setdefault(file, {})[name] = tensor
            left[file] -= 1
            if not left[file]:
                _save(waiting.pop(file), folder / file)
    if len(left) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, too, is one of these and no OSError
        raise UserError(f"{file} cannot be written: {error}") from None


def _files(sizes: dict[str, int], limit: int) -> dict[str, str]:
    """The file of each tensor: filled one after the other, up to the limit."""
    number, filled, places = 1, 0, {}
    for name, size in sizes.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        filled += size
        places[name] = number
    if number == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {
        name: f"model-{place:05d}-of-{number:05d}.safetensors" for name, place in places.items()
    }
