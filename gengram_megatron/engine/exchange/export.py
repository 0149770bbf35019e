"""Exports a checkpoint to a folder that transformers can load, one tensor at a time."""

import json
import math
import os
import shutil
from pathlib import Path

from gengram_megatron.engine.checkpoint.stored import StoredTensors, read_config
from gengram_megatron.engine.exchange.card import model_card
from gengram_megatron.engine.exchange.huggingface import (
    check_expressible,
    check_installed,
    write_description,
)
from gengram_megatron.engine.exchange.names import huggingface_weights
from gengram_megatron.engine.exchange.weights import SafetensorsFile, Weight
from gengram_megatron.errors import UserError
from gengram_megatron.files import flush

LARGEST_FILE = 5 * 10**9
"""The most bytes of weights in one file."""


def export(checkpoint: Path, out: Path, largest_file: int = LARGEST_FILE) -> None:
    """Writes the folder `out`, which must not exist yet.

    Only one tensor of the checkpoint is in RAM at a time, plus a copy of one of its parts if that
    is not contiguous in it. Raises UserError if the model cannot be exported or `out` exists or
    cannot be written.
    """
    check_installed()
    config = read_config(checkpoint)
    check_expressible(config.model)
    stored, weights = StoredTensors(checkpoint), huggingface_weights(config.model)
    missing = [weight.key for weight in weights if weight.key not in stored.names]
    if missing:
        raise UserError(f"{checkpoint} cannot be exported: it lacks {missing[0]}")
    if extra := set(stored.weights) - {weight.key for weight in weights}:
        raise UserError(
            f"{checkpoint} cannot be exported: an export would leave out {min(extra)}, which the "
            "other format has no place for"
        )
    if out.exists():
        raise UserError(f"{out} already exists; give another folder")
    card = model_card(checkpoint, config)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, stored, weights, largest_file)
        write_description(partial, config)
        (partial / "README.md").write_text(card)
        for path in (*partial.iterdir(), partial):
            flush(path)
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(folder: Path, stored: StoredTensors, weights: list[Weight], limit: int) -> None:
    tensors = {
        part.name: (part.shape, stored.dtype(weight.key))
        for weight in weights
        for part in weight.parts
    }
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    file_names = _assign_files(sizes, limit)
    files = {
        file: SafetensorsFile(
            folder / file, {name: tensors[name] for name in tensors if file_names[name] == file}
        )
        for file in dict.fromkeys(file_names.values())
    }
    for weight in weights:
        _write_weight(
            weight, stored, {part.name: files[file_names[part.name]] for part in weight.parts}
        )
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_weight(weight: Weight, stored: StoredTensors, files: dict[str, SafetensorsFile]) -> None:
    """Writes the parts of one weight.

    This is a separate function because a loop variable would keep the tensor alive while the next
    one is read.
    """
    for name, tensor in weight.split(stored.read(weight.key)):
        files[name].write(name, tensor)


def _assign_files(sizes: dict[str, int], limit: int) -> dict[str, str]:
    """Returns the file name for each tensor; files are filled in order.

    A file stays within `limit` bytes unless a single tensor is larger.
    """
    number, filled, file_numbers = 1, 0, {}
    for name, size in sizes.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        filled += size
        file_numbers[name] = number
    if number == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {
        name: f"model-{file_number:05d}-of-{number:05d}.safetensors"
        for name, file_number in file_numbers.items()
    }
