"""The Gengram module against one written from the formula the obvious way.

    python benchmarks/gengram_module.py [--hidden 1024,4096] [--lengths 2048,8192,32768] [--out F]

The obvious module looks every k-mer up, takes prefix sums along the sequence in the training dtype
and the difference of two of them, with whole tables on every rank: (a) in bf16, (b) in float32.
Ours runs in bf16 and in float32. On real DNA (sample_data), batch 1, d_m 1024, window 21, on the
GPU where there is one. Each figure is the median of --repeats runs, the modules taking turns within
a repeat, so that a noisy machine is noisy for all; times are given as ratios to (a), or to (b) for
ours in float32.

- forward, backward: seconds, and their ratio
- saved: bytes kept between forward and backward, parameters and inputs not counted
- error: of the pooled features, relative by norm, against float64
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data_prep.fasta import read_fasta
from gengram_megatron.config.layout import Layout
from gengram_megatron.config.placement import Placement
from gengram_megatron.config.tables import direct_table
from gengram_megatron.model.gengram.ids import KmerIds
from gengram_megatron.model.gengram.memory import GengramMemory
from gengram_megatron.model.gengram.pooling import Pooling, pooled
from gengram_megatron.model.gengram.shape import GengramShape
from gengram_megatron.model.initialize import marker
from gengram_megatron.model.zigzag import Piece
from gengram_megatron.tokenizer import BASE_IDS
from gengram_megatron.training.processes import end_processes, start_processes

SIZES, WINDOW, KERNEL, DIM, EPSILON = (1, 2, 3, 4, 5, 6), 21, 4, 1024, 1e-5
PLACEMENTS = tuple(Placement(direct_table(k, DIM), None, "one process") for k in SIZES)
TABLES = tuple(place.table for place in PLACEMENTS)
DNA = Path(__file__).parents[1] / "sample_data/human_GRCh37_chr20_30M-34M.fa.gz"


class ObviousGengram(nn.Module):
    """The formula, line by line, with torch's own parts."""

    def __init__(self, hidden: int):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5**k, DIM) for k in SIZES)
        self.key = nn.Linear(len(SIZES) * DIM, hidden, bias=False)
        self.value = nn.Linear(len(SIZES) * DIM, hidden, bias=False)
        self.norm_hidden = nn.RMSNorm(hidden, EPSILON)
        self.norm_key = nn.RMSNorm(hidden, EPSILON)
        self.conv = nn.Conv1d(
            hidden, hidden, KERNEL, groups=hidden, dilation=max(SIZES), bias=False
        )

    def pooled(self, ids: KmerIds) -> Tensor:
        """[s, b, 6 d]: differences of prefix sums over the valid k-mers."""
        means = []
        for k, rows, table in zip(SIZES, ids.ids, self.tables):
            rows, span = rows.t().long(), WINDOW - k + 1
            valid = (rows < 5**k).unsqueeze(-1).to(table.weight.dtype)
            found = table(rows.clamp(max=5**k - 1)) * valid
            total, count = (
                x - F.pad(x, (0, 0, 0, 0, span, 0))[: len(x)]
                for x in (found.cumsum(0), valid.float().cumsum(0))
            )
            means.append(total / count.clamp(min=1).to(total.dtype))
        return torch.cat(means, dim=-1)

    def forward(self, hidden: Tensor, ids: KmerIds) -> Tensor:
        """hidden: [s, b, h]; returns what the layer adds to it."""
        features = self.pooled(ids)
        key, value = self.key(features), self.value(features)
        g = (self.norm_hidden(hidden) * self.norm_key(key)).sum(-1, keepdim=True)
        g = g / hidden.shape[-1] ** 0.5
        gated = torch.sigmoid(g.sign() * g.abs().clamp_min(1e-6).sqrt()) * value
        reach = (KERNEL - 1) * max(SIZES)
        convolved = self.conv(F.pad(gated.permute(1, 2, 0), (reach, 0))).permute(2, 0, 1)
        return gated + F.silu(convolved)


def our_module(hidden: int, dtype: torch.dtype) -> GengramMemory:
    """The module of this package, on this process alone."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        layernorm_epsilon=EPSILON,
        params_dtype=dtype,
        init_method=marker(0.02),
    )
    shape = GengramShape(PLACEMENTS, DIM, WINDOW, KERNEL, init_std=0.02)
    return GengramMemory(config, shape, ProcessGroupCollection.use_mpu_process_groups())


def copy_weights(ours: GengramMemory, obvious: ObviousGengram) -> None:
    """Give ours the other's weights."""
    with torch.no_grad():
        for k, table in zip(SIZES, obvious.tables):
            ours.tables.weights[f"k{k}"].copy_(table.weight)
        key, value = ours.projection.weight.flatten(2)
        key.copy_(obvious.key.weight)
        value.copy_(obvious.value.weight)
        ours.gate.norm_hidden.weight.copy_(obvious.norm_hidden.weight)
        ours.gate.norm_key.weight.copy_(obvious.norm_key.weight)
        ours.output.weight.copy_(obvious.conv.weight.squeeze(1).t())


