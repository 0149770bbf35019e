"""Exported models are what transformers makes of them, and come back bit for bit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.stored import StoredTensors, read_config
from gengram_megatron.engine.exchange import export as exporting
from gengram_megatron.engine.exchange.export import export
from gengram_megatron.engine.exchange.huggingface import model_config
from gengram_megatron.engine.exchange.importing import import_model
from gengram_megatron.engine.exchange.names import huggingface_weights
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import CheckpointStore, find_checkpoint
from gengram_megatron.tokenizer import BASE_IDS, EOD, PIECES, DnaTokenizer
from tests.exchange_models import KINDS, Trained, build, load, make, named, run_alone
from tests.layouts.launch import ROOT

REFUSED = ("mla", "top1")
EXPORTED = [kind for kind in KINDS if kind not in REFUSED]
STOCK = {"dense_mha": "Llama", "dense_gqa": "Llama", "moe_gqa": "Mixtral", "moe_top3": "Mixtral"}
WITH_MEMORY = [kind for kind in EXPORTED if kind not in STOCK]

TEXT, NEW_TOKENS = "ACGTNacgtnRy-\n[EOD]A", 8


@pytest.fixture(scope="module")
def models(one_process, tmp_path_factory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("trained")
    return {kind: make(kind, folder) for kind in KINDS}


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for kind in EXPORTED:
        export(find_checkpoint(models[kind].run), folder / kind)
    return folder


@pytest.fixture(scope="module")
def answers(models, exported) -> dict[str, dict]:
    """In a process without the package, nor its stand-ins for CUDA."""
    tokens = {kind: models[kind].tokens.tolist() for kind in EXPORTED}
    given = {"text": TEXT, "new_tokens": NEW_TOKENS, "tokens": tokens}
    (exported / "given.json").write_text(json.dumps(given))
    run_alone(exported, str(ROOT / "tests/huggingface_worker.py"), str(exported), timeout=600)
    return torch.load(exported / "answers.pt")


def assert_close(found, expected, kind: str) -> None:
    """1e-4 in float32; in bf16 what rounding of a few layers makes."""
    tolerance = 0.05 if kind == "bf16" else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", EXPORTED)
def test_logits_and_hidden_states_agree(models, answers, kind) -> None:
    found, model = answers[kind], models[kind]
    assert_close(found["logits"], model.logits, kind)
    assert_close(found["decoder"], found["hidden"], kind)
    assert len(found["layers"]) == model.config.model.num_layers + 1
    norm = model.weights["decoder.final_layernorm.weight"].float()
    epsilon = model.config.model.norm_epsilon
    expected = torch.nn.functional.rms_norm(model.hidden, norm.shape, norm, epsilon)
    assert_close(found["hidden"], expected, kind)


@pytest.mark.parametrize("kind", STOCK)
def test_models_without_memory_need_no_code_of_ours(answers, exported, kind) -> None:
    assert answers[kind]["class"] == f"{STOCK[kind]}ForCausalLM"
    assert not list((exported / kind).glob("*.py"))
    assert "auto_map" not in json.loads((exported / kind / "config.json").read_text())


@pytest.mark.parametrize("kind", EXPORTED)
def test_text_in_pieces_gives_the_logits_of_the_whole(answers, kind) -> None:
    assert_close(answers[kind]["in_pieces"], answers[kind]["logits"], kind)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_padding_changes_nothing(answers, kind, side) -> None:
    tolerance = 0.05 if kind == "bf16" else 1e-5
    found, expected = answers[kind]["padded"][side], answers[kind]["logits"]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", [kind for kind in WITH_MEMORY if kind != "bf16"])
def test_gradients_do_not_depend_on_caches_and_recomputation(answers, kind) -> None:
    errors = answers[kind]["gradients"]
    assert len(errors) == 10
    assert not {way: error for way, error in errors.items() if not error < 1e-5}


@pytest.mark.parametrize("kind", [kind for kind in EXPORTED if kind != "bf16"])
def test_prompts_of_unequal_length_go_on_as_each_alone(answers, kind) -> None:
    assert answers[kind]["together"] == answers[kind]["alone"]


@pytest.mark.parametrize("kind", EXPORTED)
def test_only_bases_are_generated_and_eod_ends(models, answers, kind) -> None:
    found = answers[kind]
    assert found["sampled"] == {*BASE_IDS}
    assert found["ended"] == [[EOD]] * 3
    suppressed = set(found["generation"]["suppress_tokens"])
    vocabulary = set(range(models[kind].config.model.vocab_size))
    assert vocabulary - suppressed == {*BASE_IDS, EOD}
    assert found["generation"]["eos_token_id"] == EOD
    assert found["generation"]["pad_token_id"] == PIECES.index("[PAD]")


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, "greedy") for kind in WITH_MEMORY if kind != "bf16"] + [("moe_memory", "beams")],
)
def test_generation_with_a_cache_is_that_without(answers, models, kind, way) -> None:
    cached, plain = (answers[kind][f"generated_{way}_{cache}"] for cache in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape[1] == 10 + NEW_TOKENS
    assert torch.equal(cached[:, :10], models[kind].tokens[:, :10])


def test_tokenizer_has_our_ids(answers) -> None:
    found = answers["moe_gqa"]
    letters = DnaTokenizer().encode(TEXT[:12]).tolist()
    assert found["ids"] == [*letters, 1, 1, EOD, *DnaTokenizer().encode("A")]
    assert found["text"] == "ACGTNACGTNNN[UNK][UNK][EOD]A"
    assert found["eos"] == ("[EOD]", EOD)
    assert answers["moe_memory"]["ids"] == found["ids"]


@pytest.mark.parametrize("kind", EXPORTED)
def test_import_gives_the_weights_back_bit_for_bit(models, exported, tmp_path, kind) -> None:
    config = load(tmp_path, "imported", *KINDS[kind])
    stored = StoredTensors(import_model(exported / kind, config))
    assert set(stored.names) == set(models[kind].weights)
    for name, weight in models[kind].weights.items():
        found = stored.read(name)
        assert found.dtype == weight.dtype and torch.equal(found, weight)


@pytest.mark.parametrize("kind", ["dense_gqa", "moe_gqa", "moe_memory", "bf16"])
def test_what_transformers_saved_is_imported(models, exported, answers, tmp_path, kind) -> None:
    config = load(tmp_path, "imported", *KINDS[kind])
    stored = StoredTensors(import_model(exported / f"{kind}_saved", config))
    assert all(torch.equal(stored.read(name), w) for name, w in models[kind].weights.items())


@pytest.mark.parametrize("kind", ["moe_memory", "bf16"])
def test_run_starts_from_imported_weights(models, exported, tmp_path, kind) -> None:
    from gengram_megatron.engine.checkpoint.state import TrainingState

    config = load(tmp_path, "imported", *KINDS[kind], "run.seed=6")
    import_model(exported / kind, config)
    layout = check_layout(config, 1)
    chunks, optimizer, schedule = build(config, layout)
    assert TrainingState(config, layout, chunks, optimizer, schedule, []).load_newest().step == 0
    found = named(chunks[0])
    assert all(torch.equal(found[name], w) for name, w in models[kind].weights.items())
    # The optimizer's own float32 weights, too: a step with a gradient of zero keeps them.
    optimizer.step()
    moved = named(chunks[0])
    for name, weight in models[kind].weights.items():
        torch.testing.assert_close(moved[name], weight, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.rotary_base=20000"], r"rope_theta +\S+ +model\.rotary_base +20000"),
        (["model.num_layers=5"], r"num_hidden_layers +4 +model\.num_layers +5"),
        (["model.gengram.window=20"], r"gengram\.window +21 +model\.gengram\.window +20"),
        (["model.gengram.kmer_sizes=[1, 2]"], r"gengram\.tables .* model\.gengram\.kmer_sizes"),
        (["model.gengram.enabled=false"], r"gengram_mixtral +model\.gengram\.enabled +false"),
        (
            ["model.gengram.projection_bias=true"],
            r"gengram\.projection_bias +false +model\.gengram",
        ),
    ],
)
def test_import_of_another_model_is_refused(exported, tmp_path, words, expected) -> None:
    config = load(tmp_path, "imported", *words)
    with pytest.raises(UserError, match=expected):
        import_model(exported / "moe_memory", config)
    assert not CheckpointStore(tmp_path / "imported" / "checkpoints").newest()


def test_only_a_model_with_a_bias_says_that_it_has_one(exported) -> None:
    """So that models that were exported before there was the key are read as ever."""
    for kind in WITH_MEMORY:
        memory = json.loads((exported / kind / "config.json").read_text())["gengram"]
        card = (exported / kind / "README.md").read_text()
        assert memory.get("projection_bias") == (True if kind == "bias" else None), kind
        assert ("bias of key and value" in card) == (kind == "bias"), kind


def unflattened(keys: dict[str, object]) -> dict:
    tree: dict = {}
    for key, value in keys.items():
        *groups, last = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return tree


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(REFUSED)))
def test_the_config_that_an_export_wants_is_its_own(models, exported, kind) -> None:
    """Its hashed tables, too, whose seed the tables' own hashes tell."""
    from gengram_megatron.engine.exchange.huggingface_settings import model_keys

    wanted = model_keys(json.loads((exported / kind / "config.json").read_text()))
    found = Config.model_validate(
        unflattened({f"model.{key}": value for key, value in wanted.items()})
        | {"run": {"dir": "x"}, "data": {"path": "x"}}
        | {"train": {"global_batch_size": 1, "steps": 1}}
    )
    assert model_config(found) | {"dtype": None} == model_config(models[kind].config) | {
        "dtype": None
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_cannot_express_is_refused(models, tmp_path, kind) -> None:
    expected = {"mla": "model.attention is mla", "top1": "model.moe_router_topk is 1"}
    with pytest.raises(UserError, match=expected[kind]):
        export(find_checkpoint(models[kind].run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_would_be_left_out_is_refused(models, tmp_path, monkeypatch) -> None:
    """Such as that of a memory which the other format does not know."""
    run = find_checkpoint(models["dense_gqa"].run)
    known = [*huggingface_weights(read_config(run).model)]
    left_out = known.pop(3).key
    monkeypatch.setattr(exporting, "huggingface_weights", lambda model: known)
    with pytest.raises(UserError, match=re.escape(left_out)):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_stay_below_the_limit_and_hold_the_same(models, exported, tmp_path) -> None:
    limit = 300_000
    run = find_checkpoint(models["moe_memory"].run)
    export(run, tmp_path / "out", limit)
    whole = load_file(exported / "moe_memory" / "model.safetensors")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    parts = [load_file(file) for file in files]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    for file, part in zip(files, parts):
        assert {index["weight_map"][name] for name in part} == {file.name}
        sizes = [tensor.nbytes for tensor in part.values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    together = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(together) == sum(map(len, parts)) and together.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in together.items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    with pytest.raises(UserError, match="already exists; give another folder"):
        export(run, tmp_path / "out", limit)
