"""The tiny models and the layouts in which each must give one answer."""

from gengram_megatron.config.schema import Config

# The slope of the signed square root in the gate has a pole at zero: where some gate comes near
# it, rounding alone moves gradients by more than 1e-4. With this seed none does.
SEED = 1

# Six layers, memory in three of them, on both sides of every even pipeline cut.
MODEL = {
    "hidden_size": 32,
    "num_layers": 6,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 32,
    "num_experts": 4,
    "seq_length": 64,
    "vocab_size": 32,
    "init_std": 0.1,
    "gengram": {"enabled": True, "layers": [2, 3, 6], "dim": 8, "init": "scaled", "init_std": 0.5},
}
DENSE = {"num_experts": None}
MHA = {"attention": "mha", "num_query_groups": None}
MLA = {
    "attention": "mla",
    "num_query_groups": None,
    "mla": {
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 16,
    },
}
EIGHT_LAYERS = {"num_layers": 8, "gengram": {**MODEL["gengram"], "layers": [2, 5, 7]}}
DOCUMENTS = {
    "gengram": {
        **MODEL["gengram"],
        "reset_at_document": True,
        "deduplicate": True,
        "signed_sqrt": False,
    }
}


def gengram(**keys) -> dict:
    """The model with other settings of its memory."""
    return {"gengram": {**MODEL["gengram"], **keys}}


ROWS = gengram(split="rows", rows_over="tensor")
ROWS_DATA = gengram(split="rows", rows_over="data")
ROWS_EXPERT = gengram(split="rows", rows_over="expert")
# Hashed tables of 10-mers beside direct ones; collisions, and more rows than anyone looks up.
HASHED = gengram(
    kmer_sizes=[1, 3, 10], hashing={"rows": 400, "heads": 2}, share_reverse_complements=True
)
HASHED_ROWS = {"gengram": {**HASHED["gengram"], "split": "rows", "rows_over": "data"}}
HASHED_ROWS_TENSOR = {"gengram": {**HASHED["gengram"], "split": "rows", "rows_over": "tensor"}}
ROWS_NO_WINDOW = gengram(split="rows", rows_over="data", window=None)
ROWS_DOCUMENTS = {"gengram": {**DOCUMENTS["gengram"], "split": "rows", "rows_over": "data"}}
PROJECTED = gengram(project="tables")
# Without windows some gates do come near zero.
PROJECTED_NO_WINDOW = gengram(project="tables", window=None, signed_sqrt=False)
PROJECTED_DOCUMENTS = gengram(project="tables", reset_at_document=True)
# Not zero at the start, so that it shows how often it is added.
BIAS = gengram(projection_bias=True, init="published")
BIAS_ROWS = gengram(projection_bias=True, init="published", split="rows", rows_over="tensor")
BIAS_PROJECTED = gengram(projection_bias=True, init="published", project="tables")
NORM_OUTPUT = {"gengram": {**MODEL["gengram"], "output": "norm"}}
NO_WINDOW = {"gengram": {**MODEL["gengram"], "window": None}}

