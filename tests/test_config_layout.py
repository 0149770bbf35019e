"""Layouts that cannot work are refused in a sentence; those that can are resolved."""

import pytest

from gengram_megatron.config.layout import check_layout, world_size_from_environment
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError

RIGHT = """\
run: {dir: runs/test}
model:
  hidden_size: 128
  num_layers: 12
  num_attention_heads: 8
  num_query_groups: 4
  ffn_hidden_size: 256
  num_experts: 8
  seq_length: 512
  gengram: {enabled: true, dim: 64}
parallel: {tensor: 2, pipeline: 2}
data: {path: datasets/test}
train: {global_batch_size: 16, steps: 2}
"""

DENSE = ["model.num_experts=null"]
MLA = ["model.attention=mla", "model.num_query_groups=null"]


@pytest.fixture
def config(tmp_path):
    """A function that gives RIGHT with other words."""

    def config(words: list[str]) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(RIGHT)
        return load_config(path, words, Config)

    return config


# World size, words, and what the sentence must say: the keys, their values, what to change.
REFUSED = {
    "world": (6, [], "the world size is 6, which is not a multiple of parallel.tensor * pipeline * context = 2 * 2 * 1 = 4; start a multiple of 4 processes"),
    "world with context": (4, ["parallel.context=2"], "2 * 2 * 2 = 8; start a multiple of 8"),
    "world of experts": (4, ["parallel.expert=2"], "the world size is 4, which is not a multiple of the experts' parallel.expert_tensor * expert * pipeline = 2 * 2 * 2 = 8"),
    "heads by tensor": (6, ["parallel.tensor=3", "parallel.pipeline=2", *MLA, *DENSE, "model.ffn_hidden_size=258", "model.vocab_size=258", "model.seq_length=510", "model.gengram.dim=63"], "model.num_attention_heads is 8, which is not a multiple of parallel.tensor = 3"),
    "hidden by heads": (4, [*DENSE, "model.hidden_size=100"], "model.hidden_size is 100, which is not a multiple of model.num_attention_heads = 8"),
    "odd head": (4, ["model.hidden_size=40"], "model.hidden_size / model.num_attention_heads is 5; rotary"),
    "odd mla head": (4, [*MLA, "model.mla.qk_pos_emb_head_dim=33"], "model.mla.qk_pos_emb_head_dim is 33"),
    "heads by groups": (4, ["model.num_query_groups=6"], "model.num_attention_heads is 8, which is not a multiple of model.num_query_groups = 6"),
    "groups by tensor": (8, ["parallel.tensor=4", "model.num_query_groups=2"], "model.num_query_groups is 2, which is not a multiple of parallel.tensor = 4"),
    "mha with groups": (4, ["model.attention=mha"], "model.num_query_groups is 4, but model.attention is mha"),
    "mla with groups": (4, ["model.attention=mla"], "model.num_query_groups is 4, but model.attention is mla"),
    "rows over without rows": (4, ["model.gengram.split=columns", "model.gengram.rows_over=data"], "model.gengram.rows_over is data, but model.gengram.split is columns"),
    "rows over experts without experts": (4, ["model.gengram.rows_over=expert"], "model.gengram.rows_over is expert, but parallel.expert is 1"),
    "rows over experts of other columns": (4, ["model.gengram.rows_over=expert", "parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"], "which needs parallel.expert_tensor = parallel.tensor, but they are 1 and 2"),
    "heads": (4, ["model.gengram.kmer_sizes=[9]", "model.gengram.hashing.heads=7"], "which is not a multiple of model.gengram.hashing.heads = 7"),
    "bf16 states that cannot be read back": (4, ["optimizer.distributed=false", "train.precision=bf16", "parallel.pipeline=2"], "optimizer.distributed is false with train.precision bf16, parallel.pipeline = 2 and Gengram"),
    "more tables than primes": (4, ["model.gengram.kmer_sizes=[9,10]", "model.gengram.hashing={rows: 64, heads: 16}"], "model.gengram.hashing.rows is 64, "),
    "columns of a head": (4, ["model.gengram.kmer_sizes=[9]", "model.gengram.dim=4", "model.gengram.hashing.heads=4", "parallel.tensor=2"], "model.gengram.dim / hashing.heads is 1, which is not a multiple of parallel.tensor = 2"),
    "mla without sequence": (4, [*MLA, *DENSE, "parallel.sequence=false"], "model.attention mla on more than one tensor-parallel rank needs parallel.sequence: true"),
    "rows of experts": (4, ["model.hidden_size=72", "model.num_attention_heads=4", "model.ffn_hidden_size=260"], "model.ffn_hidden_size / parallel.expert_tensor is 130, which experts in bf16 cannot use: make it a multiple of 8"),
    "transformer engine": (4, ["model.implementation=transformer_engine"], "model.implementation is transformer_engine, which is not installed here"),
    "fp8 of torch": (4, ["train.precision=fp8"], "train.precision is fp8, which Transformer Engine computes, but model.implementation is auto: set it to transformer_engine, or precision to bf16"),
    "dense ffn": (4, [*DENSE, "model.ffn_hidden_size=255"], "model.ffn_hidden_size is 255, which is not a multiple of parallel.tensor = 2"),
    "expert ffn": (4, ["model.ffn_hidden_size=255"], "model.ffn_hidden_size is 255, which is not a multiple of parallel.expert_tensor (null: parallel.tensor) = 2"),
    "expert ffn of its own split": (8, ["parallel.expert_tensor=4", "model.ffn_hidden_size=254"], "model.ffn_hidden_size is 254, which is not a multiple of parallel.expert_tensor = 4"),
    "vocabulary": (4, ["model.vocab_size=255"], "model.vocab_size is 255, which is not a multiple of parallel.tensor = 2"),
    "experts by ranks": (12, ["parallel.expert=3", "train.global_batch_size=12"], "model.num_experts is 8, which is not a multiple of parallel.expert = 3"),
    "expert ranks of a dense model": (8, [*DENSE, "parallel.expert=2"], "parallel.expert is 2, but model.num_experts is null"),
    "expert split of a dense model": (4, [*DENSE, "parallel.expert_tensor=1"], "parallel.expert_tensor is 1, but model.num_experts is null"),
    "top-k": (4, ["model.moe_router_topk=9"], "model.moe_router_topk is 9, more than model.num_experts = 8"),
    "experts without sequence": (4, ["parallel.sequence=false"], "needs parallel.sequence: true"),
    "sequence without tensor": (2, ["parallel.tensor=1", "parallel.sequence=true"], "parallel.sequence is true, but parallel.tensor is 1"),
    "length by tensor": (4, ["model.seq_length=511"], "model.seq_length is 511, which is not a multiple of parallel.tensor = 2"),
    "length by context": (4, ["parallel.tensor=1", "parallel.context=2", "model.seq_length=510"], "model.seq_length is 510, which is not a multiple of 2 * parallel.context = 4"),
    "length by both": (8, ["parallel.context=2", "model.seq_length=508"], "model.seq_length is 508, which is not a multiple of 2 * parallel.context * parallel.tensor = 8"),
    "layers by pipeline": (4, ["model.num_layers=13"], "model.num_layers is 13, which is not a multiple of parallel.pipeline = 2"),
    "layers by chunks": (4, ["parallel.virtual_pipeline=4"], "model.num_layers is 12, which is not a multiple of parallel.pipeline * parallel.virtual_pipeline = 8"),
    "own layers without pipeline": (2, ["parallel.pipeline=1", "parallel.first_stage_layers=4"], "parallel.first_stage_layers is 4, but parallel.pipeline is 1, so that one stage has all layers: set it to null, or pipeline to 2"),
    "first stage takes all": (4, ["parallel.first_stage_layers=12"], "parallel.first_stage_layers is 12, which leaves none of model.num_layers = 12 for the other stages of parallel.pipeline = 2"),
    "last stage takes more": (4, ["parallel.last_stage_layers=13"], "parallel.last_stage_layers is 13, which leaves none of model.num_layers = 12"),
    "both stages take all": (6, ["parallel.pipeline=3", "parallel.first_stage_layers=5", "parallel.last_stage_layers=7"], "parallel.first_stage_layers + parallel.last_stage_layers is 12, which leaves none of model.num_layers = 12 for the other stages of parallel.pipeline = 3"),
    "two stages, too few layers": (4, ["parallel.first_stage_layers=5", "parallel.last_stage_layers=6"], "parallel.first_stage_layers + parallel.last_stage_layers is 11, but model.num_layers is 12 and parallel.pipeline = 2 has no other stage"),
    "two stages, too many layers": (4, ["parallel.first_stage_layers=6", "parallel.last_stage_layers=7"], "is 13, but model.num_layers is 12 and parallel.pipeline = 2 has no other stage"),
    "two stages of chunks": (4, ["parallel.virtual_pipeline=2", "parallel.first_stage_layers=4", "parallel.last_stage_layers=8"], "where parallel.virtual_pipeline = 2 allows only one of them: set the other to null"),
    "rest by stages": (6, ["parallel.pipeline=3", "parallel.first_stage_layers=3"], "what parallel.first_stage_layers leaves of model.num_layers is 9, which is not a multiple of the other stages = 2"),
    "rest by chunks": (4, ["parallel.virtual_pipeline=2", "model.num_layers=13", "parallel.first_stage_layers=4"], "what parallel.first_stage_layers leaves of model.num_layers is 9, which is not a multiple of the other stages * parallel.virtual_pipeline = 2"),
    "first stage by chunks": (4, ["parallel.virtual_pipeline=2", "model.num_layers=13", "parallel.first_stage_layers=5"], "parallel.first_stage_layers is 5, which is not a multiple of parallel.virtual_pipeline = 2"),
    "last stage by chunks": (4, ["parallel.virtual_pipeline=2", "model.num_layers=13", "parallel.last_stage_layers=5"], "parallel.last_stage_layers is 5, which is not a multiple of parallel.virtual_pipeline = 2"),
    "one chunk": (4, ["parallel.virtual_pipeline=1"], "parallel.virtual_pipeline is 1, which means no interleaving; write null"),
    "chunks without pipeline": (2, ["parallel.pipeline=1", "parallel.virtual_pipeline=2"], "parallel.virtual_pipeline is 2, but parallel.pipeline is 1"),
    "microbatches of chunks": (4, ["parallel.virtual_pipeline=2", "train.global_batch_size=15"], "must be a multiple of parallel.pipeline = 2, but train.global_batch_size / (micro_batch_size * data-parallel size) is 15"),
    "batch": (8, ["train.global_batch_size=15"], "train.global_batch_size is 15, which is not a multiple of train.micro_batch_size * data-parallel size = 1 * 2"),
    "micro batch": (4, ["train.micro_batch_size=5"], "train.micro_batch_size * data-parallel size = 5 * 1"),
    "no length": (4, ["train.steps=null"], "train.steps or train.samples, but neither is given"),
    "two lengths": (4, ["train.samples=32"], "train.steps or train.samples, but both are given"),
    "less than a step": (4, ["train.steps=null", "train.samples=15"], "train.samples is 15, less than one step of train.global_batch_size = 16"),
    "window": (4, ["model.gengram.window=5"], "model.gengram.window is 5, too small for the 6-mers"),
    "window beyond the sequence": (4, ["model.gengram.window=514"], "model.gengram.window is 514, more than model.seq_length = 512: make it at most 512"),
    "hashing without hashed tables": (4, ["model.gengram.hashing.seed=1"], "model.gengram.hashing is given, but no k of model.gengram.kmer_sizes is above 8"),
    "kernel without a convolution": (4, ["model.gengram.output=norm", "model.gengram.conv_kernel=3"], "model.gengram.conv_kernel is 3, but model.gengram.output is norm"),
    "layer out of range": (4, ["model.gengram.layers=[3,13]"], "model.gengram.layers names [13], but model.num_layers is 12"),
    "layer repeated": (4, ["model.gengram.layers=[3,3]"], "model.gengram.layers is [3, 3]; name each layer once"),
    "no layers": (4, ["model.gengram.layers=[]"], "model.gengram.layers is empty"),
    "k repeated": (4, ["model.gengram.kmer_sizes=[1,1]"], "model.gengram.kmer_sizes is [1, 1]; write [1]"),
    "k unsorted": (4, ["model.gengram.kmer_sizes=[2,1]"], "model.gengram.kmer_sizes is [2, 1]; write [1, 2]"),
    "table columns": (4, ["model.gengram.dim=63"], "model.gengram.dim is 63, which is not a multiple of parallel.tensor = 2"),
    "token repeated": (4, ["model.gengram.token_ids=[8,5,6,7,7]"], "model.gengram.token_ids is [8, 5, 6, 7, 7]"),
    "token beyond": (4, ["model.gengram.token_ids=[8,5,6,7,256]"], "but model.vocab_size is 256; ids go from 0 to 255"),
    "learning rates": (4, ["optimizer.min_lr=0.1"], "optimizer.min_lr is 0.1, above optimizer.lr = 0.0001"),
    "warm-up": (4, ["optimizer.decay_fraction=0.01"], "optimizer.warmup_fraction is 0.05, more than optimizer.decay_fraction = 0.01"),
    "gather without shards": (4, ["parallel.pipeline=1", "optimizer.overlap_param_gather=true", "optimizer.overlap_grad_reduce=true", "optimizer.distributed=false"], "optimizer.overlap_param_gather needs optimizer.distributed"),
    "gather without reduce": (4, ["optimizer.overlap_param_gather=true"], "optimizer.overlap_param_gather needs optimizer.overlap_grad_reduce"),
}  # fmt: skip


