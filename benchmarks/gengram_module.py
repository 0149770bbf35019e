"""The Gengram module against one written from the formula the obvious way.

    python benchmarks/gengram_module.py [--hidden 1024,4096] [--lengths 2048,8192,32768]
        [--dtypes bf16,fp32] [--repeats 3] [--out FILE.json]

The obvious module looks every k-mer up, takes prefix sums along the sequence in the training dtype
and the difference of two of them, with whole tables on every rank: (a) in bf16, (b) in float32.
Ours runs in both, with features projected and with tables projected once a step. On real DNA
(sample_data), batch 1, d_m 1024, window 21, on the GPU where there is one. Each figure is the
median of --repeats runs, the modules taking turns within a repeat, so that a noisy machine is noisy
for all; times are given as ratios to the obvious module of the same dtype.

- forward, backward: seconds of a microbatch, and their ratio
- once a step: seconds to project the tables, and to take their gradient apart
- from: tokens a step, in microbatches of this length, from which projected tables are faster than
  projected features
- saved: bytes kept between forward and backward, parameters and inputs not counted
- peak: most bytes held in a step of one microbatch, gradients and projected tables among them
- errors: of the pooled features, and of key and value, relative by norm, against float64
"""

import argparse
import copy
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
from gengram_megatron.config.tables import Placement, direct_table
from gengram_megatron.engine.model.gengram.ids import KmerIds
from gengram_megatron.engine.model.gengram.memory import GengramMemory
from gengram_megatron.engine.model.gengram.pooling import Pooling, pooled_features
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.initialize import InitDistribution, init_tag
from gengram_megatron.engine.model.sequence import TokenRange
from gengram_megatron.engine.processes import end_processes, start_processes
from gengram_megatron.tokenizer import BASE_IDS

SIZES, WINDOW, KERNEL, DIM, EPSILON = (1, 2, 3, 4, 5, 6), 21, 4, 1024, 1e-5
PLACEMENTS = tuple(Placement(direct_table(k, DIM), None, "one process") for k in SIZES)
TABLES = tuple(place.table for place in PLACEMENTS)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OBVIOUS = "obvious"
WIDTH = 200  # columns of a table in a file
LONGEST_EXACT = 8192  # positions whose errors are taken; float64 is slow
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


def our_module(hidden: int, dtype: torch.dtype, project: str) -> GengramMemory:
    """The module of this package, on this process alone."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        layernorm_epsilon=EPSILON,
        params_dtype=dtype,
        init_method=init_tag(InitDistribution(std=0.02)),
    )
    shape = GengramShape(
        PLACEMENTS, DIM, WINDOW, KERNEL, init="scaled", init_std=0.02, project=project
    )
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
    """One step of one microbatch: seconds of each part, and bytes saved for the backward pass."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}
    own |= {hidden.untyped_storage().data_ptr()}
    own |= {x.untyped_storage().data_ptr() for x in ids.ids}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    module.zero_grad(set_to_none=True)
    projected = getattr(module, "projected", None)
    peak = PeakMemory()
    start = now()
    if projected is not None:
        projected.refresh()
    ready = now()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = module(hidden, ids)
    middle = now()
    out.backward(torch.ones_like(out))
    end = now()
    if projected is not None:
        projected.finish_gradients()
    return {
        "forward": middle - ready,
        "backward": end - middle,
        "step": now() - end + ready - start,
        "saved": sum(kept.values()),
        "peak": peak.bytes(),
    }


class PeakMemory:
    """Most bytes held since it was made, less those held then."""

    def __init__(self):
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again
            self.before = self._resident("VmRSS")

    def bytes(self) -> int:
        """So far."""
        most = torch.cuda.max_memory_allocated() if self.on_gpu else self._resident("VmHWM")
        return most - self.before

    @staticmethod
    def _resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024


def now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def relative(x: Tensor, right: Tensor) -> float:
    """Distance from what is right, relative by norm."""
    return ((x.double() - right).norm() / right.norm()).item()


def compare(
    hidden: int, length: int, dtypes: list[str], repeats: int
) -> dict[str, dict[str, float]]:
    """All modules at one size."""
    device = torch.cuda.current_device()
    torch.manual_seed(0)
    weights = ObviousGengram(hidden).to(device)
    for table in weights.tables:
        nn.init.normal_(table.weight, std=0.02)
    weights.bfloat16()  # exact in both dtypes
    modules = {}
    for name in dtypes:
        obvious = ObviousGengram(hidden).to(device, DTYPES[name])
        obvious.load_state_dict(weights.state_dict())
        modules[f"{OBVIOUS} {name}"] = obvious
        for project in ("features", "tables"):
            ours = our_module(hidden, DTYPES[name], project)
            copy_weights(ours, weights)
            modules[f"ours, {project} {name}"] = ours
    ids = KmerIds.from_tokens(read_tokens(length).to(device), TABLES, list(BASE_IDS))
    x = torch.randn(length, 1, hidden, device=device)
    runs = {name: [] for name in modules}
    for repeat in range(repeats + 1):
        for name, module in modules.items():
            dtype = next(module.parameters()).dtype
            found = measure(module, x.to(dtype).requires_grad_(), ids)
            if repeat:  # the first warms up
                runs[name].append(found)
    result = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    for name, found in errors(modules, weights, ids).items():
        result[name].update(found)
    return result


