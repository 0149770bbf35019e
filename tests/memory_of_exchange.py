"""How much memory a checkpoint of many tensors takes to write, export and import: prints the
growth of this process's peak in bytes, for each, and the size of the model.

memory_of_exchange.py FOLDER
"""

import json
import sys
from pathlib import Path

import safetensors.torch  # noqa: F401  what is imported is not to be counted
import tokenizers  # noqa: F401
import torch

from gengram_megatron.checkpoint import weights_only
from gengram_megatron.checkpoint.exchange.export import export
from gengram_megatron.checkpoint.exchange.importing import import_model
from gengram_megatron.checkpoint.exchange.names import huggingface_weights
from gengram_megatron.checkpoint.store import FORMAT, CheckpointStore, Facts
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from tests.memory import peak_memory

FILE = 16_000_000


def main(folder: Path) -> None:
    config = load_config(folder / "large.yaml", [f"run.dir={folder / 'back'}"], Config)
    shapes = {weight.key: weight.shape for weight in huggingface_weights(config.model)}
    source = weights_only.Source(
        shapes,
        dict.fromkeys(shapes, torch.float32),
        lambda name: torch.full(shapes[name], float(len(name))),
    )
    facts = Facts(format=FORMAT, step=1, samples=1, seed=1, layout={})
    common = {"config": config.model_dump(), "step": 1}
    store, grown = CheckpointStore(folder / "checkpoints"), {}
    for name, action in {
        "write": lambda: weights_only.write(store, source, common, facts),
        "export": lambda: export(store.path(1), folder / "out", FILE),
        "import": lambda: import_model(folder / "out", config),
    }.items():
        before = peak_memory()
        action()
        grown[name] = peak_memory() - before
    model = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    print(json.dumps({"model": model, **grown}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
