"""Writes all files of an export but weights and model card: config.json, generation_config.json,
the tokenizer, and the code of Gengram."""

import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gengram_megatron.config.schema import Config, Model
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, BASES, EOD, IUPAC_AMBIGUOUS, NAMES, PIECES

PAD = PIECES.index("[PAD]")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CODE = Path(__file__).parent / "hub_code"
CODE_FILES = ("configuration_gengram.py", "modeling_gengram.py")


def check_installed() -> None:
    """Raises UserError if packages of the extra `hf` are not installed."""
    for package in ("safetensors", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the package {package} is missing: install the extra hf with "
                "pip install 'gengram-megatron[hf]'"
            )


def check_expressible(model: Model) -> None:
    """Raises UserError if transformers' Llama and Mixtral cannot compute what this model does."""
    if model.attention == "mla":
        raise UserError(
            "model.attention is mla, which transformers' Llama and Mixtral do not support: only "
            "mha and gqa can be exported and imported"
        )
    if model.num_experts is not None and model.moe_router_topk == 1:
        raise UserError(
            "model.moe_router_topk is 1, and Mixtral gives a single expert the weight 1, whereas "
            "this model gives it the router's probability: only a value of 2 or more can be "
            "exported and imported"
        )


def model_config(config: Config) -> dict[str, Any]:
    """Returns the content of config.json."""
    model = config.model
    experts = model.num_experts is not None
    settings = {
        "architectures": [_class_name(model, "ForCausalLM")],
        "model_type": _model_type(model),
        "dtype": DTYPES[config.train.dtype],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": EOD,
        "pad_token_id": PAD,
    }
    if experts:
        settings |= {
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "router_aux_loss_coef": model.moe_aux_loss_coeff,
            "sliding_window": None,
        }
    else:
        settings |= {"attention_bias": False, "mlp_bias": False}
    if model.gengram.enabled:
        settings |= {"auto_map": _auto_map(model), "gengram": _gengram(model)}
    return settings


def _model_type(model: Model) -> str:
    base = "llama" if model.num_experts is None else "mixtral"
    # A separate model_type: without the code for Gengram, the model must not load at all.
    return f"gengram_{base}" if model.gengram.enabled else base


def _class_name(model: Model, suffix: str) -> str:
    return "".join(part.capitalize() for part in _model_type(model).split("_")) + suffix


def _auto_map(model: Model) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_gengram.{_class_name(model, 'Config')}",
        "AutoModel": f"modeling_gengram.{_class_name(model, 'Model')}",
        "AutoModelForCausalLM": f"modeling_gengram.{_class_name(model, 'ForCausalLM')}",
    }


def _gengram(model: Model) -> dict[str, Any]:
    gengram = model.gengram
    copied = ("layers", "dim", "window", "token_ids", "deduplicate", "signed_sqrt", "output")
    return {
        **{name: getattr(gengram, name) for name in (*copied, "conv_kernel")},
        # Only if true: models that were exported before the key existed lack it.
        **({"projection_bias": True} if gengram.projection_bias else {}),
        "eod": EOD if gengram.reset_at_document else None,
        "tables": [asdict(table) for table in kmer_tables(gengram)],
    }


def generation_config(model: Model) -> dict[str, Any]:
    """Returns the content of generation_config.json, the default settings of `generate`."""
    # EOD is not suppressed, because otherwise generated text could not end. Training here masks EOD
    # as a label, so our models give it almost no probability; imported ones may have learned it.
    allowed = {*BASE_IDS, EOD}
    return {
        "bos_token_id": None,
        "eos_token_id": EOD,
        "pad_token_id": PAD,
        "suppress_tokens": [n for n in range(model.vocab_size) if n not in allowed],
    }


def write_description(folder: Path, config: Config) -> None:
    """Writes all files of an export but the weights and the model card."""
    _write_json(folder / "config.json", model_config(config))
    _write_json(folder / "generation_config.json", generation_config(config.model))
    # The tokenizer's own save method raises errors, as for a full disk, that are not OSErrors.
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.seq_length,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "eos_token": "[EOD]",
        "clean_up_tokenization_spaces": False,
        # After a prompt padded on the right, generation would continue from the padding.
        "padding_side": "left",
        # Llama and Mixtral do not accept token_type_ids, which a tokenizer returns by default.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / "tokenizer_config.json", settings)
    if config.model.gengram.enabled:
        for name in CODE_FILES:
            shutil.copyfile(CODE / name, folder / name)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _tokenizer_json() -> str:
    """Returns the content of tokenizer.json, for a tokenizer with one token per letter and our ids.

    Case is folded, and IUPAC's ambiguity codes become N. Any other character becomes [UNK], where
    our own tokenizer refuses it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import Split

    fast = Tokenizer(models.WordLevel({name: n for n, name in enumerate(NAMES)}, unk_token="[UNK]"))
    ambiguous = IUPAC_AMBIGUOUS + IUPAC_AMBIGUOUS.lower()
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(base.lower(), base) for base in BASES]
        + [normalizers.Replace(Regex(f"[{ambiguous}]"), "N")]
    )
    fast.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    special = [name for name in NAMES if len(name) > 1]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    text: str = fast.to_str(pretty=True)
    return text
