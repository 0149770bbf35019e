"""The files of a folder of transformers: its config.json, whose values are checked to be of the
kinds that they have to be, and its tensors, read one by one from safetensors files.

Files come from many hands. A number in quotes or a group that is a list is named here, where it
would otherwise be found in the middle of a comparison.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import check_readable


def _is_whole(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and value > 0


def _is_group(value: object) -> bool:
    return isinstance(value, dict)


def _are_whole(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _are_tables(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and all(_is_whole(one.get(name)) for name in ("k", "rows", "columns"))
        for one in value
    )


_WHOLE = "a whole number above 0"
_NUMBER = "a number above 0"
_GROUP = "an object of JSON"

_Kind = tuple[Callable[[object], bool], str]
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "num_local_experts",
            "num_experts_per_tok", "head_dim", "max_position_embeddings", "sliding_window",
        ),
        (_is_whole, _WHOLE),
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "partial_rotary_factor"), (_is_number, _NUMBER)
    ),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (_is_group, _GROUP)),
}  # fmt: skip
_KINDS_OF_ROPE: dict[str, _Kind] = dict.fromkeys(
    ("rope_theta", "partial_rotary_factor"), (_is_number, _NUMBER)
)
_KINDS_OF_MEMORY: dict[str, _Kind] = {
    "layers": (_are_whole, "a list of layers, from 1"),
    "tables": (_are_tables, "a list of tables, with k, rows and columns of each"),
    **dict.fromkeys(("dim", "conv_kernel", "window"), (_is_whole, _WHOLE)),
}


def check_values(found: dict) -> None:
    """UserError: a value of config.json, as parsed, is not of the kind that its key has.

    Null is left to those who read the keys: to many of them it says the default.
    """
    if problem := next(_problems(found), None):
        raise UserError(problem)


def _problems(found: dict) -> Iterator[str]:
    yield from _wrong(found, _KINDS, "")
    for name in ("rope_parameters", "rope_scaling"):
        yield from _wrong(found.get(name) or {}, _KINDS_OF_ROPE, f"{name}.")
    if str(found.get("model_type")).startswith("gengram_") and _is_group(found.get("gengram")):
        memory = found["gengram"]
        yield from _wrong(memory, _KINDS_OF_MEMORY, "gengram.")
        for name in ("layers", "tables", "dim"):
            if memory.get(name) is None:
                yield f"config.json lacks gengram.{name}, which says what its memory computes"


def _wrong(group: dict, kinds: dict[str, _Kind], prefix: str) -> Iterator[str]:
    for name, (fits, kind) in kinds.items():
        if (value := group.get(name)) is not None and not fits(value):
            yield f"config.json has {prefix}{name} {value!r}; it must be {kind}"


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
        raise UserError(
            f"{file} cannot be read ({error}): if it was cut off or changed, download it again"
        ) from None
