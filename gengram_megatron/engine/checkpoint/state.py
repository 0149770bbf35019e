"""Saves and loads all that a run needs to resume, through megatron-core's distributed
checkpoints."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.engine.checkpoint.contents import CONTENT_METADATA, MegatronContents
from gengram_megatron.engine.checkpoint.restore import (
    CannotLoad,
    Result,
    adam_steps,
    check_same_model,
    load_tensors,
    on_all_ranks,
    random_states,
    reseed,
    same_ranks,
    set_random_states,
    sharded_names,
)
from gengram_megatron.engine.checkpoint.stored import MEGATRON_FILES, missing_files
from gengram_megatron.engine.checkpoint.writer import Writer
from gengram_megatron.engine.checkpoint.zero import ZeroContents
from gengram_megatron.engine.processes import gather
from gengram_megatron.errors import UserError
from gengram_megatron.runs.folder import VISIBLE_SECONDS
from gengram_megatron.runs.store import (
    FORMAT,
    CheckpointStore,
    Facts,
    damage,
    estimated_size,
    read_facts,
    source_checkpoints,
)


class TrainingState:
    """One rank's model, optimizer, schedule, random states and position in the data.

    chunks, optimizer: those of the run's engine, which differ in their classes (training/engines).
    data: the data sets, in the form that Facts stores.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        chunks: list[Any],
        optimizer: Any,
        schedule: OptimizerParamScheduler,
        data: list[dict[str, str]],
    ):
        self.config, self.layout = config, layout
        self.schedule = schedule
        kind = ZeroContents if config.train.engine == "deepspeed" else MegatronContents
        self.contents = kind(config, chunks, optimizer)
        self.data = data
        settings = config.checkpoint
        self.store = CheckpointStore(
            Path(config.run.dir) / "checkpoints", settings.keep, settings.keep_every
        )
        # What each rank writes is the same for every checkpoint, so it is planned only once.
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        self._save: _Save | None = None
        self._failed = 0
        self._stall = 0.0
        self._partly_loaded = False

    def save(self, step: int, required: bool = False) -> str | None:
        """Writes a checkpoint; with checkpoint.asynchronous, waits only for the copy of the
        tensors.

        If a checkpoint cannot be written, this method, `poll` or `wait` returns a sentence that
        says so, and the previous checkpoint stays as it is. Raises UserError if the checkpoint is
        required, or if it is the second failure in a row.
        """
        began = time.perf_counter()
        failure = self._finish_last()
        try:
            partial = self._on_first_rank(
                lambda: self.store.begin(step, estimated_size(self.config))
            )
            self._save = self._start(step, partial, required)
        except UserError as error:
            failure = self._note_failure(str(error), required)
        if self._save and not self.config.checkpoint.asynchronous:
            failure = self._finish_last()
        self._stall += time.perf_counter() - began
        return failure

    def _start(self, step: int, partial: Path, required: bool) -> "_Save":
        writer = Writer()
        request = dist_checkpointing.save(
            self._state(step),
            str(partial),
            self._strategy,
            validate_access_integrity=self._strategy.cached_central_plan is None,
            async_sharded_save=True,
            content_metadata=CONTENT_METADATA,
        )
        writer.start(request)
        facts = Facts(
            format=FORMAT,
            step=step,
            samples=step * self.config.train.global_batch_size,
            seed=self.config.run.seed,
            layout=self.layout.sizes(),
            tables=self._tables(),
            data=self.data,
        )
        return _Save(writer, partial, facts, required)

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part of a checkpoint to disk."""
        return self._save is not None and self._save.writer.running

    def poll(self, anyone_writing: bool) -> str | None:
        """Finishes an asynchronous save whose files are written. All ranks call this at each step.

        anyone_writing: whether any rank is `writing`.
        """
        if self._save is None or anyone_writing:
            return None
        return self.wait()

    def wait(self) -> str | None:
        """Finishes an asynchronous save, however long it takes."""
        began = time.perf_counter()
        failure = self._finish_last()
        self._stall += time.perf_counter() - began
        return failure

    def pop_stall_seconds(self) -> float:
        """Returns the seconds that training has waited for checkpoints since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def _finish_last(self) -> str | None:
        """Finishes the last save, if there is one left to finish, whether it succeeded or not.
        Returns a sentence if it failed."""
        save, self._save = self._save, None
        if save is None:
            return None
        try:
            self._finish(save)
        except (CheckpointException, UserError) as error:
            save.writer.abandon()
            free = shutil.disk_usage(self.store.folder).free
            cause = f"step {save.facts.step}: {_cause(error)}; {free:,} bytes are free"
            return self._note_failure(cause, save.required)
        self._failed = 0
        return None

    def _finish(self, save: "_Save") -> None:
        save.writer.join()
        died = gather(dist.get_rank() if save.writer.died else None)
        if any(rank is not None for rank in died):
            ranks = ", ".join(str(rank) for rank in died if rank is not None)
            raise UserError(f"the process that writes for rank {ranks} died")
        checksums: dict[str, str] = {}
        for rank_checksums in gather(save.writer.finalize()):
            checksums |= rank_checksums
        self._on_first_rank(lambda: self._publish(save, checksums))

    def _publish(self, save: "_Save", checksums: dict[str, str]) -> None:
        """Makes a written checkpoint the newest, if all files that its ranks wrote are in its
        folder."""
        end = time.monotonic() + VISIBLE_SECONDS
        # Files that another node has written may become visible here only some seconds later.
        while (missing := missing_files(save.partial, MEGATRON_FILES)) and time.monotonic() < end:
            time.sleep(0.2)
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"not all files that the ranks have written are there: {missing[0]}{more}; run.dir "
                "must be one folder that all nodes share"
            )
        self.store.finish(save.partial, save.facts, checksums)

    def _note_failure(self, cause: str, required: bool) -> str:
        self._failed += 1
        sentence = f"no checkpoint was written: {cause}"
        if required or self._failed > 1:
            raise UserError(sentence)
        return f"{sentence}; training continues, and the next checkpoint will be tried"

    def _load_newest_usable(
        self, checkpoints: list[Path], load: Callable[[Path], int]
    ) -> tuple[Path | None, int, dict[Path, str]]:
        """Loads the newest usable checkpoint, and skips those that are damaged or cannot be loaded.
        Whatever a failed attempt has loaded is overwritten by the next attempt.

        checkpoints: in the order of their steps. load: loads a checkpoint on all ranks, and returns
        the step to resume from.

        Returns the checkpoint, or None if none is usable; its step; and what is wrong with each
        checkpoint that was skipped.
        """
        unusable: dict[Path, str] = {}
        for path in reversed(checkpoints):
            problems = self._problems(path)
            if not problems:
                try:
                    return path, load(path), unusable
                except CannotLoad as error:
                    problems = [f"cannot be loaded: {error}"]
            unusable[path] = f"{path.name} ({'; '.join(problems)})"
        return None, 0, unusable

    def _problems(self, path: Path) -> list[str]:
        """Returns what is wrong with a checkpoint's files. Each rank reads a share of them."""
        ranks = gather(damage(path, dist.get_rank(), dist.get_world_size()))
        problems = sorted({problem for rank_problems in ranks for problem in rank_problems})
        return problems or self._on_first_rank(lambda: missing_files(path))

    def _set_aside(self, damaged: dict[Path, str], path: Path) -> str:
        def rename() -> None:
            for checkpoint in damaged:
                self.store.set_aside(checkpoint)

        self._on_first_rank(rename)
        return f"damaged, and set aside: {', '.join(damaged.values())}; resuming from {path.name}"

    def load_newest(self) -> "ResumePoint":
        """Resumes from the newest usable checkpoint in the run's folder; if the folder has none,
        starts from the weights of checkpoint.load, if it is given."""
        checkpoints = self._on_first_rank(self.store.checkpoints)
        path, step, unusable = self._load_newest_usable(checkpoints, self._resume)
        if path is not None:
            return ResumePoint(step, self._set_aside(unusable, path) if unusable else None)
        if unusable:
            raise UserError(
                f"all checkpoints of {self.store.folder} are damaged: "
                f"{', '.join(unusable.values())}; restore one, or start in another run.dir"
            )
        load = self.config.checkpoint.load
        return ResumePoint() if load is None else self._start_from_another(Path(load))

    def _resume(self, path: Path) -> int:
        """Loads all of a checkpoint. Returns its step."""
        facts, common, stored = on_all_ranks(lambda: self._read_and_check(path))
        if "optimizer" not in common:
            return self._start_from_own_weights(path, facts)
        self._partly_loaded = True
        on_all_ranks(lambda: self._load(path, facts, common, stored))
        return facts.step

    def _read_and_check(self, path: Path) -> tuple[Facts, dict[str, Any], set[str]]:
        """Returns a checkpoint's facts, its unsharded state, and the names of its sharded entries.
        Raises UserError if it does not fit this run."""
        facts = read_facts(path)
        self._check(path, facts)
        common, stored = dist_checkpointing.load_common_state_dict(str(path)), sharded_names(path)
        # Imported weights (step 0) may also be trained with a different sequence length.
        check_same_model(path, common["config"]["model"], self.config, new_run=facts.step == 0)
        return facts, common, stored

    def _load(self, path: Path, facts: Facts, common: dict[str, Any], stored: set[str]) -> None:
        self.contents.load(path, stored, adam_steps(common["optimizer"]))
        self.schedule.load_state_dict(common["schedule"])
        current = random_states()
        if same_ranks(facts.layout, self.layout.sizes()) and current.unique_key in stored:
            state = {"random": current}
            load_tensors(state, path)
            set_random_states(state["random"])
        else:
            reseed(self.config.run.seed, facts.step)

    def _start_from_own_weights(self, path: Path, facts: Facts) -> int:
        """Starts the run from weights in its own folder, such as imported ones, instead of randomly
        initialized ones. Returns step 0."""
        if facts.step:
            raise UserError(
                f"{path} holds weights only, without the optimizer that step {facts.step + 1} "
                "needs: put the whole checkpoint in its place, or name it in checkpoint.load of a "
                "run with another run.dir"
            )
        if self._partly_loaded:
            raise UserError(
                f"no checkpoint of {self.store.folder} after {path.name} can be loaded, and "
                f"{path.name} holds weights only: move the others away to start from it again, or "
                "restore one of them"
            )
        on_all_ranks(lambda: self.contents.start_from_weights(path))
        return 0

    def _start_from_another(self, source: Path) -> "ResumePoint":
        """Starts a new run from the weights of another run's checkpoint, instead of randomly
        initialized ones."""
        candidates = self._on_first_rank(lambda: source_checkpoints(source), where="")
        path, _, unusable = self._load_newest_usable(candidates, self._load_weights)
        warning = f"checkpoint.load: damaged, {', '.join(unusable.values())}" if unusable else None
        if path is None:
            raise UserError(warning)
        return ResumePoint(0, warning, origin=path)

    def _load_weights(self, path: Path) -> int:
        """Loads the weights of another run's checkpoint. Returns step 0."""
        on_all_ranks(lambda: self._check_weights(path))
        on_all_ranks(lambda: self.contents.start_from_weights(path))
        return 0

    def _check_weights(self, path: Path) -> None:
        common = dist_checkpointing.load_common_state_dict(str(path))
        check_same_model(path, common["config"]["model"], self.config, new_run=True)
        self._check_tables(path, read_facts(path))

    def _check(self, path: Path, facts: Facts) -> None:
        samples = facts.step * self.config.train.global_batch_size
        if facts.samples != samples:
            raise UserError(
                f"{path} was trained on {facts.samples} samples in {facts.step} steps, which does not "
                f"match train.global_batch_size = {self.config.train.global_batch_size}: set it as "
                "it was, or start in another run.dir"
            )
        if facts.seed != self.config.run.seed:
            raise UserError(
                f"{path} was trained with run.seed = {facts.seed}, not {self.config.run.seed}, "
                "which determines the order of the samples: set it as it was, or start in another "
                "run.dir"
            )
        if facts.data not in ([], self.data):  # empty in a checkpoint of an older version
            raise UserError(
                f"{path} was trained on different data: {_difference(facts.data, self.data)}; give "
                "the data sets as they were, or start in another run.dir"
            )
        self._check_tables(path, facts)

    def _check_tables(self, path: Path, facts: Facts) -> None:
        for name, table in self._tables().items():
            stored = facts.tables.get(name, table)  # a table that the checkpoint lacks is new
            if stored != table:
                raise UserError(
                    f"{path} was trained with different rows of table {name}: {stored}, not "
                    f"{table}; set kmer_sizes, dim, hashing and share_reverse_complements of "
                    "model.gengram as they were, or start in another run.dir"
                )

    def _tables(self) -> dict[str, dict[str, Any]]:
        gengram = self.config.model.gengram
        if not gengram.enabled:
            return {}
        return {table.name: asdict(table) for table in kmer_tables(gengram)}

    def _state(self, step: int) -> dict[str, Any]:
        return {
            **self.contents.state(),
            "schedule": self.schedule.state_dict(),
            "random": random_states(),
            "config": self.config.model_dump(),
            "step": step,
        }

    def _on_first_rank(self, action: Callable[[], Result], where: str | None = None) -> Result:
        """Runs an action on rank 0. Returns its result, or raises its error, on every rank.

        where: what an error message begins with; None: the folder of the checkpoints.
        """
        answer: list[Any] = [None, None]  # the result and the error
        if dist.get_rank() == 0:
            try:
                answer[0] = action()
            except (OSError, UserError) as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            where = f"checkpoints of {self.store.folder}: " if where is None else where
            raise UserError(f"{where}{answer[1]}")
        result: Result = answer[0]
        return result


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts.

    Attributes:
        step: the step after which it starts.
        warning: what is wrong with newer checkpoints, if any.
        origin: the checkpoint of another run whose weights it starts from, if any.
    """

    step: int = 0
    warning: str | None = None
    origin: Path | None = None


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written."""

    writer: Writer
    partial: Path
    facts: Facts
    required: bool


def _cause(error: CheckpointException | UserError) -> str:
    """Returns the cause of a failed save in one line. A CheckpointException has causes by rank."""
    if isinstance(error, CheckpointException):
        causes = [f"rank {rank} could not write ({why[0]})" for rank, why in error.failures.items()]
        return "; ".join(causes) or "another rank could not write"
    return str(error)


def _difference(was: list[dict[str, str]], now: list[dict[str, str]]) -> str:
    """Returns in words how the data sets of two runs differ."""
    if len(was) != len(now):
        return f"it had {len(was)} data sets, not {len(now)}"
    number = next(i for i, facts in enumerate(was) if facts != now[i])
    if was[number]["sha256"] != now[number]["sha256"]:
        return f"data set {number + 1} was built again or is a different one"
    shares = was[number]["share"], now[number]["share"]
    return f"the share of data set {number + 1} was {shares[0]} of the samples, not {shares[1]}"
