"""An import compares all arguments of Megatron-LM that decide what a model computes, and writes a
config from them."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gengram_megatron.commands.cli import app
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.exchange import importing
from gengram_megatron.engine.exchange.importing import import_model
from gengram_megatron.engine.exchange.megatron import MegatronTensors
from gengram_megatron.engine.exchange.megatron_arguments import (
    differences,
    model_keys,
)
from gengram_megatron.engine.exchange.megatron_other_arguments import argument_warnings
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS
from tests.exchange_models import answers, build, load
from tests.published_model import logits, published_model, save_ranks
from tests.training.tiny import DENSE, MHA, MLA

MOE = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "group_query_attention": True,
    "num_query_groups": 2,
    "multi_latent_attention": False,
    "ffn_hidden_size": 128,
    "moe_ffn_hidden_size": 32,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_dtype": "fp32",
    "moe_shared_expert_intermediate_size": None,
    "moe_layer_freq": 1,
    "moe_expert_capacity_factor": None,
    "moe_aux_loss_coeff": 0.001,
    "moe_z_loss_coeff": 0.001,
    "padded_vocab_size": 32,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "qk_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "swiglu": True,
    "squared_relu": False,
    "quick_geglu": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rope_type": None,
    "untie_embeddings_and_output_weights": True,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "is_hybrid_model": False,
    "seq_length": 64,
    "init_method_std": 0.1,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "train_samples": 800,
    "gengram_enabled": True,
    "gengram_layer_ids": [2, 3],
    "gengram_ngram_sizes": [1, 2, 3, 4, 5, 6],
    "gengram_embed_dim_per_ngram": 8,
    "gengram_token_ids": [8, 5, 6, 7, 9],
    "gengram_use_short_conv": True,
    "gengram_short_conv_kernel_size": 4,
    "gengram_short_conv_dilation": None,
    "gengram_window_size": 21,
}
"""Those of the tiny model with experts; and of a run, that the model does not depend on."""

TRAINING = {
    "lr": 1e-4,
    "min_lr": 1e-5,
    "lr_decay_style": "cosine",
    "adam_beta2": 0.999,
    "weight_decay": 0.1,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "transformer_pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "data_parallel_size": 8,
    "world_size": 8,
    "rank": 0,
    "local_rank": 0,
    "sequence_parallel": True,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "overlap_p2p_comm": True,
    "bf16": True,
    "accumulate_allreduce_grads_in_fp32": True,
    "attention_softmax_in_fp32": True,
    "masked_softmax_fusion": True,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": True,
    "bias_dropout_fusion": True,
    "apply_rope_fusion": True,
    "gradient_accumulation_fusion": True,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
    "moe_token_drop_policy": "probs",
    "moe_flex_dispatcher_backend": "deepep",
    "moe_router_bias_update_rate": 1e-3,
    "moe_deepep_num_sms": 20,
    "max_position_embeddings": 8192,
    "make_vocab_size_divisible_by": 128,
    "vocab_size": 16,
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": "somewhere/one_hot.bpe.model",
    "data_path": ["somewhere/text_document"],
    "split": "1000,0,0",
    "seed": 1234,
    "save": "somewhere",
    "save_interval": 8000,
    "log_interval": 1,
    "eval_iters": 100,
    "eval_interval": 1000,
    "iteration": 24000,
    "consumed_train_samples": 24_576_000,
    "num_floating_point_operations_so_far": 1e20,
    "transformer_impl": "transformer_engine",
    "ckpt_format": "torch",
    "dist_ckpt_strictness": "assume_ok_unexpected",
    "distributed_backend": "nccl",
    "fp8_interval": 1,
    "fp8_recipe": "delayed",
    "num_layers_at_start_in_bf16": 1,
    "encoder_num_layers": 4,
    "encoder_seq_length": 64,
    "mtp_loss_scaling_factor": 0.1,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "mscale": 1.0,
    "rotary_scaling_factor": 1.0,
    "linear_conv_kernel_dim": 4,
    "mamba_head_dim": 64,
    "add_position_embedding": True,
    "relative_attention_num_buckets": 32,
    "cp_comm_type": ["p2p"],
    "manual_gc_eval": True,
    "rerun_mode": "validate_results",
    "inprocess_hard_timeout": 90,
    "retro_num_neighbors": 2,
    "dino_teacher_temp": 0.07,
    "img_h": 224,
    "fim_rate": 0.5,
    "grpo_iterations": 2,
}
"""More of them, with the values of the published launches and of Megatron-LM's defaults."""