def read_tokens(length: int) -> Tensor:
    """[1, length] of real DNA."""
    _, ids = next(read_fasta(DNA))
    return torch.from_numpy(ids[1_000_000 : 1_000_000 + length])[None]


def measure(module: nn.Module, hidden: Tensor, ids: KmerIds) -> dict[str, float]:
    """One forward and backward: seconds each, and bytes saved in between."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}
    own |= {hidden.untyped_storage().data_ptr()}
    own |= {x.untyped_storage().data_ptr() for x in ids.ids}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    module.zero_grad(set_to_none=True)
    start = now()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = module(hidden, ids)
    middle = now()
    out.backward(torch.ones_like(out))
    return {"forward": middle - start, "backward": now() - middle, "saved": sum(kept.values())}


def now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def relative(x: Tensor, right: Tensor) -> float:
    """Distance from what is right, relative by norm."""
    return ((x.double() - right).norm() / right.norm()).item()


def compare(hidden: int, length: int, repeats: int) -> dict[str, dict[str, float]]:
    """All four modules at one size."""
    device = torch.cuda.current_device()
    torch.manual_seed(0)
    obvious = {torch.bfloat16: ObviousGengram(hidden).to(device)}
    for table in obvious[torch.bfloat16].tables:
        nn.init.normal_(table.weight, std=0.02)
    state = obvious[torch.bfloat16].bfloat16().state_dict()
    obvious[torch.float32] = ObviousGengram(hidden).to(device)
    obvious[torch.float32].load_state_dict(state)
    modules = {
        "obvious bf16 (a)": obvious[torch.bfloat16],
        "obvious fp32 (b)": obvious[torch.float32],
    }
    for name, dtype in (("ours bf16", torch.bfloat16), ("ours fp32", torch.float32)):
        modules[name] = our_module(hidden, dtype)
        copy_weights(modules[name], obvious[torch.bfloat16])

    ids = KmerIds.of(read_tokens(length).to(device), TABLES, list(BASE_IDS))
    x = torch.randn(length, 1, hidden, device=device)
    runs = {name: [] for name in modules}
    for repeat in range(repeats + 1):
        for name, module in modules.items():
            dtype = next(module.parameters()).dtype
            found = measure(module, x.to(dtype).requires_grad_(), ids)
            if repeat:  # the first warms up
                runs[name].append(found)
    result = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    for name, error in errors(modules, ids).items():
        result[name]["error"] = error
    return result


@torch.no_grad()
def errors(modules: dict[str, nn.Module], ids: KmerIds) -> dict[str, float]:
    """Of the pooled features of each module, against the same tables in float64."""
    exact = ObviousGengram(1).double()
    found = {}
    for name, module in modules.items():
        if isinstance(module, GengramMemory):
            tables = module.tables.parameters()
            features = pooled(
                *module.tables(ids, [Piece(0, ids.seq_length)]),
                TABLES,
                Pooling(WINDOW),
                [Piece(0, ids.seq_length)],
                documents=None,
            )
        else:
            tables, features = [t.weight for t in module.tables], module.pooled(ids)
        for ours, table in zip(exact.tables, tables):
            ours.weight = nn.Parameter(table.double().cpu())
        cpu = KmerIds(tuple(x.cpu() for x in ids.ids), TABLES)
        found[name] = relative(features.cpu(), exact.pooled(cpu))
    return found


def show(hidden: int, length: int, result: dict[str, dict[str, float]]) -> None:
    """One table a size."""
    table = Table(title=f"hidden {hidden}, {length:,} positions")
    for heading in (
        "module",
        "forward s",
        "ratio",
        "backward s",
        "ratio",
        "saved MB",
        "ratio",
        "error",
    ):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for name, row in result.items():
        base = result["obvious bf16 (a)" if "bf16" in name else "obvious fp32 (b)"]
        cells = [name]
        for key, scale in (("forward", 1), ("backward", 1), ("saved", 1e-6)):
            cells += [f"{row[key] * scale:.3g}", f"{row[key] / base[key]:.2f}"]
        table.add_row(*cells, f"{row['error']:.1e}")
    Console().print(table)


def main() -> None:
    """All sizes, on the screen and in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", default="1024,4096")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [
        (hidden, length)
        for hidden in map(int, arguments.hidden.split(","))
        for length in map(int, arguments.lengths.split(","))
    ]
    start_processes(Layout(1, 1, 1, None, 1, 1, 1, False, 1, 1, 1, 1, 1), seed=1, rank=0)
    results = []
    for hidden, length in sizes:
        result = compare(hidden, length, arguments.repeats)
        show(hidden, length, result)
        results.append({"hidden": hidden, "length": length, "modules": result})
    end_processes()
    if arguments.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        text = {"device": device, "threads": torch.get_num_threads(), "sizes": results}
        arguments.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
