"""Writes the metrics of a run to metrics.jsonl, TensorBoard and, if configured, Weights & Biases.

`metrics.jsonl` is the record that other programs read; the other two show the same numbers. JSON
cannot represent numbers that are not finite, so they are written as the strings "NaN", "Infinity"
and "-Infinity"; `read_metrics` converts them back into floats.

`UniformCheck` warns of a run that predicts bases no better than a uniform guess.
"""

import json
import math
from collections import deque
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Any
from uuid import uuid4

from gengram_megatron.config.schema import Config, WeightsAndBiases
from gengram_megatron.errors import UserError
from gengram_megatron.files import flush, replacing

FILE = "metrics.jsonl"
DISCARDED = "metrics.discarded.jsonl"
KINDS = ("train", "validation")
MAX_CONSECUTIVE_SKIPS = 10
"""With train.on_nan skip, a run ends after this many batches in a row were skipped."""
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class RunLog:
    """Writes the metrics of one run; only one rank of a job has one. It writes no file before the
    first metrics, so a job that trains nothing changes no file.

    A killed run may have written steps after its last checkpoint, which the resumed run repeats.
    Their lines are moved to metrics.discarded.jsonl, so that metrics.jsonl holds each step once.

    Args:
        run_dir: folder of the run; created if missing.
        config: config of the run, which is sent to Weights & Biases.
        resume_step: step of the loaded checkpoint; 0 without one.
    """

    def __init__(self, run_dir: Path, config: Config, resume_step: int):
        self._run_dir, self._config, self._resume_step = Path(run_dir), config, resume_step
        self._path = self._run_dir / FILE
        # Errors that would occur when the first metrics are written are raised before training.
        if config.logging.wandb:
            _import_wandb()
        if self._path.exists():
            read_metrics(self._path)
            self._path.open("a").close()
        self.written = False

    def open(self) -> None:
        """Opens the files. Writing the first metrics does so too."""
        if self.written:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir.mkdir(parents=True, exist_ok=True)
        wandb = self._config.logging.wandb
        self._wandb = _start_wandb(self._run_dir, wandb, self._config) if wandb else None
        _discard_after(self._run_dir, self._resume_step)
        self._file = self._path.open("a")
        # purge_step hides the events of steps that are repeated.
        self._tensorboard = SummaryWriter(
            str(self._run_dir / "tensorboard"), purge_step=self._resume_step + 1
        )
        self.written = True

    def train(
        self, *, step: int, samples: int, tokens: int, loss: float, **extra_metrics: float
    ) -> None:
        """Writes the metrics of one training step.

        Args:
            step: steps done since the start of the run, including this one.
            samples, tokens: number trained on since the start of the run.
            loss: mean loss of the step, in nats per base.
            extra_metrics: any other numbers; the usual ones are grad_norm, lr, load_balance_loss,
                router_z_loss, rows_touched (of the Gengram tables), tokens_per_second (over all
                ranks), seconds (of this step), data_wait (the share of them that the slowest rank
                waited for samples), save_stall (seconds that training waited for checkpoints
                since the previous step), skipped (1 for a batch that was skipped), and on GPUs
                peak_memory_bytes and model_flops_utilisation (see engine/training/report.py).
        """
        self._write("train", step, samples, tokens, loss, extra_metrics)

    def validation(
        self, *, step: int, samples: int, tokens: int, loss: float, **extra_metrics: float
    ) -> None:
        """Writes the metrics of one validation: its loss and, for a blend, `loss/NAME` for each
        data set. samples and tokens are those trained on so far, not those that validation read."""
        self._write("validation", step, samples, tokens, loss, extra_metrics)

    def has_validation(self, step: int) -> bool:
        """Returns whether the run was validated after a step, in this job or an earlier one."""
        entries = read_metrics(self._path) if self._path.exists() else []
        return any(e["kind"] == "validation" and e["step"] == step for e in entries)

    def close(self) -> None:
        """Flushes and closes all files."""
        if not self.written:
            return
        self._file.close()
        self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(
        self,
        kind: str,
        step: int,
        samples: int,
        tokens: int,
        loss: float,
        extra_metrics: dict[str, float],
    ) -> None:
        self.open()
        numbers = {"samples": samples, "tokens": tokens, "loss": loss}
        numbers |= {"bits_per_base": loss / math.log(2), **extra_metrics}
        self._file.write(_to_json({"kind": kind, "step": step, **numbers}) + "\n")
        self._file.flush()
        for name, number in numbers.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", number, step)
        if self._wandb:
            named = {f"{kind}/{name}": number for name, number in numbers.items()}
            self._wandb.log({"step": step, **named})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a metrics.jsonl, in order.

    A last line that was cut off by a kill is left out. Raises UserError for damage anywhere else.
    """
    lines = Path(path).read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines[:-1], start=1):  # the last is empty, or incomplete
        try:
            entries.append(_entry(line))
        except (AttributeError, KeyError, ValueError):
            raise UserError(
                f"{path}, line {number} is not one that a run writes: "
                f"{line[:80].decode(errors='replace')!r}; remove this line"
            ) from None
    return entries


def _entry(line: bytes) -> dict[str, Any]:
    entry = {name: _to_float(value) for name, value in json.loads(line).items()}
    numbers = [entry[name] for name in ("step", "samples", "tokens", "loss")]
    if entry["kind"] not in KINDS or not all(isinstance(n, int | float) for n in numbers):
        raise ValueError("another program's line")
    return entry


def _discard_after(run_dir: Path, resume_step: int) -> None:
    """Moves the lines of steps after `resume_step` (if it is 0, all lines) from metrics.jsonl to
    metrics.discarded.jsonl."""
    path = run_dir / FILE
    if not path.exists():
        return
    kept: list[str] = []
    discarded: list[str] = []
    for entry in read_metrics(path):
        (kept if 0 < resume_step >= entry["step"] else discarded).append(_to_json(entry) + "\n")
    if discarded:
        with (run_dir / DISCARDED).open("a") as file:
            file.writelines(discarded)
        flush(run_dir / DISCARDED)
    with replacing(path) as beside:
        beside.write_text("".join(kept))


def _to_json(entry: dict[str, Any]) -> str:
    """Returns an entry as one line of JSON. Floats are written by repr, without loss."""
    safe = {name: _finite_or_word(value) for name, value in entry.items()}
    return json.dumps(safe, allow_nan=False)


def _finite_or_word(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _to_float(value: Any) -> Any:
    return float(value) if value in NOT_FINITE else value


def _import_wandb() -> ModuleType:
    try:
        return import_module("wandb")
    except ImportError:
        raise UserError(
            "logging.wandb is set, but the package wandb is missing: "
            "pip install gengram-megatron[wandb], or remove the key"
        ) from None


def _start_wandb(run_dir: Path, settings: WeightsAndBiases, config: Config) -> Any:
    """Starts the Weights & Biases run of this folder, or resumes it if there is one."""
    wandb = _import_wandb()
    id_file = run_dir / "wandb.id"
    if not id_file.exists():
        id_file.write_text(uuid4().hex)
    run = wandb.init(
        project=settings.project,
        name=settings.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run_dir),
        config=config.model_dump(),
    )
    # The built-in step of wandb can only increase, but a resumed run goes back to its checkpoint.
    run.define_metric("*", step_metric="step")
    return run


UNIFORM = math.log(4)
"""Loss, in nats per base, of a model that gives A, C, G and T equal probability."""
WATCHED_STEPS = 100
"""Number of steps after warm-up before a run is checked, and the most that a check looks at."""
FEWEST_STEPS = 40
"""A job that ends with fewer steps after warm-up is not checked at all."""
STANDARD_ERRORS = 3.0


class UniformCheck:
    """Checks the training losses of one job after warm-up.

    A run is above uniform if the losses of the second half of its steps after warm-up (at most the
    last 100) have a median more than three standard errors above ln 4, and the mean of their last
    fifth is above ln 4 too. A few outliers do not change a median, so neither noise nor a short
    spike raises the warning, nor does a loss that has just come down. Losses that are not finite
    are left out.

    Args:
        config: config of the run.
        samples: samples of the whole run; warm-up is a share of them.
    """

    def __init__(self, config: Config, samples: int):
        self._config = config
        warm_up = config.optimizer.warmup_fraction * samples
        self._warm_up_steps = math.ceil(warm_up / config.train.global_batch_size)
        self._losses: deque[float] = deque(maxlen=WATCHED_STEPS)
        self._seen = 0
        self._warned = False

    def after_step(self, step: int, loss: float) -> str | None:
        """Returns a warning the first time that the run is above uniform, otherwise None.

        Args:
            step: steps done since the start of the run, including this one.
            loss: training loss of this step, in nats per base.
        """
        if step <= self._warm_up_steps or not math.isfinite(loss):
            return None
        self._seen += 1
        self._losses.append(loss)
        if self._warned or self._seen < WATCHED_STEPS or not self._above():
            return None
        self._warned = True
        return self._sentence(f"step {step}: the training loss")

    def at_end(self) -> str | None:
        """Returns a warning if the job ends above uniform, even if it was too short to be checked
        before; otherwise None."""
        if self._seen < FEWEST_STEPS or not self._above():
            return None
        return self._sentence("this job ends with a training loss that")

    def _judged(self) -> list[float]:
        """Returns the losses of the second half of the steps after warm-up, at most the last
        100."""
        return list(self._losses)[-(self._seen // 2) :]

    def _above(self) -> bool:
        losses = self._judged()
        middle = median(losses)
        # For normally distributed losses, standard deviation = 1.4826 x median deviation, and the
        # standard error of the median = 1.2533 x standard deviation / sqrt(n).
        deviation = 1.4826 * median(abs(loss - middle) for loss in losses)
        error = 1.2533 * deviation / math.sqrt(len(losses))
        last = losses[-(len(losses) // 5) :]
        return middle - STANDARD_ERRORS * error > UNIFORM and fmean(last) > UNIFORM

    def _sentence(self, what: str) -> str:
        optimizer, model = self._config.optimizer, self._config.model
        data = self._config.data.path or "FOLDER"
        return (
            f"{what} is {median(self._judged()):.4f} nats per base, which is above {UNIFORM:.4f}, "
            "the loss of a uniform guess among A, C, G and T: the model has learned nothing about "
            "DNA yet. "
            f"Check optimizer.lr ({optimizer.lr:g}), model.init_std ({model.init_std:g}) and "
            f"train.precision ({self._config.train.precision}), the share of N in the data "
            f"(gengram-data inspect {data}) and its token ids (gengram-data verify {data}, "
            "model.gengram.token_ids)"
        )