def table(arguments: dict, config: Config) -> dict[str, tuple]:
    """name -> value there, key and value here."""
    return {
        one.name: (one.foreign_value, one.key, one.our_value)
        for one in differences(arguments, config)
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Config:
    return load(tmp_path_factory.mktemp("tiny"), "run")


def test_same_model_has_no_differences_and_no_warnings(tiny) -> None:
    assert table(MOE | TRAINING, tiny) == {}
    assert list(argument_warnings(MOE | TRAINING)) == []


def test_what_a_checkpoint_does_not_say_is_not_compared(tiny) -> None:
    assert table({}, tiny) == {}


@pytest.mark.parametrize(
    ("name", "theirs", "key", "ours"),
    [
        ("num_layers", 6, "num_layers", 4),
        ("hidden_size", 64, "hidden_size", 32),
        ("num_attention_heads", 8, "num_attention_heads", 4),
        ("num_query_groups", 1, "num_query_groups", 2),
        ("num_experts", 8, "num_experts", 4),
        ("moe_router_topk", 3, "moe_router_topk", 2),
        ("moe_ffn_hidden_size", 16, "ffn_hidden_size", 32),
        ("padded_vocab_size", 128, "vocab_size", 32),
        ("norm_epsilon", 1e-6, "norm_epsilon", 1e-5),
        ("rotary_base", 50_000_000, "rotary_base", 10_000),
        ("gengram_enabled", False, "gengram.enabled", True),
        ("gengram_layer_ids", [2], "gengram.layers", [2, 3]),
        ("gengram_ngram_sizes", [1, 2, 3], "gengram.kmer_sizes", [1, 2, 3, 4, 5, 6]),
        ("gengram_embed_dim_per_ngram", 16, "gengram.dim", 8),
        ("gengram_token_ids", [5, 8, 6, 7, 9], "gengram.token_ids", [8, 5, 6, 7, 9]),
        ("gengram_short_conv_kernel_size", 3, "gengram.conv_kernel", 4),
        ("gengram_window_size", 20, "gengram.window", 21),
        ("gengram_window_size", None, "gengram.window", 21),
    ],
)
def test_argument_with_a_key_differs(tiny, name, theirs, key, ours) -> None:
    found = table(MOE | {name: theirs}, tiny)
    assert found[name] == (theirs, f"model.{key}", ours)
    # Of those that follow from it, none would be left if it were the only one.
    assert model_keys(MOE | {name: theirs})[key] == theirs


@pytest.mark.parametrize(
    ("name", "theirs", "wanted", "key", "ours"),
    [
        ("gengram_layer_ids", None, "[1, 2, 3, 4]", "gengram.layers", [2, 3]),
        ("gengram_use_short_conv", False, "plain", "gengram.output", "convolution"),
        ("group_query_attention", False, "mha", "attention", "gqa"),
    ],
)
def test_argument_that_a_key_says_otherwise_differs(tiny, name, theirs, wanted, key, ours) -> None:
    told, found_key, found = table(MOE | {name: theirs}, tiny)[name]
    assert str(told).endswith(f"which is {wanted}")
    assert (found_key, found) == (f"model.{key}", ours)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("position_embedding_type", "learned_absolute", "rope"),
        ("rotary_percent", 0.25, 1.0),
        ("rotary_interleaved", True, False),
        ("rotary_seq_len_interpolation_factor", 4, None),
        ("use_rope_scaling", True, False),
        ("no_rope_freq", [0, 0, 0, 1], None),
        ("normalization", "LayerNorm", "RMSNorm"),
        ("apply_layernorm_1p", True, False),
        ("apply_residual_connection_post_layernorm", True, False),
        ("add_bias_linear", True, False),
        ("add_qkv_bias", True, False),
        ("qk_layernorm", True, False),
        ("qk_l2_norm", True, False),
        ("swiglu", False, True),
        ("squared_relu", True, False),
        ("openai_gelu", True, False),
        ("quick_geglu", True, False),
        ("glu_linear_offset", 1.0, 0.0),
        ("untie_embeddings_and_output_weights", False, True),
        ("attention_output_gate", True, False),
        ("softmax_scale", 0.1, None),
        ("softmax_type", "learnable", "vanilla"),
        ("window_size", (128, 0), None),
        ("kv_channels", 16, 8),
        ("experimental_attention_variant", "dsa", None),
        ("heterogeneous_layers_config_path", "some.json", None),
        ("is_hybrid_model", True, False),
        ("hybrid_override_pattern", "M*M-", None),
        ("moe_router_pre_softmax", True, False),
        ("moe_router_score_function", "sigmoid", "softmax"),
        ("moe_router_topk_scaling_factor", 2.5, None),
        ("moe_router_enable_expert_bias", True, False),
        ("moe_router_num_groups", 2, None),
        ("moe_router_load_balancing_type", ["sinkhorn"], "aux_loss"),
        ("moe_shared_expert_intermediate_size", 512, None),
        ("moe_layer_freq", [0, 1, 1, 1], 1),
        ("moe_expert_capacity_factor", 1.25, None),
        ("moe_apply_probs_on_input", True, False),
        ("gengram_short_conv_dilation", 1, 6),
        ("gengram_ngram_sizes", [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]),
        ("gengram_layer_ids", [0, 3], "layers from 1 to 4"),
    ],
)
def test_argument_without_a_key_differs(tiny, name, theirs, ours) -> None:
    assert table(MOE | {name: theirs}, tiny)[name] == (theirs, None, ours)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("rotary_base", 10000.0),
        ("gengram_layer_ids", (3, 2)),
        ("gengram_short_conv_dilation", 6),
        ("moe_layer_freq", [1, 1, 1, 1]),
        ("no_rope_freq", [0, 0, 0, 0]),
        ("moe_router_topk_scaling_factor", 1.0),
        ("moe_router_load_balancing_type", ["seq_aux_loss"]),
        ("rope_scaling_factor", 32.0),  # without use_rope_scaling
    ],
)
def test_other_values_that_compute_the_same_do_not_differ(tiny, name, theirs) -> None:
    assert table(MOE | {name: theirs}, tiny) == {}


