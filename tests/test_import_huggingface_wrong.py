"""Folders of transformers that contradict themselves or are damaged: told, and not guessed."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.stored import StoredTensors
from gengram_megatron.engine.exchange.huggingface import model_config
from gengram_megatron.engine.exchange.huggingface_settings import (
    differences,
    model_keys,
    notes,
)
from gengram_megatron.engine.exchange.importing import import_foreign, open_foreign
from gengram_megatron.engine.exchange.new_config import new_config
from gengram_megatron.errors import UserError
from tests.exchange_models import load

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
DESCRIBED = {"model_type": "mixtral", **SIZES, "rope_theta": 10000.0}
MEMORY = ("model.gengram.kmer_sizes=[1, 2]", "model.gengram.layers=[3, 2]")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Llama as transformers saves it, in one file."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder: Path, **change: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def exported(tmp_path: Path, *words: str) -> tuple[dict, Config]:
    """config.json of an export with memory, as it is read, and the config that it is of."""
    config = load(tmp_path, "run", *MEMORY, *words)
    return json.loads(json.dumps(model_config(config))), config


def test_weights_that_are_there_twice_are_refused(folder) -> None:
    """transformers reads the single file, and others the index."""
    weights = load_file(folder / "model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="holds its weights twice"):
        open_foreign(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}))
    open_foreign(folder)


def test_an_output_layer_of_its_own_contradicts_tied_embeddings(folder) -> None:
    """transformers 4 uses the embedding, 5 what is in the file."""
    rewrite(folder, tie_word_embeddings=True)
    with pytest.raises(
        UserError, match=r"tie_word_embeddings true.*lm_head\.weight.*remove lm_head\.weight"
    ):
        open_foreign(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    open_foreign(folder)


def test_rotary_base_is_found_wherever_transformers_finds_it() -> None:
    """Version 5 reads rope_scaling as rope_parameters."""
    scaling = {"rope_type": "default", "rope_theta": 5e7}
    found = DESCRIBED | {"rope_theta": None, "rope_scaling": scaling}
    assert model_keys(found)["rotary_base"] == 50_000_000
    kinds = MixtralConfig(**{k: v for k, v in found.items() if k != "rope_theta"})
    assert kinds.rope_parameters["rope_theta"] == 5e7
    with pytest.raises(UserError, match="contradicts itself: rope_theta is 10000, rope_theta of"):
        model_keys(DESCRIBED | {"rope_scaling": scaling})


def test_groups_of_null_are_the_heads_and_those_of_no_key_are_eight() -> None:
    assert model_keys(DESCRIBED | {"num_key_value_heads": None})["attention"] == "mha"
    without = {k: v for k, v in DESCRIBED.items() if k != "num_key_value_heads"}
    assert model_keys(without | {"num_attention_heads": 16})["num_query_groups"] == 8


def test_unknown_keys_are_told_whatever_their_value() -> None:
    assert any("use_new" in line for line in notes(DESCRIBED | {"use_new": False}))
    assert not any("use_new" in line for line in notes(DESCRIBED | {"use_new": None}))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 4.0}, "num_attention_heads 4.0"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings 'long'"),
        ({"sliding_window": "no"}, "sliding_window 'no'"),
        ({"rope_theta": "1e6"}, "rope_theta '1e6'"),
        ({"rope_theta": True}, "rope_theta True"),
        ({"rope_parameters": [1]}, "rope_parameters [1]"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
        ({"rope_scaling": {"rope_theta": "x"}}, "rope_scaling.rope_theta 'x'"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"model_type": "gengram_llama", "gengram": {}}, "lacks gengram.layers"),
        ({"model_type": "gengram_llama", "gengram": {"tables": 3}}, "gengram.tables 3"),
        ({"model_type": "gengram_llama", "gengram": {"tables": [{}]}}, "gengram.tables [{}]"),
    ],
)
def test_values_of_a_wrong_kind_are_named(change, key) -> None:
    with pytest.raises(UserError, match=re.escape(key)):
        model_keys(DESCRIBED | change)


def test_what_an_export_says_of_memory(tmp_path) -> None:
    found, config = exported(tmp_path)
    assert found["gengram"]["layers"] == [3, 2] and differences(found, config) == []
    found["gengram"] |= {"newer": 1, "eod": 2}  # of a later version, and of another tokenizer
    names = {one.name: one.key for one in differences(found, config)}
    assert names["gengram.newer"] is None and names["gengram.eod"] is None


def test_the_kernel_counts_only_where_there_is_a_convolution(tmp_path) -> None:
    _, four = exported(tmp_path)
    three, _ = exported(tmp_path, "model.gengram.conv_kernel=3")
    assert [one.name for one in differences(three, four)] == ["gengram.conv_kernel"]
    _, four = exported(tmp_path, "model.gengram.output=norm")
    three, _ = exported(tmp_path, "model.gengram.output=norm", "model.gengram.conv_kernel=3")
    assert differences(three, four) == []
    assert "gengram.conv_kernel" not in model_keys(three)


@pytest.mark.parametrize(
    ("other", "precision", "said"),
    [
        (torch.float16, "bf16", "float16 weights are rounded to bfloat16"),
        (torch.float32, "bf16", "float32 weights are rounded to bfloat16"),
        (torch.float16, "fp32", "bfloat16 and float16 weights are kept in float32"),
    ],
)
def test_each_dtype_that_is_converted_is_told(folder, tmp_path, other, precision, said, capfd):
    """The embedding is bfloat16, and the norms are not."""
    weights = {
        name: weight.to(other if "norm" in name else torch.bfloat16)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors")
    foreign = open_foreign(folder)
    words = [f"run.dir={tmp_path / 'run'}", f"train.precision={precision}"]
    stored = StoredTensors(import_foreign(foreign, new_config(folder, foreign, words)[1]))
    assert said in capfd.readouterr().err
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    norm = stored.read("decoder.final_layernorm.weight")
    assert torch.equal(norm, weights["model.norm.weight"].to(dtype))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "model.num_attention_heads"),
        ({"num_key_value_heads": 3}, "model.num_query_groups"),
    ],
)
def test_sizes_that_do_not_go_together_are_told(folder, tmp_path, change, key) -> None:
    _, config = new_config(folder, open_foreign(folder), [f"run.dir={tmp_path / 'run'}"])
    rewrite(folder, **change)
    foreign = open_foreign(folder)
    with pytest.raises(UserError, match=re.escape(f"{key} is 3") + r"|= 3; change one"):
        new_config(folder, foreign, [f"run.dir={tmp_path / 'run'}"])
    config.model.num_query_groups = 3
    with pytest.raises(UserError, match=r"model\.num_query_groups = 3"):
        import_foreign(foreign, config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, value) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 2] = value
    save_file(weights, folder / "model.safetensors")
    foreign = open_foreign(folder)
    _, config = new_config(folder, foreign, [f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight holds .* not finite"):
        import_foreign(foreign, config)
    assert not (tmp_path / "run").exists()


def test_weights_of_a_quantized_model_are_refused_for_what_they_are(folder, tmp_path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    foreign = open_foreign(folder)
    _, config = new_config(folder, foreign, [f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"lm_head\.weight .* in int8: .*bfloat16"):
        import_foreign(foreign, config)


def test_a_file_that_was_cut_off_is_to_be_had_again(folder) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .* download it again"):
        open_foreign(folder)


def test_what_is_no_model_is_said(tmp_path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(UserError) as error:
            open_foreign(path)
        return str(error.value)

    assert "does not exist: download" in said(tmp_path / "Genos-1.2B")
    (tmp_path / "file").touch()
    assert "is a file" in said(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "neither a transformers model" in said(tmp_path / "empty")
    tracker = tmp_path / "empty" / "latest_checkpointed_iteration.txt"
    tracker.write_text("700\n")
    assert "names iteration '700'" in said(tmp_path / "empty")
