"""How much memory it takes to export, import and strip a model, as a share of its largest tensor.

    python benchmarks/exchange_memory.py [--hidden 1536] [--layers 12] [--experts 8] [--width 4608]
        [--plain] [--dir D] [--out F]

A mixture of experts in bf16, by default of 2.1 B parameters, exported to transformers and imported
from there, from a distributed checkpoint of Megatron-LM whose experts are stored as one tensor a
layer, and from the files of two tensor-parallel ranks. Every import must give back the checkpoint
that was exported, file for file. --plain: without Gengram memory, so that the export is a Mixtral
whose experts are a tensor each. Takes three times the model's size on the disk of --dir.

Each action runs in a process of its own, forked when all is imported:

- own: the most memory that it had of its own, above what it began with (RssAnon, looked at every
  millisecond). Pages of files that are only mapped are not in it: the kernel takes them back
  whenever it needs memory
- resident: with those pages (VmHWM). Files of ranks stay mapped until the import ends
- seconds: until all is flushed to the disk and, of checkpoints, has checksums
"""

import argparse
import json
import math
import multiprocessing
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint import weights_only
from gengram_megatron.engine.exchange.export import export
from gengram_megatron.engine.exchange.importing import import_model
from gengram_megatron.engine.exchange.names import huggingface_weights, megatron_weights
from gengram_megatron.engine.exchange.weights import Part, Weight
from gengram_megatron.runs import store
from gengram_megatron.runs.store import FORMAT, CheckpointStore, Facts, read_checksums

RANKS = 2
FACTS = Facts(format=FORMAT, step=0, samples=0, seed=1, layout={})
_FORK = multiprocessing.get_context("fork")
_NOISE = torch.randn(2**20, generator=torch.Generator().manual_seed(1)).bfloat16()


def config_of(arguments: argparse.Namespace, folder: Path) -> Config:
    """A model whose size is that of its experts; what is imported goes to `folder`."""
    return Config.model_validate(
        {
            "run": {"dir": str(folder)},
            "model": {
                "hidden_size": arguments.hidden,
                "num_layers": arguments.layers,
                "num_attention_heads": arguments.hidden // 64,
                "num_query_groups": arguments.hidden // 128,
                "ffn_hidden_size": arguments.width,
                "num_experts": arguments.experts,
                "seq_length": 1024,
                "gengram": {
                    "enabled": not arguments.plain,
                    "layers": [1],
                    "dim": arguments.hidden // 8,
                },
            },
            "data": {"path": "unused"},
            "train": {"global_batch_size": 1, "steps": 1, "precision": "bf16"},
        }
    )


def draw(weight: Weight) -> Tensor:
    """Numbers that depend on the weight's name, in its shape."""
    noise, size = _NOISE.roll(zlib.crc32(weight.key.encode())), math.prod(weight.shape)
    return noise.repeat(-(-size // len(noise)))[:size].clone().view(weight.shape)


def write_ours(folder: Path, config: Config) -> Path:
    """The checkpoint that is exported, in a folder of checkpoints; returns it."""
    weights = huggingface_weights(config.model)
    return write(folder, config, {weight.key: (weight, None) for weight in weights})


def write_distributed(folder: Path, config: Config) -> Path:
    """A checkpoint by Megatron-LM's names, experts in one tensor; returns it."""
    tensors: dict[str, tuple[Weight, Part | None]] = {}
    for weight in megatron_weights(config.model):
        if ".mlp.experts." in weight.key:
            joined = (len(weight.parts), *weight.parts[0].shape)
            name = weight.key.replace(".experts.", ".experts.experts.")
            tensors[name] = replace(weight, shape=joined), None
        else:
            tensors |= {part.name: (weight, part) for part in weight.parts}
    written = write(folder, config, tensors)
    (written / store.FACTS).unlink()  # by which it would be known as one of ours
    return written


def write(folder: Path, config: Config, tensors: dict[str, tuple[Weight, Part | None]]) -> Path:
    """A checkpoint of drawn tensors, one after the other: each a weight of ours or a part of it."""

    def read(name: str) -> Tensor:
        weight, part = tensors[name]
        return draw(weight) if part is None else dict(weight.split(draw(weight)))[name].clone()

    shapes = {name: (part or weight).shape for name, (weight, part) in tensors.items()}
    source = weights_only.Source(shapes, dict.fromkeys(shapes, torch.bfloat16), read)
    common = {"config": config.model_dump(), "step": 0}
    return weights_only.write(CheckpointStore(folder), source, common, FACTS)


def write_ranks(folder: Path, config: Config) -> Path:
    """As tensor-parallel ranks of Megatron-LM wrote it."""
    for rank in range(RANKS):
        model = {
            name: share(name, tensor, rank)
            for weight in megatron_weights(config.model)
            for name, tensor in weight.split(draw(weight))
        }
        file = folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"model": model}, file)
    return folder


