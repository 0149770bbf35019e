"""Reads the files of a transformers model: config.json, whose values are checked for their types,
and the tensors, one by one from safetensors files.

The files come from many sources. A number in quotes, or a list in the place of an object, is
reported here; otherwise it would fail in the middle of a comparison.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import check_readable


def _is_positive_int(value: object) -> bool:
    return type(value) is int and value > 0


def _is_positive_number(value: object) -> bool:
    return _is_positive_int(value) or (type(value) is float and value > 0)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _are_positive_ints(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_positive_int, value))


def _are_tables(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(table, dict)
        and all(_is_positive_int(table.get(name)) for name in ("k", "rows", "columns"))
        for table in value
    )


_INT = "a whole number above 0"
_NUMBER = "a number above 0"
_OBJECT = "a JSON object"

_Check = tuple[Callable[[object], bool], str]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "num_local_experts",
            "num_experts_per_tok", "head_dim", "max_position_embeddings", "sliding_window",
        ),
        (_is_positive_int, _INT),
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "partial_rotary_factor"), (_is_positive_number, _NUMBER)
    ),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (_is_object, _OBJECT)),
}  # fmt: skip
_ROPE_CHECKS: dict[str, _Check] = dict.fromkeys(
    ("rope_theta", "partial_rotary_factor"), (_is_positive_number, _NUMBER)
)
_GENGRAM_CHECKS: dict[str, _Check] = {
    "layers": (_are_positive_ints, "a list of layers, from 1"),
    "tables": (_are_tables, "a list of tables, each with k, rows and columns"),
    **dict.fromkeys(("dim", "conv_kernel", "window"), (_is_positive_int, _INT)),
}


def check_values(hf_config: dict[str, Any]) -> None:
    """Raises UserError if a value of the parsed config.json is of the wrong type.

    Null is left to the code that reads the keys; for many of them it means the default.
    """
    if problem := next(_problems(hf_config), None):
        raise UserError(problem)


def _problems(hf_config: dict[str, Any]) -> Iterator[str]:
    """Yields a sentence for each value that is of the wrong type or missing."""
    yield from _wrong_values(hf_config, _CHECKS, "")
    for name in ("rope_parameters", "rope_scaling"):
        yield from _wrong_values(hf_config.get(name) or {}, _ROPE_CHECKS, f"{name}.")
    has_gengram = str(hf_config.get("model_type")).startswith("gengram_")
    if has_gengram and _is_object(hf_config.get("gengram")):
        gengram = hf_config["gengram"]
        yield from _wrong_values(gengram, _GENGRAM_CHECKS, "gengram.")
        for name in ("layers", "tables", "dim"):
            if gengram.get(name) is None:
                yield f"config.json lacks gengram.{name}, which defines what Gengram computes"


def _wrong_values(group: dict[str, Any], checks: dict[str, _Check], prefix: str) -> Iterator[str]:
    for name, (is_valid, description) in checks.items():
        if (value := group.get(name)) is not None and not is_valid(value):
            yield f"config.json has {prefix}{name} {value!r}; it must be {description}"


INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def open_files(folder: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    """Returns the names of a folder's tensors, and a function that reads a whole tensor by name.

    The files are those that the index lists; without an index, model.safetensors; without either,
    all *.safetensors files.

    Raises UserError if there are no files, if a file that the index lists is missing, if a name is
    in two files, or if the folder has both model.safetensors, which transformers prefers, and the
    files of an index.
    """
    index, single = folder / INDEX, folder / SINGLE_FILE
    check_readable(path for path in (index, single) if path.exists())
    if index.is_file():
        tensor_files = _files_by_index(index)
        if single.is_file() and set(tensor_files.values()) != {single}:
            raise UserError(
                f"{folder} holds its weights twice, in {SINGLE_FILE} and in the files that {INDEX} "
                "lists, and they may differ: remove the wrong ones"
            )
    else:
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        tensor_files = _files_by_content(files)
    if not tensor_files:
        raise UserError(
            f"{folder} has no weights in safetensors files, and other files, such as *.bin, are "
            "not read because they can run code: save the model with safe_serialization=True"
        )

    def read(name: str) -> Tensor:
        with _open_safetensors(tensor_files[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    return set(tensor_files), read


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises UserError if it is anything else."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds a value of type {type(content).__name__} where a JSON object is needed"
        )
    return content


def _files_by_index(index: Path) -> dict[str, Path]:
    """Returns the file of each tensor that the index lists.

    Raises UserError if a file is missing or lacks one of its tensors.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} lacks weight_map, which lists the file of each tensor")
    tensor_files = {name: index.parent / str(file) for name, file in weight_map.items()}
    for file in sorted(set(tensor_files.values())):
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index} lists {file.name}, which is missing: download it again")
        with _open_safetensors(file) as tensors:
            stored = set(tensors.keys())
        if missing := sorted(
            name for name, other in tensor_files.items() if other == file and name not in stored
        ):
            raise UserError(f"{file} lacks {missing[0]}, which {index.name} says it holds")
    return tensor_files


def _files_by_content(files: list[Path]) -> dict[str, Path]:
    """Returns the file of each tensor, without an index; no name may be in two files."""
    tensor_files: dict[str, Path] = {}
    check_readable(files)
    for file in files:
        with _open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict, and not iterable)
                if name in tensor_files:
                    raise UserError(
                        f"{name} is in {tensor_files[name].name} and in {file.name}, and there is "
                        f"no {INDEX} to say which one to use: remove the wrong file"
                    )
                tensor_files[name] = file
    return tensor_files


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    """Opens a safetensors file for reading; raises UserError if that fails."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): if it was cut off or changed, download it again"
        ) from None
