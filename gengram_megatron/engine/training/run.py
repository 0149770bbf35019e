"""A training run from its config to its trained model, in the order in which things happen."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from torch import Tensor

from gengram_megatron.config.layout import Layout, world_size_from_environment
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.state import ResumePoint, TrainingState
from gengram_megatron.engine.checkpoint.stored import read_common
from gengram_megatron.engine.data.batches import BatchStream, reporting_dead_workers
from gengram_megatron.engine.data.run_data import RunData
from gengram_megatron.engine.model.build import build_model
from gengram_megatron.engine.model.gpt import GengramGPT
from gengram_megatron.engine.model.initialize import sharded_parameters
from gengram_megatron.engine.processes import (
    check_gpu,
    check_shared_memory,
    end_processes,
    start_processes,
)
from gengram_megatron.engine.training.diagnosis import diagnose
from gengram_megatron.engine.training.engines import build_engine
from gengram_megatron.engine.training.nodes import check_nodes, sharing_errors
from gengram_megatron.engine.training.optimizer import build_schedule
from gengram_megatron.engine.training.report import GpuUse, implementations
from gengram_megatron.engine.training.step import (
    StepStatus,
    any_rank,
    balance_losses,
    forward_backward,
    reduce_step_status,
    slowest_rank,
)
from gengram_megatron.engine.training.watchdog import Watchdog
from gengram_megatron.errors import NotFinite
from gengram_megatron.runs.folder import (
    changed_keys,
    locked,
    make_folder,
    remove_if_unused,
    write_config,
)
from gengram_megatron.runs.metrics import MAX_CONSECUTIVE_SKIPS, RunLog, UniformCheck
from gengram_megatron.runs.progress import Progress
from gengram_megatron.signals import REQUEUE, StopSignals

INITIAL_WEIGHT_KEYS = ("model.init_std ", "model.gengram.init ", "model.gengram.init_std ")
"""Keys that decide the initial weights only, so they do not affect a resumed run."""


def train(config: Config, layout: Layout, signals: StopSignals) -> int:
    """Trains to the end, from the newest checkpoint in config.run.dir or from the start.

    signals: already entered by the caller, before torch was imported.

    Returns the exit code: 0, or REQUEUE if a signal asked to stop before the end.
    """
    check_gpu(config)
    folder, (_, rank) = Path(config.run.dir), world_size_from_environment()
    join = partial(start_processes, layout, config.run.seed, rank, config.train.deterministic)
    with ExitStack() as stack:
        with sharing_errors(layout.world_size, join):
            check_shared_memory()
            data = RunData(config)
            make_folder(folder)
            if rank == 0:
                stack.enter_context(locked(folder))
                stack.callback(remove_if_unused, folder)
        stack.callback(end_processes)
        join()
        check_nodes(folder, data, signals)
        with reporting_dead_workers(rank):
            return _Run(config, layout, data, signals).run()


@dataclass
class _Step:
    """The results of one step."""

    status: StepStatus
    grad_norm: float
    lr: float
    extra_metrics: dict[str, float]
    microbatches: Tensor


class _Run:
    """The parts of a run on one rank."""

    def __init__(self, config: Config, layout: Layout, data: RunData, signals: StopSignals):
        self.config, self.layout, self.data, self.signals = config, layout, data, signals
        self.data_rank = parallel_state.get_data_parallel_rank()
        models = build_model(config, layout)
        self.parameters = _count_parameters(models)
        self.memory = models[0].memory  # the same object in all chunks
        self.chunks, self.optimizer = build_engine(config, layout, models)
        self.schedule = build_schedule(config, layout, self.optimizer)
        self.state = TrainingState(
            config, layout, self.chunks, self.optimizer, self.schedule, data.facts
        )
        self.implementations = implementations(self.chunks, self.optimizer)
        self.gpu_use = GpuUse.of_run(config, layout.world_size)
        self.first_rank = dist.get_rank() == 0
        # Both are opened by run(), on the first rank only.
        self.log: RunLog | None = None
        self.progress: Progress | None = None
        self.folder = Path(config.run.dir)
        self.skipped_in_a_row = 0
        self.uniform = UniformCheck(config, layout.samples)

    def run(self) -> int:
        """Trains all remaining steps, or until a signal comes. Returns the exit code."""
        resume_point = self.state.load_newest()
        start, self.trained = resume_point.step, resume_point.step > 0
        with ExitStack() as stack:
            if self.first_rank:
                self._open_outputs(stack, start)
            self.watchdog = stack.enter_context(self._watchdog())
            self._say(self.implementations)
            self._warn(resume_point.warning)
            for line in self.data.statement(self.layout.samples):
                self._say(line)
            validation_pending = self._validation_pending(start)
            self._say(self._start_message(resume_point, validation_pending))
            for line in self._changed_keys(start):
                self._say(line)
            if validation_pending and not self._validate(start):
                return self._stopped(start)
            consumed = start * self.config.train.global_batch_size
            batches = self.data.training(self.layout, self.data_rank, consumed)
            code = self._train_from(start, stack.enter_context(closing(batches)))
            if self.progress is not None:
                self.progress.end()
                self._warn(self.uniform.at_end() if code == 0 else None)
        if self.log is not None and self.log.written:
            self._plot()
        return code

    def _changed_keys(self, start: int) -> list[str]:
        """Returns one line per key that has changed since the checkpoint that this job resumes
        from.

        It does so only on the first rank, which also keeps the earlier config, for write_config.
        """
        if not (self.first_rank and start):
            self.earlier_config = None
            return []
        self.earlier_config = read_common(self.state.store.path(start))["config"]
        if start >= self._last_step():  # no step will be trained with the new values
            return []
        changed = changed_keys(self.earlier_config, self.config.model_dump())
        relevant = [line for line in changed if not line.startswith(INITIAL_WEIGHT_KEYS)]
        return [f"{line} since step {start}" for line in relevant]

    def _validation_pending(self, start: int) -> bool:
        """Returns whether the previous job was asked to stop before the validation that was due
        after its last step."""
        due = start > 0 and _due(start, self.config.train.validation_interval, self._last_step())
        pending = [due and self.log is not None and not self.log.has_validation(start)]
        dist.broadcast_object_list(pending)
        return pending[0]

    def _train_from(self, start: int, batches: BatchStream) -> int:
        settings, last = self.config, self._last_step()
        if start < last and any_rank(self.signals.received):  # a signal came during start-up
            return self._stopped(start)
        for step in range(start + 1, last + 1):
            began = time.perf_counter()
            result = self._step(step, batches)
            seconds = time.perf_counter() - began
            if self.log is not None and step == start + 1:
                self.log.open()
                write_config(self.folder, self.config, start, self.earlier_config)
            waited = slowest_rank(batches.pop_seconds_waited())
            self._report(step, result, seconds, waited / seconds)
            if not result.status.finite:
                self._not_finite(step, result)
            self._warn(self.state.poll(result.status.writing))
            # There may be little time after a request to stop, so a validation that is due, or has
            # begun, is left for the job that resumes.
            due = _due(step, settings.train.validation_interval, last)
            if result.status.stop or (due and not self._validate(step)):
                self._save_to_stop(step)
                return self._stopped(step)
            # If it were saved before the validation, a run killed between the two would skip that.
            at_end = last if settings.checkpoint.at_end else None
            if _due(step, settings.checkpoint.interval, at_end):
                self._save(step, required=step == at_end)
        self._warn(self.state.wait())
        return 0

    def _save(self, step: int, required: bool) -> None:
        if not self.trained:  # Adam has no states yet that could be saved
            self._warn("no batch has changed a weight yet, so there is nothing to save")
            return
        self.watchdog.mark(step, "saving a checkpoint")
        self._warn(self.state.save(step, required))

    def _save_to_stop(self, step: int) -> None:
        self._save(step, required=True)
        self.state.wait()

    def _stopped(self, step: int) -> int:
        """Reports that a signal ended this job after a step, and how to resume. Returns the exit
        code."""
        done = f"saved after step {step}" if self.trained else f"nothing to save after step {step}"
        self._say(
            f"{self.folder}: asked by a signal to stop; {done} of {self.layout.steps}. "
            f"Exit code {REQUEUE}: the same command resumes from there"
        )
        return REQUEUE

    def _not_finite(self, step: int, result: _Step) -> None:
        """Skips the batch or ends the run, as train.on_nan says, after a loss or gradient that is
        not finite. No weight has changed."""
        values = f"step {step}: loss {result.status.loss}, gradient norm {result.grad_norm}"
        self.skipped_in_a_row += 1
        if self.config.train.on_nan == "skip" and self.skipped_in_a_row < MAX_CONSECUTIVE_SKIPS:
            self._warn(f"{values}; the batch is skipped (train.on_nan is skip)")
            return
        self._warn(self.state.wait())
        cause = diagnose(self.chunks, lambda: self._compute(step, result.microbatches))
        newest = self.state.store.newest()
        again = f"resumes from {newest.name}" if newest else "starts over, as nothing was saved yet"
        advice = "lower optimizer.lr, or set train.on_nan to skip"
        if self.config.train.on_nan == "skip":
            advice = f"{MAX_CONSECUTIVE_SKIPS} batches in a row were not finite; lower optimizer.lr"
        raise NotFinite(f"{values}: {cause}. The same command {again}; {advice}")

    def _last_step(self) -> int:
        return min(self.layout.steps, self.config.train.stop_at or self.layout.steps)

    def _step(self, step: int, batches: BatchStream) -> _Step:
        self.watchdog.mark(step, "reading data")
        microbatches = next(batches)
        report = self._compute(step, microbatches)
        lr = self._lr()
        status: StepStatus  # set by `accept`, which step_if calls once

        def accept(grad_norm: float) -> bool:
            nonlocal status
            status = reduce_step_status(
                report,
                grad_norm=grad_norm,
                stop=self.signals.received,
                writing=self.state.writing,
            )
            return status.finite

        grad_norm = self.optimizer.step_if(accept)
        if status.finite:
            # A skipped batch does not advance the schedule, as in Megatron-LM.
            self.schedule.step(self.config.train.global_batch_size)
            self.trained, self.skipped_in_a_row = True, 0
        may_skip = self.config.train.on_nan == "skip"
        return _Step(
            status=status,
            grad_norm=grad_norm,
            lr=lr,
            extra_metrics={
                **balance_losses(self.config.model.num_layers, self.layout.num_microbatches),
                **self._memory_metrics(),
                **({"skipped": int(not status.finite)} if may_skip else {}),
            },
            microbatches=microbatches,
        )

    def _compute(self, step: int, microbatches: Tensor) -> Tensor | None:
        """Computes the gradients of a step's microbatches [n, b, s + 1]. Returns what
        forward_backward returns."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return forward_backward(
            self.chunks,
            self._marked(step, microbatches),
            self.config,
            self.layout,
            forward_only=False,
        )

    def _marked(self, step: int, microbatches: Tensor) -> Iterator[Tensor]:
        """Yields the microbatches and marks progress at each, as a step with many takes long."""
        for microbatch in microbatches:
            self.watchdog.mark(step, "computing")
            yield microbatch

    def _memory_metrics(self) -> dict[str, float]:
        if self.memory is None:
            return {}
        return self.memory.metrics(parallel_state.get_data_parallel_group())

    def _validate(self, step: int) -> bool:
        """Runs a validation after a step. Returns False if a request to stop came before its
        end."""
        for chunk in self.chunks:
            chunk.eval()
        losses, done = {}, 0
        for validation in self.data.validations(self.layout, self.data_rank):
            reports = []
            for _ in range(validation.steps):
                self.watchdog.mark(step, "validating")
                if self.progress is not None:
                    self.progress.validating(step=step, done=done, total=self.data.validation_steps)
                done += 1
                reports.append(
                    forward_backward(
                        self.chunks,
                        next(validation.batches),
                        self.config,
                        self.layout,
                        forward_only=True,
                    )
                )
                if any_rank(self.signals.received):
                    return False
            scored = [report for report in reports if report is not None]
            report = torch.stack(scored).sum(0) if scored else None
            losses[validation.name] = reduce_step_status(report).loss
        if self.log is not None and self.progress is not None:
            loss, set_losses = self.data.in_all(losses), losses if len(losses) > 1 else {}
            named = {f"loss/{name}": nats for name, nats in set_losses.items()}
            samples, tokens = self._data_position(step)
            self.log.validation(step=step, samples=samples, tokens=tokens, loss=loss, **named)
            self.progress.validation(step=step, loss=loss, of_sets=set_losses)
        return True

    def _report(self, step: int, result: _Step, seconds: float, data_wait: float) -> None:
        _, tokens_per_step = self._data_position(1)
        tokens_per_second = tokens_per_step / seconds
        gpu_use = self.gpu_use.of_step(tokens_per_second)
        if self.log is None or self.progress is None:
            return
        shown = {
            "loss": result.status.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_second": tokens_per_second,
            "seconds": seconds,
            "data_wait": data_wait,
            **gpu_use,
        }
        self.progress.step(step=step, **shown)
        extra_metrics = dict(result.extra_metrics)
        if stall := self.state.pop_stall_seconds():
            extra_metrics["save_stall"] = stall
        samples, tokens = self._data_position(step)
        self.log.train(step=step, samples=samples, tokens=tokens, **shown, **extra_metrics)
        self._warn(self.uniform.after_step(step, result.status.loss))

    def _open_outputs(self, stack: ExitStack, start: int) -> None:
        self.log = stack.enter_context(RunLog(self.folder, self.config, start))
        self.progress = stack.enter_context(
            Progress(
                self.layout.steps,
                self.config.logging.interval,
                validation_interval=self.config.train.validation_interval,
                validation_steps=self.data.validation_steps,
            )
        )

    def _start_message(self, resume_point: ResumePoint, validation_pending: bool) -> str:
        load = self.config.checkpoint.load
        start, steps, last = resume_point.step, self.layout.steps, self._last_step()
        if start >= last:
            left = "the last validation is left" if validation_pending else "nothing is left to do"
            return f"{self.folder}: done, {start} of {steps} steps; {left}"
        begin = f"resuming after step {start}" if start else "starting"
        if resume_point.origin:
            begin = f"starting from the weights of {resume_point.origin}"
        elif load:
            begin += f", not from checkpoint.load = {load}"
        until = f"until step {last} of {steps}" if last < steps else f"{steps} steps"
        return f"{self.folder}: {begin}, {until}, {self.parameters:,} parameters"

    def _data_position(self, step: int) -> tuple[int, int]:
        """Returns the numbers of samples and of tokens that the run has trained on after a step."""
        samples = step * self.config.train.global_batch_size
        return samples, samples * self.config.model.seq_length

    def _lr(self) -> float:
        return get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0

    def _plot(self) -> None:
        # Imported late: matplotlib takes a second to import, and only this rank plots.
        from gengram_megatron.runs.plot import markov_levels, plot_loss, run_title

        levels = {}
        if self.config.data.path is not None:
            (data_set,) = self.data.sets
            checksums = {"train": data_set.train.sha256, "validation": data_set.validation.sha256}
            levels = markov_levels(Path(self.config.data.path), checksums)
        plot_loss(
            {self.folder.name: self.folder / "metrics.jsonl"},
            self.folder / "loss.png",
            levels,
            run_title(self.config, self.layout.samples * self.config.model.seq_length),
        )

    def _watchdog(self) -> Watchdog:
        started = [time.strftime("%Y-%m-%dT%H-%M-%S")]
        dist.broadcast_object_list(started)
        return Watchdog(
            self.config.train.watchdog_seconds,
            self.folder / "stacks" / started[0],
            dist.get_rank(),
            dist.get_world_size(),
        )

    def _warn(self, line: str | None) -> None:
        if line is not None:
            self._say(f"warning: {line}")

    def _say(self, line: str) -> None:
        if self.progress is not None:
            self.progress.say(line)


def _due(step: int, interval: int | None, last: int | None) -> bool:
    return step == last or (interval is not None and step % interval == 0)


def _count_parameters(models: list[GengramGPT]) -> int:
    """Returns the number of parameters of the whole model: those of each rank, without copies,
    summed over all ranks."""
    local = sum(
        shard.data.numel()
        for model in models
        for shard, _, _ in sharded_parameters(model)
        if shard.replica_id in (0, (0, 0, 0))
    )
    total = torch.tensor(local, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total)
