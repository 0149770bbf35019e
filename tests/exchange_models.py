"""Tiny models of all kinds that are exported and imported: a checkpoint and the answers of each."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.config.layout import Layout, check_layout, with_gengram
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.tokenizer import BASE_IDS, EOD
from tests.training.tiny import DENSE, MHA, write_config

LENGTH = 64
PLAIN = ("model.gengram.enabled=false",)
OPTIONS = (
    "model.gengram.kmer_sizes=[1, 3, 4, 9]",
    "model.gengram.hashing={rows: 500, heads: 2}",
    "model.gengram.share_reverse_complements=true",
    "model.gengram.deduplicate=true",
    "model.gengram.reset_at_document=true",
    "model.gengram.signed_sqrt=false",
)
KINDS = {
    "dense_mha": (*PLAIN, *DENSE, *MHA, "model.rotary_base=500000"),
    "dense_gqa": (*PLAIN, *DENSE, "model.norm_epsilon=0.01"),
    "moe_gqa": PLAIN,
    "moe_top3": (*PLAIN, *MHA, "model.moe_router_topk=3"),
    "moe_memory": (),
    "dense_memory": DENSE,
    "options": (*DENSE, *OPTIONS),
    "norm": (*DENSE, "model.gengram.output=norm", "model.gengram.window=null"),
    "plain": (*MHA, "model.gengram.output=plain", "model.gengram.window=6"),
    "bias": (*DENSE, "model.gengram.projection_bias=true"),
    # Dense: with experts, a rounding may send a token to another one.
    "bf16": (*DENSE, "train.precision=bf16"),
    "mla": (*PLAIN, "model.attention=mla", "model.num_query_groups=null"),
    "top1": (*PLAIN, "model.moe_router_topk=1"),
}


@dataclass(frozen=True)
class Trained:
    """A model whose checkpoint lies in `run`, its weights by our names, and what it answers.

    tokens: [b, s], with an EOD in the middle; logits: [b, s, v]; hidden: [b, s, h], what leaves
    the last layer.
    """

    config: Config
    run: Path
    weights: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor
    hidden: Tensor


def run_alone(folder: Path, *words: str, timeout: int = 300) -> str:
    """What Python prints of `words` in a folder, in a process that has nothing of this package and
    no network; it must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def load(folder: Path, run: str, *words: str) -> Config:
    """The tiny config with `words`, run.dir in the folder."""
    file = folder / "tiny.yaml"
    write_config(file, folder / "no_data")
    settings = [f"run.dir={folder / run}", "checkpoint.asynchronous=false", *words]
    return load_config(file, settings, Config)


def make(kind: str, folder: Path, step: int = 3) -> Trained:
    """Build and save a model. megatron-core's groups must be there."""
    from gengram_megatron.engine.checkpoint.state import TrainingState

    config = load(folder, kind, *KINDS[kind])
    layout = check_layout(config, 1)
    chunks, optimizer, schedule = build(config, layout)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            if parameter.ndim == 1:  # norms, all ones at the start, could be mistaken
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    optimizer.reload_model_params()
    state = TrainingState(config, layout, chunks, optimizer, schedule, [])
    state.contents.make_optimizer_states()
    state.save(step)
    tokens = torch.tensor(BASE_IDS)[torch.randint(5, (2, LENGTH), generator=generator)]
    tokens[:, 30] = EOD
    logits, hidden = answers(chunks[0], config, tokens)
    return Trained(config, Path(config.run.dir), named(chunks[0]), tokens, logits, hidden)


def build(config: Config, layout: Layout):
    """Model chunks, wrapped; optimizer; schedule."""
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer, build_schedule

    chunks = wrap_for_data_parallelism(
        build_model(config, with_gengram(layout, config)), config, layout
    )
    optimizer = build_optimizer(config, chunks)
    return chunks, optimizer, build_schedule(config, layout, optimizer)


def named(chunk) -> dict[str, Tensor]:
    """Copies of a model's weights, by the names that checkpoints have."""
    return {name: weight.detach().clone() for name, weight in _parameters(chunk)}


def _parameters(chunk) -> Iterator[tuple[str, Tensor]]:
    for name, weight in chunk.named_parameters():
        yield name.replace("module.", ""), weight


@torch.no_grad()
def answers(chunk, config: Config, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the hidden state after the last layer, batch first, in float32."""
    from megatron.core.utils import unwrap_model

    chunk.eval()
    seen = []
    last = unwrap_model(chunk).decoder.layers[-1]
    hook = last.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    logits = chunk(tokens)
    hook.remove()
    return logits.float(), seen[0].transpose(0, 1).float()
