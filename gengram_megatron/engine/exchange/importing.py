"""Imports a model of another format: writes a checkpoint of its weights at step 0, from which a run
can start."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.config.layout import check_model
from gengram_megatron.config.schema import Config, Model
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.engine.checkpoint import weights_only
from gengram_megatron.engine.exchange import huggingface_settings, megatron_arguments
from gengram_megatron.engine.exchange.huggingface import (
    DTYPES,
    check_expressible,
    check_installed,
)
from gengram_megatron.engine.exchange.huggingface_files import open_files, read_json
from gengram_megatron.engine.exchange.megatron import NEWEST, find_megatron, open_megatron
from gengram_megatron.engine.exchange.megatron_other_arguments import argument_warnings
from gengram_megatron.engine.exchange.names import (
    EMBEDDING,
    OUTPUT,
    huggingface_weights,
    is_fused_experts,
    megatron_weights,
)
from gengram_megatron.engine.exchange.settings import Difference, refuse_differences
from gengram_megatron.engine.exchange.weights import WRONG_MODEL_HINT, Weight
from gengram_megatron.errors import UserError, print_message
from gengram_megatron.runs.store import (
    FACTS,
    FORMAT,
    CheckpointStore,
    Facts,
    check_readable,
    checkpoints_at,
    reading,
)

HUGGINGFACE_CONFIG = "config.json"


@dataclass(frozen=True)
class ForeignModel:
    """A model of another format, before it is compared with a config.

    names: the names of its tensors. read: returns one unsharded tensor. embedding: the name of the
    input embedding.
    weights: the mapping of our tensors to the foreign ones, for a model.
    differences: the settings that affect the logits and differ from a config.
    model, train: the keys below `model.` and `train.` of a config for it, as far as it states them.
    unused: the names of tensors that the model of a config does not use.
    warnings: sentences for the user.
    """

    path: Path
    names: set[str]
    read: Callable[[str], Tensor]
    embedding: str
    weights: Callable[[Model], list[Weight]]
    differences: Callable[[Config], list[Difference]]
    model: dict[str, object]
    train: dict[str, object] = field(default_factory=dict)
    unused: Callable[[Model], set[str]] = lambda model: set()
    warnings: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """The train.precision for the dtype of the weights: fp32 for float32, otherwise bf16."""
        if self.embedding not in self.names:
            raise UserError(
                f"{self.path} lacks {self.embedding}: it is not a decoder that can be imported"
            )
        with reading(self.path):
            return "fp32" if self.read(self.embedding).dtype == torch.float32 else "bf16"


def import_model(path: Path, config: Config) -> Path:
    """Writes the first checkpoint of config.run.dir and returns its path.

    Only one tensor is in RAM at a time. Raises UserError if the model is not that of the config;
    nothing is left in run.dir then.
    """
    return import_foreign(open_foreign(path), config)


def open_foreign(path: Path) -> ForeignModel:
    """Opens a model.

    Raises UserError if `path` has no model of a known format or its files cannot be read.
    """
    with reading(path):
        if (path / HUGGINGFACE_CONFIG).is_file():
            return _huggingface(path)
        if not (path / FACTS).is_file() and (folder := find_megatron(path)):
            return _megatron(folder)
    raise UserError(_describe_missing_model(path))


def _describe_missing_model(path: Path) -> str:
    """Returns a sentence on why a path has no model of a known format."""
    if not path.exists():
        return f"{path.absolute()} does not exist: download the model, or correct the path"
    if not path.is_dir():
        return f"{path} is a file: give the folder of the model"
    if checkpoints_at(path):
        return (
            f"{path} holds checkpoints of this program: start a run from them with "
            f"checkpoint.load={path}"
        )
    if (path / NEWEST).is_file():
        iteration = (path / NEWEST).read_text(errors="replace").strip()
        return (
            f"{path / NEWEST} names iteration {iteration[:20]!r}, and {path} has no complete "
            "checkpoint of it: give the folder of one iteration, such as iter_0001000"
        )
    return (
        f"{path} is neither a transformers model, with a {HUGGINGFACE_CONFIG}, nor a Megatron-LM "
        f"checkpoint, with a {NEWEST} or the files of one iteration"
    )


def import_foreign(foreign: ForeignModel, config: Config) -> Path:
    """Does the same as import_model, for a model that is already open."""
    store = CheckpointStore(Path(config.run.dir) / "checkpoints")
    if store.newest():
        raise UserError(f"{store.folder} already holds checkpoints; give another run.dir")
    check_model(config)
    refuse_differences(foreign.path, foreign.differences(config))
    weights = {weight.key: weight for weight in foreign.weights(config.model)}
    _check_names(foreign, config.model, list(weights.values()))
    if unused := sorted(foreign.unused(config.model)):
        print_message(
            f"warning: {len(unused)} Gengram tensors are left out, because model.gengram.layers is "
            f"{config.model.gengram.layers}: {unused[0]} and so on"
        )
    dtype, stored_dtypes = getattr(torch, DTYPES[config.train.dtype]), set()

    def read(name: str) -> Tensor:
        tensor = foreign.read(name)
        if tensor.is_floating_point():
            _check_finite(foreign.path, name, tensor)
        stored_dtypes.add(tensor.dtype)
        return tensor

    source = weights_only.Source(
        {key: weight.shape for key, weight in weights.items()},
        dict.fromkeys(weights, dtype),
        lambda key: weights[key].join(read, dtype),
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
    with _removed_if_empty(store.folder):
        checkpoint = weights_only.write(store, source, common, facts)
    _warn_of_conversion(stored_dtypes - {dtype}, dtype)
    return checkpoint


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raises UserError if a tensor has NaN or infinite values.

    Such a model predicts nothing, and training cannot repair it.
    """
    # aminmax returns NaN if there is any, without a boolean tensor of the same size in RAM.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(
            f"{path}: {name} holds values that are not finite (NaN or infinite), with which the "
            "model predicts nothing: give an earlier checkpoint, or download it again"
        )


