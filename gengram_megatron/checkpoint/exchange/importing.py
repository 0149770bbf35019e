"""A model of another format as a checkpoint that a run starts from: its weights at step 0."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.checkpoint import weights_only
from gengram_megatron.checkpoint.access import check_readable, reading
from gengram_megatron.checkpoint.exchange.huggingface import (
    DTYPES,
    check_expressible,
    check_installed,
    model_config,
)
from gengram_megatron.checkpoint.exchange.megatron import (
    NEWEST,
    MegatronTensors,
    find_megatron,
    open_megatron,
)
from gengram_megatron.checkpoint.exchange.names import huggingface_weights, megatron_weights
from gengram_megatron.checkpoint.exchange.weights import Weight
from gengram_megatron.checkpoint.store import FORMAT, CheckpointStore, Facts
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.errors import UserError

HUGGINGFACE_CONFIG = "config.json"

# Of a model's config.json, what decides neither its weights nor what it computes.
_NO_MATTER = ("architectures", "auto_map", "dtype", "initializer_range", "max_position_embeddings",
              "router_aux_loss_coef", "rope_theta")  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """The tensors of another format by name, and where each of ours lies among them."""

    names: set[str]
    read: Callable[[str], Tensor]
    weights: list[Weight]


def import_model(path: Path, config: Config) -> Path:
    """Write the first checkpoint of config.run.dir; returns it. One tensor is in memory at a time.

    UserError: what is there is another model than the config's.
    """
    store = CheckpointStore(Path(config.run.dir) / "checkpoints")
    if store.newest():
        raise UserError(f"{store.folder} holds checkpoints already; give another run.dir")
    with reading(path):
        foreign = _open(path, config)
    _check_names(path, foreign)
    dtype = getattr(torch, DTYPES[config.train.dtype])
    weights = {weight.key: weight for weight in foreign.weights}
    source = weights_only.Source(
        {key: weight.shape for key, weight in weights.items()},
        dict.fromkeys(weights, dtype),
        lambda key: weights[key].join(foreign.read, dtype),
    )
    tables = kmer_tables(config.model.gengram) if config.model.gengram.enabled else ()
    facts = Facts(
        format=FORMAT,
        step=0,
        samples=0,
        seed=config.run.seed,
        layout={},
        tables={table.name: asdict(table) for table in tables},
    )
    common = {"config": config.model_dump(), "step": 0}
    return weights_only.write(store, source, common, facts)


def _open(path: Path, config: Config) -> Foreign:
    if (path / HUGGINGFACE_CONFIG).is_file():
        return _huggingface(path, config)
    if folder := find_megatron(path):
        return _megatron(folder, config)
    raise UserError(
        f"{path} is neither a model of transformers, with its {HUGGINGFACE_CONFIG}, nor a "
        f"checkpoint of Megatron-LM, with its {NEWEST} or the files of one iteration"
    )


def _check_names(path: Path, foreign: Foreign) -> None:
    """All that the config asks for is there, and nothing that it has no place for."""
    wanted = {part.name for weight in foreign.weights for part in weight.parts}
    if missing := sorted(wanted - foreign.names):
        raise UserError(f"{path} lacks {missing[0]}: give the config of the model that is there")
    if others := sorted(foreign.names - wanted):
        raise UserError(
            f"{path} holds {others[0]}, which the config has no place for: give the config of "
            "the model that is there"
        )


def _huggingface(path: Path, config: Config) -> Foreign:
    check_installed()
    check_expressible(config.model)
    weights = sorted(path.glob("*.safetensors"))
    check_readable([path / HUGGINGFACE_CONFIG, *weights])
    _check_settings(path, config)
    files = {}
    for file in weights:
        with _safetensors(file) as tensors:
            files |= dict.fromkeys(tensors.keys(), file)

    def read(name: str) -> Tensor:
        with _safetensors(files[name]) as tensors:
            return tensors.get_tensor(name)

    return Foreign(set(files), read, huggingface_weights(config.model))


@contextmanager
def _safetensors(file: Path) -> Iterator:
    """A file of safetensors, open for reading."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _check_settings(path: Path, config: Config) -> None:
    """What the shapes of the weights do not show, such as the base of the rotary embedding."""
    file = path / HUGGINGFACE_CONFIG
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    for name, value in json.loads(json.dumps(model_config(config))).items():
        if name not in _NO_MATTER and found.get(name) != value:
            raise UserError(
                f"{file} has {name} {found.get(name)!r}, and the config makes it {value!r}: give "
                "the config of the model that is there"
            )


def _megatron(folder: Path, config: Config) -> Foreign:
    check_readable(file for file in folder.rglob("*") if not file.is_dir())
    tensors, model = open_megatron(folder), config.model
    _check_arguments(folder, tensors, config)
    # The published code has the memory's weights in every layer, and uses them in some.
    unused = {
        name
        for name in tensors.names
        if (part := re.match(r"decoder\.layers\.(\d+)\.gengram\.", name))
        and model.gengram.enabled
        and int(part[1]) + 1 not in model.gengram.layers
    }
    return Foreign(tensors.names - unused, tensors.read, megatron_weights(model))


def _check_arguments(folder: Path, tensors: MegatronTensors, config: Config) -> None:
    """As far as the checkpoint holds its command line: what the shapes do not show."""
    model = config.model
    expected = {
        "num_attention_heads": model.num_attention_heads,
        "rotary_base": model.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "norm_epsilon": model.norm_epsilon,
        "normalization": "RMSNorm",
    }
    if model.attention == "mla":
        expected["rope_type"] = "rope"
    if model.num_experts is not None:
        expected |= {
            "moe_router_topk": model.moe_router_topk,
            "moe_router_pre_softmax": model.moe_router_topk == 1,
        }
    for name, value in expected.items():
        found = tensors.argument(name)
        if found is not None and found != value:
            raise UserError(
                f"{folder} was trained with {name} {found!r}, and the config makes it {value!r}: "
                "give the config of the model that is there"
            )
