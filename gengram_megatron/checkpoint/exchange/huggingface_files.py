"""The tensors of a folder of transformers, read one by one from its safetensors files."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from gengram_megatron.checkpoint.access import check_readable
from gengram_megatron.errors import UserError

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"


def open_files(folder: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    """The names of a folder's tensors, and what reads one of them whole.

    Those that the index names count, or model.safetensors, or, where there is neither, all.

    UserError: there are none, one that the index names is missing, a name is in two files, or there
    is model.safetensors, which transformers reads first, beside the files of an index.
    """
    index, one = folder / INDEX, folder / ONE_FILE
    check_readable(path for path in (index, one) if path.exists())
    if index.is_file():
        places = _indexed(index)
        if one.is_file() and set(places.values()) != {one}:
            raise UserError(
                f"{folder} holds its weights twice, in {ONE_FILE} and in the files that {INDEX} "
                "names, and they may differ: remove the wrong ones"
            )
    else:
        files = [one] if one.is_file() else sorted(folder.glob("*.safetensors"))
        places = _held(files)
    if not places:
        raise UserError(
            f"{folder} has no weights in safetensors, and files of other kinds, such as *.bin, are "
            "not read because they can run code: save the model with safe_serialization=True"
        )

    def read(name: str) -> Tensor:
        with _opened(places[name]) as tensors:
            return tensors.get_tensor(name)

    return set(places), read


def read_json(file: Path) -> dict:
    """UserError: what is there is not an object of JSON."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {type(found).__name__} where an object of JSON is needed")
    return found


def _indexed(index: Path) -> dict[str, Path]:
    """The file of each tensor, by the index; every file must have what the index says of it."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise UserError(f"{index} lacks weight_map, which says where each tensor lies")
    places = {name: index.parent / str(file) for name, file in named.items()}
    for file in sorted(set(places.values())):
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index} names {file.name}, which is missing: download it again")
        with _opened(file) as tensors:
            held = set(tensors.keys())
        if lost := sorted(name for name, at in places.items() if at == file and name not in held):
            raise UserError(f"{file} lacks {lost[0]}, which {index.name} says it holds")
    return places


def _held(files: list[Path]) -> dict[str, Path]:
    places: dict[str, Path] = {}
    check_readable(files)
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict, and not iterable)
                if name in places:
                    raise UserError(
                        f"{name} is in {places[name].name} and in {file.name}, and there is no "
                        f"{INDEX} to say which counts: remove the wrong file"
                    )
                places[name] = file
    return places


@contextmanager
def _opened(file: Path) -> Iterator:
    """A file of safetensors, open for reading."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