def test_heads_without_groups_are_one_model_under_two_names(tmp_path) -> None:
    mha = {**MOE, "group_query_attention": False, "num_query_groups": 1}
    assert table(mha, load(tmp_path, "run", *MHA)) == {}
    assert table(mha, load(tmp_path, "run", "model.num_query_groups=4")) == {}
    assert table({**MOE, "num_query_groups": 4}, load(tmp_path, "run", *MHA)) == {}
    assert {"group_query_attention", "num_query_groups"} <= set(
        table(MOE, load(tmp_path, "run", *MHA))
    )


def test_dense_model_is_wide_as_ffn_hidden_size_says_and_has_no_router(tmp_path) -> None:
    dense = {**MOE, "num_experts": None, "moe_router_score_function": "sigmoid"}
    config = load(tmp_path, "run", *DENSE)
    assert set(table(dense, config)) == {"ffn_hidden_size"}
    assert table({**dense, "ffn_hidden_size": 32}, config) == {}
    assert model_keys(dense)["num_experts"] is None


def test_latent_attention_has_sizes_norms_and_a_rope_of_its_own(tmp_path) -> None:
    config = load(tmp_path, "run", *MLA)
    latent = {
        **MOE,
        "multi_latent_attention": True,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 16,
        "qk_layernorm": True,
        "rope_type": "rope",
        "kv_channels": 64,  # which latent attention does not use
    }
    assert table(latent, config) == {}
    assert table({**latent, "kv_lora_rank": 32}, config)["kv_lora_rank"][1] == (
        "model.mla.kv_lora_rank"
    )
    assert table({**latent, "qk_layernorm": False}, config)["qk_layernorm"] == (False, None, True)
    # Without a flag, megatron-core's latent attention takes yarn.
    assert table({**latent, "rope_type": None}, config)["rope_type"] == ("yarn", None, "rope")
    assert table(latent, load(tmp_path, "run"))["multi_latent_attention"][1] == "model.attention"


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.gengram.deduplicate=true", "deduplicate"),
        ("model.gengram.reset_at_document=true", "reset_at_document"),
        ("model.gengram.signed_sqrt=false", "signed_sqrt"),
        ("model.gengram.share_reverse_complements=true", "share_reverse_complements"),
    ],
)
def test_options_that_the_published_code_lacks_differ(tmp_path, word, key) -> None:
    [found] = differences(MOE, load(tmp_path, "run", word))
    assert found.key == f"model.gengram.{key}" and found.foreign_value != found.our_value


def test_memory_has_an_epsilon_of_its_own_in_the_published_code(tmp_path) -> None:
    config = load(tmp_path, "run", "model.norm_epsilon=1e-6")
    [found] = differences({**MOE, "norm_epsilon": 1e-6}, config)
    assert (found.foreign_value, found.key, found.our_value) == (1e-5, None, 1e-6)


def test_router_of_one_expert_has_its_softmax_before_the_choice(tmp_path) -> None:
    config = load(tmp_path, "run", "model.moe_router_topk=1")
    one = {**MOE, "moe_router_topk": 1}
    assert table({**one, "moe_router_pre_softmax": True}, config) == {}
    assert table(one, config) == {"moe_router_pre_softmax": (False, None, True)}


