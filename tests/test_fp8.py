"""What is asked of GPUs and sizes before a run with Transformer Engine starts."""

import pytest
import torch

from gengram_megatron.commands.doctor import fit as parts
from gengram_megatron.commands.doctor.examine import _Examination
from gengram_megatron.commands.doctor.fit import advice
from gengram_megatron.config.load import load_config
from gengram_megatron.config.problems.engine import gpu_problems, precision_problems
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.training.run import train
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import estimated_size
from gengram_megatron.signals import StopSignals
from tests.training.tiny import DENSE, MHA, MLA, write_config

ENGINE = "model.implementation=transformer_engine"
FP8 = (ENGINE, "train.precision=fp8")
ROTATED = "model.mla.qk_pos_emb_head_dim=16"
BLACKWELL = "train.fp8.recipe=mxfp8"


@pytest.fixture
def config(tmp_path):
    """A function that gives the tiny run in fp8 with other words. It has heads of 8, groups of two,
    64 tokens in two samples, and weights of 32."""

    def config(*words: str) -> Config:
        file = write_config(tmp_path / "tiny.yaml", tmp_path / "data")
        return load_config(file, [f"run.dir={tmp_path / 'run'}", *FP8, *words], Config)

    return config


ALLOWED = {
    "gqa": (),
    "dense": DENSE,
    "mha": MHA,
    "mla": (*MLA, ROTATED),
    "no fp8": ("train.precision=bf16", "model.hidden_size=40"),
    "mxfp8": (BLACKWELL,),
    "whole blocks": (
        "train.fp8.recipe=blockwise",
        "parallel.tensor=2",
        *DENSE,
        "model.hidden_size=128",
        "train.micro_batch_size=4",
    ),
    "fp32 on one rank": ("train.precision=fp32",),
    "tokens of a rank": ("parallel.context=2", "parallel.tensor=2", *DENSE),
}


@pytest.mark.parametrize("words", ALLOWED.values(), ids=ALLOWED)
def test_sizes_that_fp8_can_use(config, words):
    assert list(precision_problems(config(*words))) == []


REFUSED = {
    "hidden size": (["model.hidden_size=40", *MHA], "model.hidden_size / parallel.tensor is 40"),
    "its part": (["parallel.tensor=4", *MHA, *DENSE, "model.ffn_hidden_size=64"], "model.hidden_size / parallel.tensor is 8"),
    "groups": (["model.num_attention_heads=8", "model.num_query_groups=1"], "(1 + 2 * num_query_groups / num_attention_heads) / parallel.tensor is 40"),
    "feed-forward": (["model.ffn_hidden_size=24", *DENSE], "model.ffn_hidden_size / parallel.tensor is 24"),
    "part of an expert": (["parallel.expert_tensor=4"], "model.ffn_hidden_size / parallel.expert_tensor is 8"),
    "tokens": (["model.seq_length=36"], "tokens on a rank, is 72"),
    "shard of tokens": (["parallel.tensor=2", "model.seq_length=24", *DENSE], "tokens on a rank, is 24"),
    "latent keys": ([*MLA], "model.mla.kv_lora_rank + mla.qk_pos_emb_head_dim is 24"),
    "latent queries": ([*MLA, ROTATED, "model.mla.q_lora_rank=8"], "model.mla.q_lora_rank is 8"),
    "latent values": ([*MLA, ROTATED, "model.mla.v_head_dim=10"], "model.num_attention_heads * mla.v_head_dim / parallel.tensor is 40"),
    "hidden size of one rank": (["model.hidden_size=40", *MHA], "model.hidden_size is 40"),
    "half a block": (["train.fp8.recipe=blockwise", "parallel.tensor=2", *DENSE], "model.hidden_size is 32, which fp8 cannot use with train.fp8.recipe blockwise: make it a multiple of 128"),
    "fp32 over ranks": (["train.precision=fp32", "parallel.context=2"], "train.precision is fp32 with parallel.context = 2, where Transformer Engine has no attention"),
    "smaller blocks": ([BLACKWELL, "model.ffn_hidden_size=48"], "is 48, which fp8 cannot use with train.fp8.recipe mxfp8: make it a multiple of 32"),
}  # fmt: skip