#   name: (processes, changes of the model, layout, changes of the training)
CASES = {
    "tp2_dense": (2, DENSE, {"tensor": 2, "sequence": False}, {}),
    "tp2_dense_full": (2, DENSE, {"tensor": 2, "sequence": False}, {"recompute": "full"}),
    "tp2_sp": (2, {}, {"tensor": 2}, {}),
    "tp2_sp_full": (2, {}, {"tensor": 2}, {"recompute": "full"}),
    "tp2_sp_selective": (2, {}, {"tensor": 2}, {"recompute": "selective"}),
    "tp2_sp_dense_mha": (2, {**DENSE, **MHA}, {"tensor": 2}, {}),
    "tp2_sp_dense_mla": (2, {**DENSE, **MLA}, {"tensor": 2}, {}),
    "tp2_sp_no_window": (2, NO_WINDOW, {"tensor": 2}, {}),
    "tp2_sp_norm_output": (2, NORM_OUTPUT, {"tensor": 2}, {}),
    "tp2_sp_rows": (2, ROWS, {"tensor": 2}, {}),
    "tp2_dense_rows": (2, {**DENSE, **ROWS}, {"tensor": 2, "sequence": False}, {}),
    "tp2_etp1": (2, {}, {"tensor": 2, "expert_tensor": 1}, {}),
    "pp2": (2, {}, {"pipeline": 2}, {}),
    "pp2_full": (2, {}, {"pipeline": 2}, {"recompute": "full"}),
    "pp2_mla": (2, MLA, {"pipeline": 2}, {}),
    "pp2_vpp2": (2, EIGHT_LAYERS, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "pp2_vpp3": (2, {}, {"pipeline": 2, "virtual_pipeline": 3}, {}),
    "pp2_vpp3_full": (2, {}, {"pipeline": 2, "virtual_pipeline": 3}, {"recompute": "full"}),
    "pp2_uneven_first": (2, {}, {"pipeline": 2, "first_stage_layers": 2}, {}),
    "pp2_uneven_last": (2, {}, {"pipeline": 2, "last_stage_layers": 1}, {}),
    "pp2_uneven_no_memory": (2, {}, {"pipeline": 2, "first_stage_layers": 1}, {"recompute": "full"}),
    "pp2_vpp2_uneven": (2, {}, {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2}, {}),
    "ep2_top1": (2, {"moe_router_topk": 1}, {"expert": 2}, {}),
    "ep2": (2, {}, {"expert": 2}, {}),
    "dp2": (2, {}, {}, {}),
    "cp2": (2, {}, {"context": 2}, {}),
    "cp2_full": (2, {}, {"context": 2}, {"recompute": "full"}),
    "cp2_documents": (2, DOCUMENTS, {"context": 2}, {}),
    "cp2_mla": (2, MLA, {"context": 2}, {}),
    "tp2_sp_hashed": (2, HASHED, {"tensor": 2}, {}),
    "tp2_sp_hashed_rows": (2, HASHED_ROWS_TENSOR, {"tensor": 2}, {}),
    "dp2_rows": (2, ROWS_DATA, {}, {}),
    "dp2_rows_dense_full": (2, {**DENSE, **ROWS_DATA}, {}, {"recompute": "full"}),
    "cp2_rows": (2, ROWS_DATA, {"context": 2}, {}),
    "cp2_rows_no_window_full": (2, ROWS_NO_WINDOW, {"context": 2}, {"recompute": "full"}),
    "ep2_rows": (2, ROWS_EXPERT, {"expert": 2}, {}),
    "ep2_rows_selective": (2, ROWS_EXPERT, {"expert": 2}, {"recompute": "selective"}),
    "dp4_rows_hashed": (4, HASHED_ROWS, {}, {}),
    "ep2_dp4_rows": (4, ROWS_EXPERT, {"expert": 2}, {}),
    "tp2_sp_dp2_rows_full": (4, ROWS_DATA, {"tensor": 2}, {"recompute": "full"}),
    "tp2_sp_ep2_rows": (4, ROWS_EXPERT, {"tensor": 2, "expert": 2}, {}),
    "pp2_dp2_rows_full": (4, ROWS_DATA, {"pipeline": 2}, {"recompute": "full"}),
    "pp2_vpp3_dp2_rows": (4, HASHED_ROWS, {"pipeline": 2, "virtual_pipeline": 3}, {}),
    "cp2_dp2_rows_documents": (4, ROWS_DOCUMENTS, {"context": 2}, {}),
    "cp2_ep2_rows": (4, ROWS_DATA, {"context": 2, "expert": 2}, {}),
    "tp2_sp_projected": (2, PROJECTED, {"tensor": 2}, {}),
    "tp2_dense_projected": (2, {**DENSE, **PROJECTED}, {"tensor": 2, "sequence": False}, {}),
    "cp2_projected_documents": (2, PROJECTED_DOCUMENTS, {"context": 2}, {}),
    "pp2_vpp3_projected_full": (2, PROJECTED, {"pipeline": 2, "virtual_pipeline": 3}, {"recompute": "full"}),
    "tp2_sp_cp2_projected": (4, PROJECTED, {"tensor": 2, "context": 2}, {"recompute": "full"}),
    "tp2_sp_dp2_projected": (4, PROJECTED_NO_WINDOW, {"tensor": 2}, {"recompute": "selective"}),
    "tp2_sp_bias": (2, BIAS, {"tensor": 2}, {}),
    "tp2_dense_bias": (2, {**DENSE, **BIAS}, {"tensor": 2, "sequence": False}, {}),
    "tp2_sp_bias_rows": (2, BIAS_ROWS, {"tensor": 2}, {}),
    "cp2_bias_projected": (2, BIAS_PROJECTED, {"context": 2}, {}),
    "tp2_sp_pp2_bias_projected": (4, BIAS_PROJECTED, {"tensor": 2, "pipeline": 2}, {"recompute": "full"}),
    "tp2_sp_pp2": (4, {}, {"tensor": 2, "pipeline": 2}, {}),
    "tp2_sp_pp2_full": (4, {}, {"tensor": 2, "pipeline": 2}, {"recompute": "full"}),
    "tp2_sp_pp2_uneven": (4, {}, {"tensor": 2, "pipeline": 2, "first_stage_layers": 2}, {"recompute": "full"}),
    "pp4_uneven": (4, {}, {"pipeline": 4, "first_stage_layers": 2, "last_stage_layers": 2}, {}),
    "tp2_sp_cp2": (4, {}, {"tensor": 2, "context": 2}, {}),
    "tp2_sp_cp2_full": (4, {}, {"tensor": 2, "context": 2}, {"recompute": "full"}),
    "tp2_sp_cp2_documents": (4, DOCUMENTS, {"tensor": 2, "context": 2}, {"recompute": "full"}),
    "tp2_sp_cp2_rows": (4, ROWS, {"tensor": 2, "context": 2}, {"recompute": "full"}),
    "tp4_sp_rows": (4, {"num_query_groups": 4, **ROWS}, {"tensor": 4}, {}),
    "tp2_sp_ep2_etp1": (4, {}, {"tensor": 2, "expert": 2, "expert_tensor": 1}, {}),
    "tp2_sp_ep2": (4, {}, {"tensor": 2, "expert": 2}, {}),
    "tp4_sp": (4, {"num_query_groups": 4}, {"tensor": 4}, {}),
    "cp4": (4, {}, {"context": 4}, {}),
    "pp2_cp2": (4, {}, {"pipeline": 2, "context": 2}, {}),
    "ep2_pp2": (4, {}, {"expert": 2, "pipeline": 2}, {}),
    "dp2_pp2_vpp3": (4, {}, {"pipeline": 2, "virtual_pipeline": 3}, {}),
}  # fmt: skip


HOW = ("split", "rows_over", "project")
"""Settings of the memory that must not change the answer; one process goes without."""


def config_of(name: str, alone: bool, **train) -> Config:
    """The config of a case, or of the same model on one process without recomputation."""
    _, changes, parallel, training = CASES[name]
    model = {**MODEL, **changes}
    if alone:
        own = {key: v for key, v in model["gengram"].items() if key not in HOW}
        model["gengram"] = own
    return Config.model_validate(
        {
            "run": {"dir": "unused", "seed": SEED},
            "model": model,
            "parallel": {} if alone else parallel,
            "data": {"path": "unused"},
            "optimizer": {"distributed": False},
            "train": {
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "steps": 4,
                "precision": "fp32",
                **({} if alone else training),
                **train,
            },
        }
    )


def _first_with_the_same_model() -> dict[str, str]:
    first: dict[str, str] = {}
    return {
        name: first.setdefault(config_of(name, alone=True).model_dump_json(), name)
        for name in CASES
    }


ALONE = _first_with_the_same_model()
"""Of each case, the one whose run on one process is also its own."""
