"""A model of another format as a checkpoint that a run starts from: its weights at step 0."""

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
    is_joined,
    megatron_weights,
)
from gengram_megatron.engine.exchange.settings import Difference, refuse
from gengram_megatron.engine.exchange.weights import OTHER_MODEL, Weight
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
class Foreign:
    """A model of another format, before any config is compared with it.

    names: of its tensors. read: one whole tensor. embedding: the name of the input embedding.
    weights: where each of our tensors lies among them.
    differences: all that it says otherwise than a config of what it computes.
    model, train: keys below `model.` and `train.` of a config for it, as far as it says them.
    unused: tensors that are there and that the model which a config describes does not use.
    warnings: sentences for the person who imports it.
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
        """The value of train.precision with which a run keeps its weights as they are."""
        if self.embedding not in self.names:
            raise UserError(f"{self.path} lacks {self.embedding}: it is not a decoder of this kind")
        with reading(self.path):
            return "fp32" if self.read(self.embedding).dtype == torch.float32 else "bf16"


def import_model(path: Path, config: Config) -> Path:
    """Write the first checkpoint of config.run.dir; returns it. One tensor is in memory at a time.

    UserError: what is there is another model than the config's. Nothing is left in run.dir then.
    """
    return import_foreign(open_foreign(path), config)


def open_foreign(path: Path) -> Foreign:
    """UserError: there is no model of a known format, or its files cannot be read."""
    with reading(path):
        if (path / HUGGINGFACE_CONFIG).is_file():
            return _huggingface(path)
        if not (path / FACTS).is_file() and (folder := find_megatron(path)):
            return _megatron(folder)
    raise UserError(_why_no_model(path))


def _why_no_model(path: Path) -> str:
    """What is wrong with a path at which no model of a known format is, in a sentence."""
    if not path.exists():
        return f"{path.absolute()} is not there: download the model, or correct the path"
    if not path.is_dir():
        return f"{path} is a file: give the folder of the model"
    if any((one / FACTS).is_file() for one in (path, *checkpoints_at(path))):
        return (
            f"{path} holds checkpoints of this program: start from them with checkpoint.load={path}"
        )
    if (path / NEWEST).is_file():
        named = (path / NEWEST).read_text(errors="replace").strip()
        return (
            f"{path / NEWEST} names iteration {named[:20]!r}, and {path} has no whole checkpoint of "
            "it: give the folder of one iteration, such as iter_0001000"
        )
    return (
        f"{path} is neither a model of transformers, with its {HUGGINGFACE_CONFIG}, nor a "
        f"checkpoint of Megatron-LM, with its {NEWEST} or the files of one iteration"
    )


def import_foreign(foreign: Foreign, config: Config) -> Path:
    """As import_model, of a model that has been opened."""
    store = CheckpointStore(Path(config.run.dir) / "checkpoints")
    if store.newest():
        raise UserError(f"{store.folder} holds checkpoints already; give another run.dir")
    check_model(config)
    refuse(foreign.path, foreign.differences(config))
    weights = {weight.key: weight for weight in foreign.weights(config.model)}
    _check_names(foreign, config.model, list(weights.values()))
    if unused := sorted(foreign.unused(config.model)):
        print_message(
            f"warning: {len(unused)} tensors of memory are left out, as model.gengram.layers is "
            f"{config.model.gengram.layers}: {unused[0]} and so on"
        )
    dtype, stored = getattr(torch, DTYPES[config.train.dtype]), set()

    def read(name: str) -> Tensor:
        tensor = foreign.read(name)
        if tensor.is_floating_point():
            _check_finite(foreign.path, name, tensor)
        stored.add(tensor.dtype)
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
        written = weights_only.write(store, source, common, facts)
    _tell_of_conversion(stored - {dtype}, dtype)
    return written


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """UserError: a model with such a weight predicts nothing, and no training mends it."""
    # NaN is the least and the greatest of all; a tensor of truth values would take memory.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(
            f"{path}: {name} holds numbers that are not finite (NaN or infinite): these weights "
            "predict nothing; give a checkpoint from before, or download it again"
        )


def _tell_of_conversion(there: set[torch.dtype], here: torch.dtype) -> None:
    """Weights in another precision than the run's are converted, which must not go unseen.

    there: the dtypes of weights that had to be converted.
    """
    if not there:
        return
    names = " and ".join(sorted(str(one).removeprefix("torch.") for one in there))
    if here == torch.bfloat16:  # float16 has more digits, too
        print_message(
            f"warning: weights that are {names} there are rounded to bfloat16, because "
            "train.precision keeps them so here"
        )
    else:
        print_message(
            f"warning: weights that are {names} there are kept in float32, because "
            "train.precision is fp32; they gain no digits by it"
        )


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """After an error, folders that were made for what could not be written are removed again."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    except BaseException:
        for one in made:
            with suppress(OSError):
                one.rmdir()
        raise


