"""Save and load all that a run needs to go on, through megatron-core's distributed checkpoints."""

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from gengram_megatron.checkpoint.store import FORMAT, CheckpointStore, Facts, read_facts
from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.errors import UserError

# Tensors are described by the model, not by the layout that wrote them, and layers may differ
# (memory in some), so each layer has names of its own.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


class TrainingState:
    """Model, optimizer, schedule, random states and the place in the data of one rank."""

    def __init__(self, config: Config, layout: Layout, chunks: list, optimizer, schedule):
        self.config, self.layout = config, layout
        self.chunks, self.optimizer, self.schedule = chunks, optimizer, schedule
        self.store = CheckpointStore(Path(config.run.dir) / "checkpoints", config.checkpoint.keep)
        self._writing = AsyncCallsQueue()

    def save(self, step: int) -> None:
        """Write a checkpoint; with checkpoint.asynchronous only the copy is waited for."""
        self.wait()
        partial = self._on_first_rank(lambda: self.store.begin(step))
        with self._whole_parameters():
            request = dist_checkpointing.save(
                self._state(step, is_loading=False),
                str(partial),
                async_sharded_save=self.config.checkpoint.asynchronous,
                content_metadata=CONTENT,
            )
        facts = Facts(
            format=FORMAT,
            step=step,
            samples=step * self.config.train.global_batch_size,
            seed=self.config.run.seed,
            layout=asdict(self.layout),
            tables=self._tables(),
        )

        def finish() -> None:
            self._on_first_rank(lambda: self.store.finish(partial, facts))

        if request is None:
            finish()
        else:
            request.add_finalize_fn(finish)
            self._writing.schedule_async_request(request)

    def poll(self) -> None:
        """Finish an asynchronous save whose files are written. Called by all ranks each step."""
        if self._writing.get_num_unfinalized_calls():
            self._writing.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Finish an asynchronous save, however long it takes."""
        if self._writing.get_num_unfinalized_calls():
            self._writing.maybe_finalize_async_calls(blocking=True)

    def load_newest(self) -> int:
        """Go on from the newest checkpoint of the run's folder; returns its step, 0 for none."""
        path = self._on_first_rank(self.store.newest)
        if path is None:
            return 0
        facts = read_facts(path)
        self._check(path, facts)
        if "optimizer" not in dist_checkpointing.load_common_state_dict(str(path)):
            return self._start_from_weights(path, facts)
        self._make_optimizer_states()
        state = self._state(facts.step, is_loading=True)
        if facts.layout != asdict(self.layout):
            del state["random"]  # belongs to other ranks; nothing in a step draws from it
        loaded = dist_checkpointing.load(state, str(path))
        for index, chunk in enumerate(unwrap_model(self.chunks)):
            chunk.load_state_dict(loaded[f"model{index}"])
        with self._own_settings():
            self.optimizer.load_state_dict(loaded["optimizer"])
        self.schedule.load_state_dict(loaded["schedule"])
        if "random" in loaded:
            _set_random_states(loaded["random"])
        return facts.step

    def _start_from_weights(self, path: Path, facts: Facts) -> int:
        """Begin a run with imported weights in the place of drawn ones."""
        if facts.step:
            raise UserError(
                f"{path} holds weights only, without the optimizer that step {facts.step + 1} "
                "needs: put the whole checkpoint in its place, or start in another run.dir"
            )
        state = self._model_state()
        for chunk in state.values():
            for name, value in chunk.items():
                if isinstance(value, ShardedObject):  # of TransformerEngine; empty without it
                    chunk[name] = LocalNonpersistentObject(None)
        loaded = dist_checkpointing.load(state, str(path))
        for index, chunk in enumerate(unwrap_model(self.chunks)):
            chunk.load_state_dict(loaded[f"model{index}"])
        self.optimizer.reload_model_params()
        return 0

    def _check(self, path: Path, facts: Facts) -> None:
        samples = facts.step * self.config.train.global_batch_size
        if facts.samples != samples:
            raise UserError(
                f"{path} has seen {facts.samples} samples in {facts.step} steps, which is not a "
                f"batch of train.global_batch_size = {self.config.train.global_batch_size}: set "
                "it as it was, or start in another run.dir"
            )
        if facts.seed != self.config.run.seed:
            raise UserError(
                f"{path} was trained with run.seed = {facts.seed}, not {self.config.run.seed}, "
                "which decides the order of the samples: set it as it was, or start in another "
                "run.dir"
            )

        for name, own in self._tables().items():
            table = facts.tables.get(name, own)  # one that the checkpoint does not know is new
            if table != own:
                raise UserError(
                    f"{path} was trained with other rows of table {name}: {table}, not "
                    f"{own}; set kmer_sizes, dim, hashing and "
                    "share_reverse_complements of model.gengram as they were, or start in another "
                    "run.dir"
                )

    def _tables(self) -> dict[str, dict]:
        gengram = self.config.model.gengram
        if not gengram.enabled:
            return {}
        return {table.name: asdict(table) for table in kmer_tables(gengram)}

    def _metadata(self) -> dict:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {**CONTENT, "dp_cp_group": group}

    def _model_state(self) -> dict:
        return {
            f"model{index}": chunk.sharded_state_dict(metadata=self._metadata())
            for index, chunk in enumerate(unwrap_model(self.chunks))
        }

    def _state(self, step: int, is_loading: bool) -> dict:
        model = self._model_state()
        return {
            **model,
            "optimizer": self.optimizer.sharded_state_dict(
                model, is_loading=is_loading, metadata=self._metadata()
            ),
            "schedule": self.schedule.state_dict(),
            "random": _random_states(),
            "config": self.config.model_dump(),
            "step": step,
        }

    def _make_optimizer_states(self) -> None:
        """torch's Adam has no state before its first step, and what is not there is not loaded.
        megatron-core's own way: a step with gradients of zero, undone by the loading."""
        for optimizer in self.optimizer.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer) and not optimizer.is_stub_optimizer:
                optimizer._init_optimizer_states_with_dummy_values()

    @contextmanager
    def _own_settings(self):
        """A checkpoint's parameter groups bring learning rates, betas and weight decay along; these
        stay what the config says."""
        own = [
            {key: value for key, value in group.items() if key not in ("params", "step")}
            for group in self.optimizer.param_groups
        ]
        yield
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)

    @contextmanager
    def _whole_parameters(self):
        """With overlap_param_gather a rank's parameters are gathered in the next forward pass;
        a checkpoint wants them now."""
        overlap = self.config.optimizer.overlap_param_gather
        for chunk in self.chunks if overlap else []:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in self.chunks if overlap else []:
            chunk.enable_forward_pre_hook()

    def _on_first_rank(self, action: Callable):
        """What rank 0's action returned, or its error on every rank."""
        answer = [None, None]
        if dist.get_rank() == 0:
            try:
                answer[0] = action()
            except (OSError, UserError) as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(f"checkpoints of {self.store.folder}: {answer[1]}")
        return answer[0]


def _random_states() -> ShardedObject:
    """The states of all generators: one set a tensor- and pipeline-parallel rank."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("random", states, shape, place, replica_id=copy)


def _set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
