"""Put what scripts/gpu_check.sh did and measured into one JSON file.

    python benchmarks/gpu_report.py WORK [--out FILE]

WORK holds, for each step of the check, NAME.log and NAME.status (exit status and seconds), and the
folder runs with the runs smoke, gengram_true and gengram_false. Exits with 1 if a step failed.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.plan.time import PEAK_BF16_FLOPS, model_flops_utilisation, training_flops
from gengram_megatron.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 5
"""Steps at the start of a run that are not timed: memory is allocated, kernels are chosen."""
KEPT_LINES = 30


def machine() -> dict:
    """Versions and the device."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "megatron_core": _version("megatron-core"),
        "cuda": torch.version.cuda if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "device": torch.cuda.get_device_properties(0).name if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.partition("\n")[0] if done.returncode == 0 else None


def steps(work: Path) -> dict[str, dict]:
    """How each step of the check ended, in their order; of those that failed, the last lines."""
    found = {}
    for path in sorted(work.glob("*.status"), key=lambda path: path.stat().st_mtime_ns):
        status, seconds = map(int, path.read_text().split())
        lines = path.with_suffix(".log").read_text().splitlines()
        step = {"exit_status": status, "seconds": seconds}
        if path.stem.endswith("_tests"):
            step["result"] = lines[-1] if lines else ""
        if status:
            step["last_lines"] = lines[-KEPT_LINES:]
        found[path.stem] = step
    return found


def smoke(run: Path) -> dict | None:
    """The last validation of the smoke run; None: it has none."""
    validations = [e for e in _metrics(run) if e["kind"] == "validation"]
    if not validations:
        return None
    nats = validations[-1]["loss"]
    return {
        "step": validations[-1]["step"],
        "validation_nats_a_base": nats,
        "validation_bits_a_base": nats / math.log(2),
    }


def measured(run: Path, device: str | None) -> dict | None:
    """Speed, memory and utilisation of a run; None: it has no steps after those of warm-up."""
    timed = [e for e in _metrics(run) if e["kind"] == "train" and e["step"] > WARM_UP]
    if not timed:
        return None
    config = load_config(run / "config.yaml", [], Config)
    speed, flops = median(e["tokens_per_second"] for e in timed), training_flops(config)
    peak = PEAK_BF16_FLOPS.get(device)
    return {
        "timed_steps": len(timed),
        "tokens_per_second": speed,
        "seconds_a_step": median(e["seconds"] for e in timed),
        "peak_memory_bytes": max(e.get("peak_memory_bytes", 0) for e in timed) or None,
        "parameters": vars(count_parameters(config)),
        "flops_a_token": flops,
        "flops_a_second": speed * flops,
        "model_flops_utilisation": peak and model_flops_utilisation(speed, flops, peak),
        "seq_length": config.model.seq_length,
        "global_batch_size": config.train.global_batch_size,
        "recompute": config.train.recompute,
        "last_loss": timed[-1]["loss"],
    }


def _metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def report(work: Path) -> dict:
    """Everything."""
    about = machine()
    runs = {
        name: measured(work / "runs" / folder, about["device"])
        for name, folder in (("with_gengram", "gengram_true"), ("without_gengram", "gengram_false"))
    }
    peak = PEAK_BF16_FLOPS.get(about["device"])
    result = {
        "machine": {**about, "peak_bf16_flops": peak},
        "steps": steps(work),
        "smoke": smoke(work / "runs" / "smoke"),
        "moe_1.2b_8k": runs,
    }
    if all(runs.values()):
        slow, fast = (runs[name]["seconds_a_step"] for name in ("with_gengram", "without_gengram"))
        result["time_with_gengram_over_without"] = slow / fast
    if peak is None:
        result["note"] = (
            f"no utilisation: the peak of {about['device'] or 'a CPU'} is not in "
            "PEAK_BF16_FLOPS of gengram_megatron/plan/time.py"
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = report(arguments.work)
    name = re.sub(r"\W+", "_", (result["machine"]["device"] or "cpu").lower())
    out = arguments.out or ROOT / "benchmarks" / "results" / f"gpu_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'replacing' if out.exists() else 'writing'} {out}")
    beside = out.with_name(out.name + ".partial")
    beside.write_text(json.dumps(result, indent=2) + "\n")
    beside.replace(out)
    failed = [name for name, step in result["steps"].items() if step["exit_status"]]
    print(f"failed: {', '.join(failed)}" if failed else "all steps succeeded")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