@torch.no_grad()
def errors(
    modules: dict[str, nn.Module], weights: ObviousGengram, ids: KmerIds
) -> dict[str, dict[str, float]]:
    """Of each module's pooled features, and of its keys and values, against float64."""
    ids = KmerIds(tuple(x[:, :LONGEST_EXACT] for x in ids.ids), TABLES)
    pieces = [TokenRange(0, ids.seq_length)]
    exact = copy.deepcopy(weights).double()
    right = exact.pooled(ids)
    right_kv = torch.cat([exact.key(right), exact.value(right)], dim=-1)
    found = {}
    for name, module in modules.items():
        features = None
        if not isinstance(module, GengramMemory):
            features = module.pooled(ids)
            key_value = torch.cat([module.key(features), module.value(features)], dim=-1)
        elif module.projected is None:
            rows, places = module.tables(ids, pieces)
            features = pooled_features(
                rows, places, TABLES, Pooling(WINDOW), pieces, documents=None
            )
            key_value = F.linear(features, module.projection.weight.flatten(2).flatten(0, 1))
        else:
            key_value = module.projected.key_value(ids, pieces)
            module.projected.finish_gradients()
        found[name] = {"error": relative(key_value, right_kv)}
        if features is not None:
            found[name]["features_error"] = relative(features, right)
    return found


def break_even(result: dict[str, dict[str, float]], dtype: str, length: int) -> float:
    """Tokens a step from which projected tables are faster than projected features."""
    features, tables = (result[f"ours, {project} {dtype}"] for project in ("features", "tables"))
    saved = sum(features[key] - tables[key] for key in ("forward", "backward"))
    return tables["step"] / saved * length if saved > 0 else float("inf")


def show(hidden: int, length: int, result: dict[str, dict[str, float]]) -> None:
    """One table a size."""
    table = Table(title=f"hidden {hidden:,}, {length:,} positions")
    table.add_column("module", no_wrap=True)
    for heading in ("forward s", "ratio", "backward s", "ratio", "once a step s", "from tokens"):
        table.add_column(heading, justify="right")
    for heading in ("saved MB", "ratio", "peak MB", "ratio", "features error", "key, value error"):
        table.add_column(heading, justify="right")
    for name, row in result.items():
        dtype = name.split()[-1]
        base, cells = result[f"{OBVIOUS} {dtype}"], [name]
        for key in ("forward", "backward"):
            cells += [f"{row[key]:.3g}", f"{row[key] / base[key]:.3f}"]
        once = row["step"] and "tables" in name
        cells += [f"{row['step']:.3g}" if once else ""]
        cells += [f"{break_even(result, dtype, length):,.0f}" if once else ""]
        for key in ("saved", "peak"):
            cells += [f"{row[key] / 1e6:.3g}", f"{row[key] / base[key]:.3f}"]
        cells += [f"{row['features_error']:.1e}" if "features_error" in row else ""]
        table.add_row(*cells, f"{row['error']:.1e}")
    console = Console()
    Console(width=None if console.is_terminal else WIDTH).print(table)


def main() -> None:
    """All sizes, on the screen and in a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", default="1024,4096", help="widths of the model")
    parser.add_argument("--lengths", default="2048,8192,32768", help="positions of a microbatch")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the measurements as JSON, after each size")
    arguments = parser.parse_args()
    sizes = [
        (hidden, length)
        for hidden in map(int, arguments.hidden.split(","))
        for length in map(int, arguments.lengths.split(","))
    ]
    start_processes(Layout(1, 1, 1, None, 1, 1, 1, False, 1, 1, 1, 1, 1), seed=1, rank=0)
    results = []
    for hidden, length in sizes:
        result = compare(hidden, length, arguments.dtypes.split(","), arguments.repeats)
        show(hidden, length, result)
        results.append({"hidden": hidden, "length": length, "modules": result})
        if arguments.out:
            found = {"device": device(), "threads": torch.get_num_threads(), "sizes": results}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    end_processes()


def device() -> str:
    """The GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