@pytest.mark.parametrize("world_size, words, says", REFUSED.values(), ids=REFUSED)
def test_refused(config, world_size, words, says):
    with pytest.raises(UserError) as caught:
        check_layout(config(words), world_size)
    (sentence,) = str(caught.value).splitlines()
    assert says in sentence


def test_all_problems_are_told_at_once(config):
    words = ["model.num_layers=13", "model.gengram.window=3", "train.samples=3"]
    with pytest.raises(UserError) as caught:
        check_layout(config(words), 3)
    assert len(str(caught.value).splitlines()) == 5  # both lengths, and samples below a step


def test_resolved(config):
    assert check_layout(config([]), 8).sizes() == {
        "world_size": 8, "tensor": 2, "pipeline": 2, "virtual_pipeline": None, "context": 1,
        "expert": 1, "expert_tensor": 2, "sequence": True, "data": 2, "expert_data": 2,
        "num_microbatches": 8, "steps": 2, "samples": 32,
    }  # fmt: skip


ALLOWED = {
    "one process": (1, ["parallel.tensor=1", "parallel.pipeline=1"], {"sequence": False, "data": 1}),
    "dense without sequence": (4, [*DENSE, "parallel.sequence=false"], {"sequence": False}),
    "mha": (4, ["model.attention=mha", "model.num_query_groups=8"], {}),
    "mla": (4, [*MLA, "model.hidden_size=104"], {}),  # 104 / 8 is odd, which mla does not mind
    "chunks": (4, ["parallel.virtual_pipeline=3"], {"virtual_pipeline": 3}),
    "uneven stages": (4, ["model.num_layers=13", "parallel.first_stage_layers=5"], {"pipeline": 2}),
    "all stages of their own": (4, ["parallel.first_stage_layers=5", "parallel.last_stage_layers=7"], {}),
    "expert ranks": (8, ["parallel.expert=4", "parallel.expert_tensor=1"], {"expert_data": 1, "data": 2}),
    "context": (8, ["parallel.context=2"], {"context": 2, "data": 1, "expert_data": 2}),
    "samples": (4, ["train.steps=null", "train.samples=47"], {"steps": 2, "samples": 32}),
    "no window": (4, ["model.gengram.window=null"], {}),
    "window of the whole sequence": (4, ["model.gengram.window=512"], {}),
    "hashed tables of their own": (4, ["model.gengram.kmer_sizes=[6,9]", "model.gengram.hashing.rows=5000"], {}),
    "memory off": (4, ["model.gengram.enabled=false", "model.gengram.layers=[99]"], {}),
}  # fmt: skip


