"""One line for each thing that is missing here and would make training faster."""

from collections.abc import Iterator
from pathlib import Path

from gengram_megatron.config.schema import Config


def advice(found: dict, config: Config | None) -> Iterator[str]:
    """found: all that examine found out."""
    software, devices = found["software"], found["devices"]
    for name, one in software.items():
        if one["error"]:
            yield f"{name} is installed, but cannot be imported: mend it, or remove it"
    if devices is None:
        return
    if not devices["gpus"]:
        if devices["listed_by"] == "torch":
            yield _without_gpu(devices)
    else:
        yield from _missing(software)
    yield from _measured(found["measured"], devices, config)


def _without_gpu(devices: dict) -> str:
    there = any(Path("/proc/driver/nvidia/gpus").glob("*"))  # whether or not torch can use them
    if there and devices["cuda"] is None:
        return (
            "this machine has an NVIDIA GPU, but torch is built for the CPU: install a CUDA build"
        )
    if there:
        return "this machine has an NVIDIA GPU that torch cannot use: see nvidia-smi for its driver"
    return "there is no GPU, so all computes on the CPU: enough for the smoke runs only"


def _missing(software: dict) -> Iterator[str]:
    def lacks(name: str) -> bool:
        return software[name]["version"] is None

    if lacks("apex"):
        adam = ", and whose fused Adam megatron-core takes" if lacks("transformer-engine") else ""
        yield (
            "apex is missing, whose matrix products add gradients of weights to their sums"
            f"{adam}: build it with --cpp_ext and --cuda_ext"
        )
    if lacks("transformer-engine"):
        yield (
            "Transformer Engine is missing, with fused norms, attention, fp8 and Adam: pip install "
            "--no-build-isolation 'gengram-megatron[te]'"
        )
    if lacks("triton"):
        yield "Triton is missing, without which torch compiles nothing for GPUs: pip install triton"


def _measured(measured: dict | None, devices: dict, config: Config | None) -> Iterator[str]:
    product = measured and measured["matrix_product"]
    if not product or config is None or config.train.dtype != "bf16":
        return
    bf16, fp32 = product["tflops"]["bf16"], product["tflops"]["fp32"]
    if fp32 > bf16 and not devices["gpus"]:
        yield f"train.precision=fp32 computes {fp32 / bf16:.1f} times as fast here as bf16"
