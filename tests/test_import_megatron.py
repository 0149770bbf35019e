"""Models of Megatron-LM, with the published memory, become ours."""

import pickle
import re
import shutil
import signal
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MemoryFormat
from torch.distributed.checkpoint.metadata import Metadata

from gengram_megatron.config.layout import check_layout
from gengram_megatron.engine.checkpoint.stored import StoredTensors
from gengram_megatron.engine.exchange.importing import import_model
from gengram_megatron.engine.exchange.megatron import open_megatron
from gengram_megatron.engine.exchange.untrusted import read_untrusted
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import CheckpointStore
from gengram_megatron.tokenizer import BASE_IDS, EOD
from tests.exchange_models import answers, build, load
from tests.imported_weights import check_weights
from tests.published_model import (
    logits,
    published_model,
    save_distributed,
    save_ranks,
)
from tests.training.tiny import DENSE, MLA
from tests.untrusted import Attribute, Evil

KINDS = {"moe": (), "dense": DENSE, "mla": (*DENSE, *MLA)}
FORMS = ("distributed", "ranks", "one_rank", "tp2", "pp4")


@pytest.fixture(scope="module")
def published(one_process, tmp_path_factory) -> dict:
    """kind -> the model; its checkpoints lie in FOLDER/kind_form."""
    folder, models = tmp_path_factory.mktemp("published"), {"folder": None}
    for kind, words in KINDS.items():
        config = load(folder, "unused", *words)
        model = models[kind] = published_model(config, one_process)
        save_distributed(model, config, folder / f"{kind}_distributed")
        layouts = {"ranks": (2, 2), "one_rank": (1, 1), "tp2": (2, 1), "pp4": (1, 4)}
        for form, (tensor, pipeline) in layouts.items():
            save_ranks(model, config, folder / f"{kind}_{form}", tensor, pipeline)
    models["folder"] = folder
    return models


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_weights(published, tmp_path, kind, form) -> None:
    config = load(tmp_path, "run", *KINDS[kind])
    folder = import_model(published["folder"] / f"{kind}_{form}", config)
    check_weights(folder, config, published[kind])


@pytest.mark.parametrize("form", ["distributed", "ranks"])
@pytest.mark.parametrize("kind", KINDS)
def test_imported_model_answers_as_the_published_one(published, tmp_path, kind, form) -> None:
    from gengram_megatron.engine.checkpoint.state import TrainingState

    config = load(tmp_path, "run", *KINDS[kind])
    import_model(published["folder"] / f"{kind}_{form}", config)
    layout = check_layout(config, 1)
    chunks, optimizer, schedule = build(config, layout)
    assert TrainingState(config, layout, chunks, optimizer, schedule, []).load_newest().step == 0
    generator = torch.Generator().manual_seed(2)
    tokens = torch.tensor(BASE_IDS)[torch.randint(5, (1, 32), generator=generator)]
    tokens[0, 11] = EOD
    found, _ = answers(chunks[0], config, tokens)
    expected = logits(published[kind], config, tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def refused(source: Path, tmp_path: Path, expected: str, *words: str) -> None:
    config = load(tmp_path, "run", *words)
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        import_model(source, config)
    assert len(str(error.value).splitlines()) == 1
    assert not CheckpointStore(tmp_path / "run" / "checkpoints").newest()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.num_layers=5"], "lacks decoder.layers.4."),
        (["model.num_layers=3"], "holds decoder.layers.3."),
        (["model.gengram.enabled=false"], "which is not in the config's model"),
        (["model.ffn_hidden_size=16"], "and the config asks for 32 x 32"),
    ],
)
@pytest.mark.parametrize("form", ["distributed", "ranks"])
def test_another_model_is_refused(published, tmp_path, form, words, expected) -> None:
    refused(published["folder"] / f"moe_{form}", tmp_path, expected, *words)


