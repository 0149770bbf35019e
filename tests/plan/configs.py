"""The files under configs/ that are runs or sweeps."""

from functools import cache
from pathlib import Path

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PIECES = ("base", "data", "sweeps")


def is_run(path: Path) -> bool:
    return path.relative_to(CONFIGS).parts[0] not in PIECES


RUNS = {
    str(path.relative_to(CONFIGS).with_suffix("")): path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if is_run(path)
}
"""By name: ablation_50b_8k/baseline, ..."""
SWEEPS = sorted(CONFIGS.glob("sweeps/[!s]*.yaml"))
"""The sweep files, without what they share."""
PAPER = [name for name in RUNS if not name.startswith(("smoke/", "genos/"))]
GENOS = [name for name in RUNS if name.startswith("genos/")]


@cache
def load(name: str, *words: str) -> Config:
    """A run's config, with key=value words."""
    return load_config(RUNS[name], [*words], Config)