def test_unknown_arguments_and_other_rounding_are_told() -> None:
    unknown = {
        "embedding_multiplier": 12.0,
        "attn_logit_softcapping": 50,
        "spec": ["a", "b"],
        "logits_scaling": 8,
    }
    [line] = argument_warnings(MOE | TRAINING | unknown | {"no_such_thing": False, "nor_this": []})
    for name, value in (("embedding_multiplier", "12"), ("logits_scaling", "8")):
        assert f"{name} {value}" in line
    assert "no_such_thing" not in line and "nor_this" not in line
    [line] = argument_warnings(MOE | {"fp32_residual_connection": True, "fp8": "hybrid"})
    assert "fp32_residual_connection true" in line and "fp8 hybrid" in line


def test_defaults_of_megatron_core_are_no_cause_for_a_warning() -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    plain = (bool, int, float, str)
    defaults = {
        one.name: one.default for one in fields(MLATransformerConfig) if type(one.default) in plain
    }
    assert len(defaults) > 150
    assert list(argument_warnings(defaults)) == []


# What a person does with a checkpoint. Its weights are those of the tiny model of MOE.


@pytest.fixture(scope="module")
def published(one_process, tmp_path_factory) -> tuple:
    """The model, and the folder of its checkpoint with all arguments."""
    folder = tmp_path_factory.mktemp("published")
    config = load(folder, "unused")
    model = published_model(config, one_process)
    save_ranks(model, config, folder / "there", 1, 1)
    set_arguments(folder / "there", MOE | TRAINING)
    return model, folder / "there"


def rank_file(folder: Path) -> Path:
    return folder / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"


def set_arguments(folder: Path, arguments: dict) -> None:
    content = torch.load(rank_file(folder), weights_only=False)
    vars(content["args"]).update(arguments)
    torch.save(content, rank_file(folder))