@pytest.mark.parametrize("words, says", REFUSED.values(), ids=REFUSED)
def test_sizes_that_fp8_cannot_use(config, words, says):
    assert any(says in sentence for sentence in precision_problems(config(*words)))


RECIPES = {
    "a scale a tensor": ((), ("hybrid", "tensorwise")),
    "blocks": (("train.fp8.recipe=blockwise",), ("e4m3", "blockwise")),
    "smaller blocks": ((BLACKWELL,), ("e4m3", "mxfp8")),
    "given": ((BLACKWELL, "train.fp8.format=hybrid"), ("hybrid", "mxfp8")),
    "none": (("train.precision=bf16",), (None, "delayed")),  # of megatron-core, and not read
}


@pytest.mark.parametrize("words, expected", RECIPES.values(), ids=RECIPES)
def test_what_megatron_is_told(config, one_process, words, expected):
    from gengram_megatron.engine.model.build import transformer_config

    told = transformer_config(config(*DENSE, *words), one_process)
    assert (told.fp8, told.fp8_recipe) == expected
    assert told.bf16 and told.params_dtype == torch.bfloat16


def test_weights_stay_in_bf16(config):
    in_bf16 = config("train.precision=bf16")
    assert estimated_size(config()) == estimated_size(in_bf16)
    assert estimated_size(config("train.precision=fp32")) > estimated_size(in_bf16)


HOPPER = (9, 0)
GPUS = {
    "none": ((), None, "model.implementation is transformer_engine, which needs a GPU"),
    "Ampere": ((), (8, 0), "compute capability 8.9 or more, but one here has 8.0"),
    "Ada": ((), (8, 9), None),
    "Ada with blocks": (("train.fp8.recipe=blockwise",), (8, 9), "of compute capability 9.0"),
    "Hopper with smaller blocks": ((BLACKWELL,), HOPPER, "of compute capability 10.0"),
    "Blackwell": ((BLACKWELL,), (10, 3), None),
    "another Blackwell": ((BLACKWELL,), (12, 0), "of compute capability 10.0 or more, below 12.0"),
    "Ampere in bf16": (("train.precision=bf16",), (8, 0), None),
    "torch": (("model.implementation=torch",), None, None),
}


@pytest.mark.parametrize("words, capability, says", GPUS.values(), ids=GPUS)
def test_gpus(config, words, capability, says):
    problems = list(gpu_problems(config(*words), capability))
    assert len(problems) == (says is not None)
    assert says is None or says in problems[0]


def test_a_run_without_a_gpu_is_refused_before_processes_meet(config):
    with pytest.raises(UserError, match="which needs a GPU, and torch sees none here"):
        train(config(), layout=None, signals=StopSignals())


def test_the_doctor_looks_at_the_oldest_gpu(config):
    examination = object.__new__(_Examination)
    examination.problems = []
    new, old = {"compute_capability": "12.0"}, {"compute_capability": "8.6"}
    assert examination._fits_gpus(config(), [new])
    assert not examination._fits_gpus(config(), [new, old])
    [problem] = examination.problems
    assert "one here has 8.6" in problem


def test_why_gradients_are_added_up_as_they_are(config):
    gpu = [{}]
    assert "on GPUs" in parts._fusion([], config(), None)
    assert parts._fusion(gpu, config(), None) == (
        "megatron-core found none in apex; Transformer Engine's layers have their own"
    )
    torch = config("model.implementation=torch")
    assert parts._fusion(gpu, torch, "fused_x") == "megatron-core found apex's fused_x"


def advised(*there: str) -> list[str]:
    """To a machine with a GPU and these packages."""
    names = ("transformer-engine", "apex", "triton")
    versions = {name: "1.0" if name in there else None for name in names}
    software = {name: {"version": found, "error": None} for name, found in versions.items()}
    found = {"software": software, "devices": {"gpus": [{}], "cuda": "13.0"}, "measured": None}
    return list(advice(found, None))


def test_which_libraries_are_advised():
    assert advised("transformer-engine", "apex", "triton") == []
    [apex] = advised("transformer-engine", "triton")
    assert apex.startswith("apex is missing") and "Adam" not in apex
    [apex, engine] = advised("triton")
    assert "Adam" in apex and "'gengram-megatron[te]'" in engine