def _check_names(foreign: Foreign, model: Model, weights: list[Weight]) -> None:
    """All that the config asks for is there, and nothing that it has no place for."""
    wanted = {part.name for weight in weights for part in weight.parts}
    names = foreign.names - foreign.unused(model)
    if missing := sorted(wanted - names):
        raise UserError(f"{foreign.path} lacks {missing[0]}: {OTHER_MODEL}")
    if others := sorted(names - wanted):
        raise UserError(
            f"{foreign.path} holds {others[0]}, which the config has no place for: {OTHER_MODEL}"
        )


def _huggingface(path: Path) -> Foreign:
    check_installed()
    check_readable([path / HUGGINGFACE_CONFIG])
    found = read_json(path / HUGGINGFACE_CONFIG)
    try:
        wanted = huggingface_settings.wanted_model(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    names, read_stored = open_files(path)
    tied = huggingface_settings.tied(found)
    if tied and {EMBEDDING, OUTPUT} <= names and not _equal(read_stored, EMBEDDING, OUTPUT):
        raise UserError(
            f"{path / HUGGINGFACE_CONFIG} has tie_word_embeddings true, and there is a {OUTPUT} "
            f"other than {EMBEDDING}, which transformers uses from version 5 on: set it to false "
            f"if that is right, or remove {OUTPUT}"
        )

    def read(name: str) -> Tensor:
        return read_stored(EMBEDDING if tied and name == OUTPUT else name)

    def differences(config: Config) -> list[Difference]:
        check_expressible(config.model)
        return huggingface_settings.differences(found, config)

    return Foreign(
        path,
        names | {OUTPUT} if tied else names,
        read,
        embedding=EMBEDDING,
        weights=partial(huggingface_weights, joined=any(map(is_joined, names))),
        differences=differences,
        model=wanted,
        warnings=tuple(huggingface_settings.notes(found)),
    )


def _equal(read: Callable[[str], Tensor], one: str, other: str) -> bool:
    return torch.equal(read(one), read(other))


def _megatron(folder: Path) -> Foreign:
    check_readable(file for file in folder.rglob("*") if not file.is_dir())
    tensors = open_megatron(folder)

    def unused(model: Model) -> set[str]:
        """The published code has the memory's weights in every layer, and uses them in some."""
        return {
            name
            for name in tensors.names
            if (part := re.match(r"decoder\.layers\.(\d+)\.gengram\.", name))
            and model.gengram.enabled
            and int(part[1]) + 1 not in model.gengram.layers
        }

    warnings = list(argument_warnings(tensors.arguments))
    if not tensors.arguments:
        warnings.append(
            f"{folder} has no arguments of the run that wrote it (args), so no setting was compared "
            "with the config but the shapes of the weights. Rotary base, norm epsilon, top-k, the "
            "memory's layers, window and token ids must be those that it was trained with"
        )
    if tensors.skipped:
        warnings.append(
            f"{len(tensors.skipped)} tensors of multi-token prediction, which this program does "
            f"not have, are left out: {tensors.skipped[0]} and so on"
        )
    return Foreign(
        folder,
        tensors.names,
        tensors.read,
        embedding="embedding.word_embeddings.weight",
        weights=megatron_weights,
        differences=lambda config: megatron_arguments.differences(tensors.arguments, config),
        model=megatron_arguments.wanted_model(tensors.arguments),
        train=megatron_arguments.wanted_batch(tensors.arguments),
        unused=unused,
        warnings=tuple(warnings),
    )