@pytest.fixture
def there(published, tmp_path, monkeypatch) -> Path:
    """A copy of the checkpoint to change, from the folder in which it lies."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(published[1], Path("there"))


def run(*words: str):
    return CliRunner().invoke(app, ["checkpoint", "import", *words])


def refused(*words: str) -> str:
    """What is said; nothing may be left behind."""
    before = sorted(Path().rglob("*"))
    done = run(*words)
    assert isinstance(done.exception, UserError), done.output
    assert sorted(Path().rglob("*")) == before
    return str(done.exception)


def test_all_differences_are_in_one_refusal(published, tmp_path) -> None:
    words = ["model.gengram.window=20", "model.rotary_base=500", "model.norm_epsilon=0.1"]
    with pytest.raises(UserError) as error:
        import_model(published[1], load(tmp_path, "run", *words))
    lines = [line.split() for line in str(error.value).splitlines()]
    assert ["gengram_window_size", "21", "model.gengram.window", "20"] in lines
    assert ["rotary_base", "10000", "model.rotary_base", "500"] in lines
    assert ["norm_epsilon", "1e-05", "model.norm_epsilon", "0.1"] in lines
    assert "--print-config" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_printed_config_loads_and_gives_the_published_answers(there, published) -> None:
    from gengram_megatron.engine.checkpoint.state import TrainingState

    printed = run("there", "--print-config", "train.steps=4")
    assert printed.exit_code == 0, printed.exception
    assert sorted(Path().iterdir()) == [there]
    file = Path("printed.yaml")
    file.write_text(printed.stdout)
    assert "CHOOSE" in printed.stdout
    config = load_config(file, ["checkpoint.asynchronous=false"], Config)
    assert config.run.dir == "runs/there"
    assert (config.train.precision, config.train.steps, config.train.samples) == ("fp32", 4, None)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (8, 2)
    assert (
        config.model
        == load(
            there, "unused", "model.gengram.init=published", "model.gengram.init_std=null"
        ).model
    )
    import_model(there, config)
    layout = check_layout(config, 1)
    chunks, optimizer, schedule = build(config, layout)
    assert TrainingState(config, layout, chunks, optimizer, schedule, []).load_newest().step == 0
    generator = torch.Generator().manual_seed(2)
    tokens = torch.tensor(BASE_IDS)[torch.randint(5, (1, 32), generator=generator)]
    found, _ = answers(chunks[0], config, tokens)
    expected = logits(published[0], config, tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_new_config_is_written_with_the_checkpoint(there) -> None:
    done = run("there", "--new-config", "new.yaml", "run.dir=runs/mine", "data.path=some/data")
    assert done.exit_code == 0, done.exception
    config = load_config(Path("new.yaml"), [], Config)
    assert (config.run.dir, config.data.path) == ("runs/mine", "some/data")
    assert config.train.samples == 800
    assert (Path("runs/mine/checkpoints") / "step_00000000").is_dir()
    assert "give another run.dir" in refused("there", "new.yaml")
    assert "new.yaml already exists" in refused("there", "--new-config", "new.yaml")
    planned = CliRunner().invoke(app, ["plan", "new.yaml"])
    assert planned.exit_code == 0, planned.exception


def test_words_that_contradict_the_checkpoint_are_refused(there) -> None:
    for option in (["--print-config"], ["--new-config", "new.yaml"]):
        said = refused("there", "model.gengram.window=15", *option)
        assert "gengram_window_size" in said and "21" in said and "15" in said
    assert "model.no_such" in refused("there", "model.no_such=1", "--new-config", "new.yaml")


def test_what_no_config_can_say_is_refused(there) -> None:
    set_arguments(there, {"apply_layernorm_1p": True, "moe_router_score_function": "sigmoid"})
    for option in (["--print-config"], ["--new-config", "new.yaml"]):
        lines = refused("there", *option).splitlines()
        row = next(line for line in lines if "apply_layernorm_1p" in line)
        assert "true" in row and "no key for it" in row and "false" in row
        assert any("moe_router_score_function" in line and "sigmoid" in line for line in lines)


def test_failed_import_leaves_nothing(there) -> None:
    """The weights are of another size than the arguments say, which is found while writing."""
    content = torch.load(rank_file(there), weights_only=False)
    content["model"]["output_layer.weight"] = torch.zeros(40, 32)
    torch.save(content, rank_file(there))
    said = refused("there", "--new-config", "new.yaml", "run.dir=runs/mine")
    assert "output_layer.weight" in said


def test_warnings_are_shown(there) -> None:
    set_arguments(there, {"no_such_multiplier": 3.5})
    done = run("there", "--print-config")
    assert done.exit_code == 0
    assert "warning: " in done.stderr and "no_such_multiplier 3.5" in done.stderr
    assert "no_such_multiplier" not in done.stdout


def test_tensors_left_out_are_told_in_a_line(there, monkeypatch) -> None:
    opened = importing.open_megatron

    def with_others(folder: Path) -> MegatronTensors:
        tensors = opened(folder)
        tensors.skipped = ["mtp.layers.0.a", "mtp.layers.0.b"]
        return tensors

    monkeypatch.setattr(importing, "open_megatron", with_others)
    [line] = importing.open_foreign(there).warnings
    assert "2 tensors" in line and "mtp.layers.0.a" in line


def test_checkpoint_that_says_nothing_asks_for_the_sizes(there) -> None:
    content = torch.load(rank_file(there), weights_only=False)
    del content["args"]
    torch.save(content, rank_file(there))
    said = refused("there", "--print-config")
    assert "model.hidden_size=..." in said and "model.ffn_hidden_size=..." in said


def test_where_nothing_can_be_compared_it_is_told(there, tmp_path, capfd) -> None:
    """Memory of other layers than the config's would be left out, and the window be another one."""
    content = torch.load(rank_file(there), weights_only=False)
    del content["args"]
    torch.save(content, rank_file(there))
    import_model(there, load(tmp_path, "run", "model.gengram.layers=[3]"))
    assert any("no setting was compared" in line for line in importing.open_foreign(there).warnings)
    said = capfd.readouterr().err
    assert "Gengram tensors are left out" in said and "model.gengram.layers is [3]" in said


def test_arguments_as_a_dictionary_are_compared_too(there) -> None:
    printed = run("there", "--print-config").stdout
    content = torch.load(rank_file(there), weights_only=False)
    content["args"] = vars(content["args"])
    torch.save(content, rank_file(there))
    assert run("there", "--print-config").stdout == printed
    assert "gengram_window_size" in refused("there", "--print-config", "model.gengram.window=15")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["there"], "CONFIG is missing"),
        (["there", "run.dir=runs/mine"], "CONFIG is missing"),
        (["there", "some.yaml", "--new-config", "new.yaml"], "some.yaml and --new-config"),
        (["there", "some.yaml", "--print-config"], "some.yaml and --print-config"),
        (["there", "--print-config", "--new-config", "new.yaml"], "both given"),
        (["there", "--new-config", "no/such/new.yaml"], "there is no folder"),
        (["nowhere", "--new-config", "new.yaml"], "nowhere does not exist"),
        (["there", "nowhere.yaml"], "no config file nowhere.yaml"),
    ],
)
def test_mistakes_are_told(there, words, said) -> None:
    assert said in refused(*words)