def share(name: str, tensor: Tensor, rank: int) -> Tensor:
    """What one rank has of a tensor, a copy."""
    if re.search(r"linear_fc1\.weight$", name):  # of the gate and of the up-projection
        parts = [half.chunk(RANKS)[rank] for half in tensor.chunk(2)]
    elif re.search(r"(word_embeddings|output_layer|linear_qkv)\.weight$", name):
        parts = [tensor.chunk(RANKS)[rank]]
    elif re.search(r"(linear_proj|linear_fc2)\.weight$", name):
        parts = [tensor.chunk(RANKS, dim=1)[rank]]
    else:
        parts = [tensor]
    return torch.cat(parts).clone()


def measure(action: Callable[[], object]) -> dict[str, float]:
    """own, resident (bytes) and seconds of an action, in a process of its own."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_act, args=(action, sender))
    process.start()
    base, own = memory_of(process.pid)["RssAnon"], 0
    while process.is_alive():
        own = max(own, memory_of(process.pid).get("RssAnon", 0) - base)
        process.join(0.001)
    if process.exitcode:
        raise SystemExit("what was to be measured has failed, see above")
    return {"own": own, **receiver.recv()}


def _act(action: Callable[[], object], sender: Connection) -> None:
    base, began = memory_of("self")["VmRSS"], time.perf_counter()
    action()
    seconds = time.perf_counter() - began
    sender.send({"resident": memory_of("self")["VmHWM"] - base, "seconds": seconds})


def memory_of(process: int | str) -> dict[str, int]:
    """Bytes by the kernel's name; none of a process that has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    return {name: 1024 * int(kb) for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)}


def run(arguments: argparse.Namespace, folder: Path) -> dict:
    """All actions, each with its measurements. What it writes is removed when it was used."""
    config = config_of(arguments, folder / "imported")
    weights = huggingface_weights(config.model)
    measure(lambda: write_ours(folder / "ours", config))
    ours = CheckpointStore(folder / "ours").path(0)
    exported = folder / "exported"
    actions = {"export": measure(lambda: export(ours, exported))}

    def import_from(path: Path) -> dict[str, float]:
        measured = measure(lambda: import_model(path, config))
        check_same(ours, CheckpointStore(folder / "imported" / "checkpoints").path(0))
        shutil.rmtree(folder / "imported")
        shutil.rmtree(path)
        return measured

    actions["import of the export"] = import_from(exported)
    measure(lambda: write_distributed(folder / "theirs", config))
    theirs = CheckpointStore(folder / "theirs").path(0)
    actions["import, distributed"] = import_from(theirs)
    measure(lambda: write_ranks(folder / "ranks", config))
    actions["import, rank files"] = import_from(folder / "ranks")
    actions["strip"] = measure(lambda: weights_only.strip(ours, folder / "stripped"))
    check_same(ours, CheckpointStore(folder / "stripped").path(0))
    return {
        "parameters": sum(math.prod(weight.shape) for weight in weights),
        "largest_tensor": 2 * max(math.prod(weight.shape) for weight in weights),
        "actions": actions,
    }


def check_same(expected: Path, found: Path) -> None:
    """The same tensors, by the checksums of their files."""
    first, second = (
        sorted(digest for name, digest in read_checksums(path).items() if name.endswith(".distcp"))
        for path in (expected, found)
    )
    assert first == second, f"{found} has other weights than {expected}"


def show(results: dict) -> None:
    """One table."""
    largest, parameters = results["largest_tensor"], results["parameters"]
    title = f"{parameters / 1e9:.2f} B parameters in bf16, largest tensor {largest / 1e6:,.0f} MB"
    table = Table(title=title)
    for heading in ("", "own MB", "of the largest", "resident MB", "seconds", "GB/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in results["actions"].items():
        table.add_row(
            name,
            f"{row['own'] / 1e6:,.0f}",
            f"{row['own'] / largest:.2f}",
            f"{row['resident'] / 1e6:,.0f}",
            f"{row['seconds']:.1f}",
            f"{2 * parameters / row['seconds'] / 1e9:.2f}",
        )
    Console().print(table)


def main() -> None:
    """The table on the screen, its numbers in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--width", type=int, default=4608)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--dir", type=Path, help="null: the system's folder for temporary files")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        # A small one first, in this process: what is imported on the way is not to be counted.
        small = argparse.Namespace(hidden=128, layers=1, experts=2, width=64, plain=arguments.plain)
        config = config_of(small, Path(folder) / "imported")
        ours = write_ours(Path(folder) / "small", config)
        export(ours, Path(folder) / "exported")
        import_model(Path(folder) / "exported", config)
        for path in Path(folder).iterdir():
            shutil.rmtree(path)
        results = run(arguments, Path(folder))
    show(results)
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": "CPU", **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
