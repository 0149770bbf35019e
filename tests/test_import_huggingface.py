"""Models of transformers as users have them, of version 4 and 5: imported, logits compared with
transformers' own, and refused where the config would compute something else."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.exchange.huggingface_settings import (
    differences,
    model_keys,
    notes,
)
from gengram_megatron.engine.exchange.importing import import_foreign, open_foreign
from gengram_megatron.engine.exchange.new_config import new_config
from gengram_megatron.errors import UserError
from tests.exchange_models import answers, build

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1_048_576,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 14, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
ROPE = {"rope_type": "default", "rope_theta": 50_000_000.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind, as transformers 5 saves it, and the models."""
    torch.manual_seed(0)
    top = tmp_path_factory.mktemp("transformers")
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPE)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS, rope_parameters=ROPE)),
        "tied": LlamaForCausalLM(
            LlamaConfig(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True)
        ),
    }
    for name, model in made.items():
        model.eval().save_pretrained(top / name)
    return {name: top / name for name in made} | {"models": made}


def as_version_4(folder: Path) -> None:
    """config.json as transformers 4.5x writes it, Genos-1.2B's among them."""
    file = folder / "config.json"
    found = json.loads(file.read_text())
    found |= {"rope_theta": found.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    found |= {"torch_dtype": found.pop("dtype"), "transformers_version": "4.55.0"}
    found |= {"head_dim": None, "attention_bias": False, "output_router_logits": False}
    file.write_text(json.dumps(found))


def copied(saved: dict, kind: str, tmp_path: Path) -> Path:
    return shutil.copytree(saved[kind], tmp_path / kind)


def imported_logits(folder: Path, tmp_path: Path, tokens: torch.Tensor, *words: str):
    """Those of our model, from a config that the folder wants and the checkpoint of its import."""
    from gengram_megatron.engine.checkpoint.state import TrainingState

    foreign = open_foreign(folder)
    words = (f"run.dir={tmp_path / 'run'}", "model.seq_length=64", *words)
    text, config = new_config(folder, foreign, [*words, "checkpoint.asynchronous=false"])
    assert foreign.differences(config) == []
    import_foreign(foreign, config)
    (tmp_path / "written.yaml").write_text(text)
    config = load_config(tmp_path / "written.yaml", [], Config)
    layout = check_layout(config, 1)
    chunks, optimizer, schedule = build(config, layout)
    TrainingState(config, layout, chunks, optimizer, schedule, []).load_newest()
    return answers(chunks[0], config, tokens)[0]


def test_imported_weights_may_go_on_with_another_length(one_process, saved, tmp_path) -> None:
    """As long as no run has trained them; and a run's own folder is no model of another format."""
    from gengram_megatron.engine.checkpoint.state import TrainingState

    foreign = open_foreign(saved["llama"])
    words = [f"run.dir={tmp_path / 'run'}", "model.seq_length=64"]
    _, config = new_config(saved["llama"], foreign, words)
    folder = import_foreign(foreign, config)
    for length, base in ((64, 50_000_000), (32, 50_000_000), (32, 10_000)):
        config.model.seq_length, config.model.rotary_base = length, base
        layout = check_layout(config, 1)
        chunks, optimizer, schedule = build(config, layout)
        state = TrainingState(config, layout, chunks, optimizer, schedule, [])
        assert state.load_newest().step == 0
    config.model.norm_epsilon = 0.5
    with pytest.raises(UserError, match=r"model\.norm_epsilon"):
        state.load_newest()
    for path in (folder, tmp_path / "run"):
        with pytest.raises(UserError, match=r"checkpoint\.load="):
            open_foreign(path)


TOKENS = torch.tensor([8, 5, 6, 7, 9])[
    torch.randint(5, (2, 48), generator=torch.Generator().manual_seed(3))
]


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "tied"])
def test_the_logits_are_those_of_transformers(
    one_process, saved, tmp_path, kind, version, capfd
) -> None:
    folder = copied(saved, kind, tmp_path)
    if version == 4:
        as_version_4(folder)
    with torch.no_grad():
        expected = saved["models"][kind](TOKENS).logits
    found = imported_logits(folder, tmp_path, TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert "warning" not in capfd.readouterr().err  # nothing is converted


@pytest.mark.parametrize("index", [True, False])
def test_weights_in_several_files(one_process, saved, tmp_path, index) -> None:
    """By the index, which decides where a name is in two files; without one, all files."""
    folder = copied(saved, "mixtral", tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(weights), {}
    for part in range(3):
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[part::3]}, folder / file)
        places |= dict.fromkeys(names[part::3], file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)
        # Not named: transformers does not read it either.
        save_file({names[0]: torch.zeros(3)}, folder / "consolidated.safetensors")
    with torch.no_grad():
        expected = saved["models"]["mixtral"](TOKENS).logits
    found = imported_logits(folder, tmp_path, TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_experts_joined_in_one_tensor(one_process, saved, tmp_path) -> None:
    """As transformers 5 has them in memory."""
    folder = copied(saved, "mixtral", tmp_path)
    weights = dict(saved["models"]["mixtral"].state_dict())
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    with torch.no_grad():
        expected = saved["models"]["mixtral"](TOKENS).logits
    found = imported_logits(folder, tmp_path, TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("stored", "precision", "said"),
    [
        (torch.float32, "bf16", "rounded to bfloat16"),
        (torch.bfloat16, "fp32", "kept in float32"),
        (torch.float16, "fp32", "kept in float32"),
    ],
)
def test_weights_are_converted_and_it_is_said(
    one_process, saved, tmp_path, stored, precision, said, capfd
) -> None:
    from gengram_megatron.engine.checkpoint.stored import StoredTensors

    folder = copied(saved, "llama", tmp_path)
    weights = {n: w.to(stored) for n, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    foreign = open_foreign(folder)
    words = [f"run.dir={tmp_path / 'run'}", f"train.precision={precision}"]
    _, config = new_config(folder, foreign, words)
    tensors = StoredTensors(import_foreign(foreign, config))
    assert said in capfd.readouterr().err
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    expected = weights["model.layers.1.mlp.down_proj.weight"].to(dtype)
    assert torch.equal(tensors.read(name), expected)
    assert {tensors.dtype(one) for one in tensors.names} == {dtype}


def test_a_tied_output_layer_starts_as_a_copy(one_process, saved, tmp_path) -> None:
    foreign = open_foreign(saved["tied"])
    assert any("trained apart" in line for line in foreign.warnings)
    assert torch.equal(foreign.read("lm_head.weight"), foreign.read("model.embed_tokens.weight"))


GENOS = {  # config.json of a released model, as transformers 4.5x writes it
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 128,
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5, "rope_theta": 50000000,
    "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 14,
    "torch_dtype": "float32", "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
}  # fmt: skip
TRUE_CONFIG = ["configs/genos/genos_1.2b.yaml", "run.dir=x"]


def genos_config(*words: str) -> Config:
    return load_config(Path(TRUE_CONFIG[0]), [TRUE_CONFIG[1], *words], Config)


def test_the_released_model_is_that_of_its_config() -> None:
    assert differences(GENOS, genos_config()) == []
    wanted = model_keys(GENOS)
    assert wanted["rotary_base"] == 50_000_000 and wanted["num_experts"] == 8
    (line,) = notes(GENOS)
    assert "pad_token_id 14" in line and "ignored" in line


@pytest.mark.parametrize(
    ("change", "name", "key"),
    [
        ({"rope_theta": 10000}, "rope_theta", "model.rotary_base"),
        ({"rope_theta": None}, "rope_theta", "model.rotary_base"),  # Mixtral's default: 1e6
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type", None),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor", None),
        ({"head_dim": 128}, "head_dim", None),
        ({"hidden_act": "gelu"}, "hidden_act", None),
        ({"attention_bias": True}, "attention_bias", None),
        ({"sliding_window": 4096}, "sliding_window", None),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps", "model.norm_epsilon"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok", "model.moe_router_topk"),
        ({"num_key_value_heads": 16}, "num_key_value_heads", "model.num_query_groups"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", None),
    ],
)
def test_what_computes_something_else_is_a_difference(change, name, key) -> None:
    (found,) = differences(GENOS | change, genos_config())
    assert (found.name, found.key) == (name, key)


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 64},
        {"rope_theta": None, "rope_parameters": ROPE},
        {"rope_parameters": ROPE},
        {"num_local_experts": None, "rms_norm_eps": None},
        {"sliding_window": 1048576},
        {"router_aux_loss_coef": 0.5, "attention_dropout": 0.1, "initializer_range": 0.5},
        {"max_position_embeddings": 8192, "bos_token_id": None, "use_cache": False},
    ],
)
def test_what_computes_the_same_is_none(change) -> None:
    assert differences(GENOS | change, genos_config()) == []