@pytest.mark.parametrize("world_size, words, expected", ALLOWED.values(), ids=ALLOWED)
def test_allowed(config, world_size, words, expected):
    layout = check_layout(config(words), world_size)
    assert {name: getattr(layout, name) for name in expected} == expected


ENVIRONMENTS = {
    "none": ({}, (1, 0)),
    "torchrun": ({"WORLD_SIZE": "4", "RANK": "3"}, (4, 3)),
    "srun": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, (8, 0)),
    "sbatch": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "SLURM_NTASKS=8, but srun did not"),
    "sbatch of one task": ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (1, 0)),
    "shell of salloc": (
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
        "SLURM_NTASKS=2, but srun did not",
    ),
    "torchrun in srun": (
        {"WORLD_SIZE": "4", "RANK": "3", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        (4, 3),
    ),
    "half": ({"WORLD_SIZE": "4"}, "the environment has WORLD_SIZE but not RANK"),
    "other half": ({"SLURM_PROCID": "4"}, "the environment has SLURM_PROCID but not SLURM_NTASKS"),
    "word": ({"WORLD_SIZE": "four", "RANK": "0"}, "WORLD_SIZE=four and RANK=0"),
    "negative": ({"WORLD_SIZE": "4", "RANK": "-1"}, "WORLD_SIZE=4 and RANK=-1"),
    "beyond": ({"WORLD_SIZE": "4", "RANK": "4"}, "RANK must be a whole number from 0"),
}


@pytest.mark.parametrize("variables, expected", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_world_size_from_environment(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert world_size_from_environment() == expected
    else:
        with pytest.raises(UserError, match=expected):
            world_size_from_environment()
