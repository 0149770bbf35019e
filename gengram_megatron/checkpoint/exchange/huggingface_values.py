"""Whether the values of a config.json of transformers are of the kinds that they have to be.

Files come from many hands. A number in quotes or a group that is a list is named here, where it
would otherwise be found in the middle of a comparison.
"""

from collections.abc import Callable, Iterator

from gengram_megatron.errors import UserError


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