def _warn_of_conversion(converted: set[torch.dtype], dtype: torch.dtype) -> None:
    """Warns that weights were converted to the run's dtype, which must not go unnoticed.

    converted: the dtypes of the weights that had to be converted.
    """
    if not converted:
        return
    names = " and ".join(sorted(str(one).removeprefix("torch.") for one in converted))
    if dtype == torch.bfloat16:  # float16, too, has more mantissa bits
        print_message(
            f"warning: {names} weights are rounded to bfloat16, the dtype that train.precision "
            "sets for weights"
        )
    else:
        print_message(
            f"warning: {names} weights are kept in float32, because train.precision is fp32; this "
            "adds no precision"
        )


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Removes the empty folders that were created for the checkpoint, after an error."""
    created = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    except BaseException:
        for one in created:
            with suppress(OSError):
                one.rmdir()
        raise


def _check_names(foreign: ForeignModel, model: Model, weights: list[Weight]) -> None:
    """Raises UserError unless the model has exactly the tensors that the config asks for."""
    expected = {part.name for weight in weights for part in weight.parts}
    names = foreign.names - foreign.unused(model)
    if missing := sorted(expected - names):
        raise UserError(f"{foreign.path} lacks {missing[0]}: {WRONG_MODEL_HINT}")
    if unexpected := sorted(names - expected):
        raise UserError(
            f"{foreign.path} holds {unexpected[0]}, which is not in the config's model: "
            f"{WRONG_MODEL_HINT}"
        )


def _huggingface(path: Path) -> ForeignModel:
    """Opens a transformers model."""
    check_installed()
    check_readable([path / HUGGINGFACE_CONFIG])
    hf_config = read_json(path / HUGGINGFACE_CONFIG)
    try:
        model = huggingface_settings.model_keys(hf_config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    names, read_stored = open_files(path)
    tied = huggingface_settings.has_tied_embeddings(hf_config)
    if tied and {EMBEDDING, OUTPUT} <= names and not _equal(read_stored, EMBEDDING, OUTPUT):
        raise UserError(
            f"{path / HUGGINGFACE_CONFIG} has tie_word_embeddings true, and the weights include "
            f"{OUTPUT}, which differs from {EMBEDDING} and is used by transformers from version 5 "
            f"on: set tie_word_embeddings to false if that is right, or remove {OUTPUT}"
        )

    def read(name: str) -> Tensor:
        return read_stored(EMBEDDING if tied and name == OUTPUT else name)

    def differences(config: Config) -> list[Difference]:
        check_expressible(config.model)
        return huggingface_settings.differences(hf_config, config)

    return ForeignModel(
        path,
        names | {OUTPUT} if tied else names,
        read,
        embedding=EMBEDDING,
        weights=partial(huggingface_weights, fused=any(map(is_fused_experts, names))),
        differences=differences,
        model=model,
        warnings=tuple(huggingface_settings.notes(hf_config)),
    )


def _equal(read: Callable[[str], Tensor], first: str, second: str) -> bool:
    return torch.equal(read(first), read(second))


def _megatron(folder: Path) -> ForeignModel:
    """Opens a Megatron-LM checkpoint."""
    check_readable(file for file in folder.rglob("*") if not file.is_dir())
    tensors = open_megatron(folder)

    def unused(model: Model) -> set[str]:
        """Returns the Gengram tensors of layers that do not use them.

        The published code has Gengram weights in every layer.
        """
        return {
            name
            for name in tensors.names
            if (match := re.match(r"decoder\.layers\.(\d+)\.gengram\.", name))
            and model.gengram.enabled
            and int(match[1]) + 1 not in model.gengram.layers
        }

    warnings = list(argument_warnings(tensors.arguments))
    if not tensors.arguments:
        warnings.append(
            f"{folder} lacks the arguments of the run that wrote it (args), so no setting was "
            "compared with the config except the shapes of the weights. Rotary base, norm epsilon, "
            "top-k, and Gengram's layers, window and token ids must be those of the training"
        )
    if tensors.skipped:
        warnings.append(
            f"{len(tensors.skipped)} tensors of multi-token prediction, which this program does "
            f"not support, are left out: {tensors.skipped[0]} and so on"
        )
    return ForeignModel(
        folder,
        tensors.names,
        tensors.read,
        embedding="embedding.word_embeddings.weight",
        weights=megatron_weights,
        differences=lambda config: megatron_arguments.differences(tensors.arguments, config),
        model=megatron_arguments.model_keys(tensors.arguments),
        train=megatron_arguments.train_keys(tensors.arguments),
        unused=unused,
        warnings=tuple(warnings),
    )