def test_all_differences_are_told_in_one_refusal(tmp_path, saved) -> None:
    foreign = open_foreign(saved["mixtral"])
    words = ["model.rotary_base=10000", "model.num_layers=3", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError) as refused:
        new_config(saved["mixtral"], foreign, words)
    for row in (
        r"rope_theta +5\S+ +model\.rotary_base +10000",
        r"num_hidden_layers +2 +model\.num_layers +3",
    ):
        assert re.search(row, str(refused.value)), row


def test_keys_that_are_not_known_are_told() -> None:
    assert any("a_new_trick" in line for line in notes(GENOS | {"a_new_trick": True}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"rope_parameters": {**ROPE, "rope_theta": 10000.0}, "rope_theta": 5e5}, "contradicts"),
    ],
)
def test_a_config_that_means_nothing_here_is_refused(saved, tmp_path, change, expected) -> None:
    folder = copied(saved, "mixtral", tmp_path)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | change))
    with pytest.raises(UserError, match=re.escape(expected)):
        open_foreign(folder)


def test_files_that_are_not_there(saved, tmp_path) -> None:
    folder = copied(saved, "llama", tmp_path)
    held = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(held, "model-1.safetensors")}))
    with pytest.raises(UserError, match=r"model-1\.safetensors.* missing"):
        open_foreign(folder)
    index.write_text(json.dumps({"weight_map": {"no.such.weight": "model.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks no\.such\.weight"):
        open_foreign(folder)
    index.unlink()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "b.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is in a\.safetensors and in b"):
        open_foreign(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"safe_serialization=True"):
        open_foreign(folder)