@pytest.mark.parametrize("form", ["distributed", "ranks"])
def test_weights_are_rounded_and_it_is_said(published, tmp_path, form, capfd) -> None:
    config = load(tmp_path, "run", "train.precision=bf16")
    stored = StoredTensors(import_model(published["folder"] / f"moe_{form}", config))
    assert {stored.dtype(name) for name in stored.names} == {torch.bfloat16}
    assert "rounded to bfloat16" in capfd.readouterr().err


def test_file_that_would_run_code_is_refused(tmp_path) -> None:
    file = tmp_path / "there" / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({"args": Evil(tmp_path / "ran"), "model": {}}, file)
    refused(file.parent.parent, tmp_path, "is refused, as it would run posix.mkdir")
    assert not (tmp_path / "ran").exists()


def test_distributed_description_that_would_run_code_is_refused(tmp_path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refused(folder, tmp_path, "it would run posix.mkdir")
    assert not (tmp_path / "ran").exists()


def test_members_of_enumerations_are_read_however_python_wrote_them(tmp_path) -> None:
    def write(value: object) -> None:
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": value})))

    write(Attribute(MemoryFormat, "TORCH_PRESERVE_FORMAT"))
    assert StoredTensors(tmp_path).names == []  # and not refused
    for wrong in (Attribute(MemoryFormat, "mro"), Attribute(Metadata, "__init__")):
        write(wrong)
        with pytest.raises(UserError, match=r"it would run builtins\.getattr"):
            StoredTensors(tmp_path)


def _as_named(module: str, name: str, *bases: type) -> type:
    """A class that pickles under any name, as it is there while `_pickled` writes it."""
    return type(name, bases, {"__module__": module, "__qualname__": name})


def _pickled(value: object, *classes: type) -> bytes:
    with ExitStack() as stack:
        for one in classes:
            module = import_module(one.__module__)
            stack.enter_context(patch.object(module, one.__name__, one, create=True))
        return pickle.dumps(value)


MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"


def test_description_by_megatron_core_is_read_and_nothing_else_of_its_module(tmp_path) -> None:
    theirs = _as_named(MEGATRON, "MCoreMetadata", Metadata)
    (tmp_path / ".metadata").write_bytes(_pickled(theirs({}), theirs))
    assert StoredTensors(tmp_path).names == []
    for name in ("TorchDistSaveShardedStrategy", "os", "MCoreSavePlanner"):
        other = _as_named(MEGATRON, name)
        (tmp_path / ".metadata").write_bytes(_pickled(Metadata({"a": other()}), other))
        with pytest.raises(UserError, match=f"would run {MEGATRON}.{name}"):
            StoredTensors(tmp_path)
    # The class of the root with something evil in its notes.
    notes = theirs({})
    notes.mcore_data = {"a": Evil(tmp_path / "ran")}
    (tmp_path / ".metadata").write_bytes(_pickled(notes, theirs))
    with pytest.raises(UserError, match=r"would run posix\.mkdir"):
        StoredTensors(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_descriptions_of_other_versions_of_torch_are_read(published, tmp_path) -> None:
    """Older ones lack fields of the description, newer ones have more, and one older still has
    the dtype of a tensor in another module."""
    from torch.distributed._shard.sharded_tensor import metadata as older

    iteration = tmp_path / "there"
    shutil.copytree(published["folder"] / "dense_distributed" / "iter_0000100", iteration)
    expected, file = StoredTensors(iteration), iteration / ".metadata"
    name = "decoder.final_layernorm.weight"
    described = pickle.loads(file.read_bytes())
    tensor = described.state_dict_metadata[name]
    for changed in ("fewer", "more", "older"):
        if changed == "fewer":
            described.__dict__ = {
                field: getattr(described, field)
                for field in ("state_dict_metadata", "storage_data")
            }
        elif changed == "more":
            described.__dict__["of_a_later_version"] = {"a": [1, "b"]}
        else:
            state = tensor.properties.__getstate__()
            tensor.properties = older.TensorProperties()
            memory = older.MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
            tensor.properties.__setstate__((*state[:3], memory, state[4]))
        file.write_bytes(pickle.dumps(described))
        found = StoredTensors(iteration)
        assert found.names == expected.names
        assert torch.equal(found.read(name), expected.read(name))


def test_plain_values_beside_members_of_enumerations_are_read(tmp_path) -> None:
    content = {"args": Attribute(signal.Signals, "SIGTERM"), "iteration": 3}
    torch.save(content, tmp_path / "a.pt")
    assert read_untrusted(tmp_path / "a.pt")["iteration"] == 3


def _change(file: Path, change) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def test_ranks_that_do_not_fit_together_are_refused(published, tmp_path) -> None:
    config, there = load(tmp_path, "run", *DENSE), tmp_path / "there"
    save_ranks(published["dense"], config, there, 2, 1)
    iteration = there / "iter_0000100"
    changed = "decoder.layers.2.gengram.norm_q.weight"
    _change(
        iteration / "mp_rank_01" / "model_optim_rng.pt",
        lambda content: content["model"][changed].add_(1),
    )
    refused(there, tmp_path, f"{changed} differs between mp_rank_00 and mp_rank_01", *DENSE)
    (iteration / "mp_rank_00").rename(iteration / "mp_rank_02")
    refused(there, tmp_path, "lacks the file of tensor rank 0, pipeline rank 0", *DENSE)


def test_chunks_of_a_rank_are_in_the_order_of_their_numbers(tmp_path) -> None:
    """Twelve of them, so that words would sort otherwise."""
    name = "input_layernorm.weight"
    chunks = {
        f"model{chunk}": {f"decoder.layers.0.{name}": torch.full((2,), float(chunk))}
        for chunk in range(12)
    }
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(chunks, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    found = open_megatron(tmp_path)
    read = [found.read(f"decoder.layers.{layer}.{name}")[0].item() for layer in range(12)]
    assert read == list(range(12))


def test_content_of_a_rank_that_is_not_named_by_words_is_left_aside(tmp_path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    content = {"model": {"a": torch.ones(2)}, 3: "of whoever wrote it"}
    torch.save(content, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    assert open_megatron(tmp_path).names == {"a"}


def test_distributed_checkpoint_may_hold_what_is_no_weight_under_any_name(
    published, tmp_path
) -> None:
    iteration = tmp_path / "there"
    shutil.copytree(published["folder"] / "dense_distributed" / "iter_0000100", iteration)
    expected, file = open_megatron(iteration).names, iteration / ".metadata"
    described = pickle.loads(file.read_bytes())
    tensors = described.state_dict_metadata
    tensors["model.optimizer.state"] = tensors["decoder.final_layernorm.weight"]
    file.write_bytes(pickle.dumps(described))
    assert open_megatron(iteration).names == expected


def test_distributed_checkpoint_whose_common_state_is_no_dictionary_has_no_arguments(
    published, tmp_path
) -> None:
    iteration = tmp_path / "there"
    shutil.copytree(published["folder"] / "dense_distributed" / "iter_0000100", iteration)
    torch.save(["args"], iteration / "common.pt")
    assert open_megatron(iteration).arguments == {}


def test_folder_of_something_else_is_refused(tmp_path) -> None:
    refused(tmp_path, tmp_path, "neither a transformers model")


@pytest.mark.parametrize("form", ["distributed", "ranks"])
def test_command_line_is_given_as_plain_values(published, tmp_path, form) -> None:
    folder = published["folder"] / f"dense_{form}" / "iter_0000100"
    found, config = open_megatron(folder), load(tmp_path, "run", *DENSE)
    assert found.arguments["norm_epsilon"] == config.model.norm_epsilon
    assert found.arguments["expert_model_parallel_size"] == 1
    # Objects of classes, which were never made.
    assert not {"attention_backend", "params_dtype", "load"} & found.arguments.keys()
    mtp = [f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm")]
    assert found.skipped == (mtp if form == "ranks" else [])
    assert not set(mtp) & found.names
