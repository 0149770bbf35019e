"""What a checkpoint holds of model and optimizer, with megatron-core's optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from gengram_megatron.checkpoint.restore import (
    load_tensors,
    name_masters,
    set_adam_steps,
    without_extra_states,
)
from gengram_megatron.config.schema import Config
from gengram_megatron.model.data_parallel import unwrapped

# Tensors are described by the model, not by the layout that wrote them, and layers may differ
# (memory in some), so each layer has names of its own.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


class MegatronContents:
    """Of one rank: what is written to a checkpoint and taken from one."""

    def __init__(self, config: Config, chunks: list, optimizer):
        self.config, self.chunks, self.optimizer = config, chunks, optimizer

    def state(self) -> dict:
        """Weights and optimizer as parts of global tensors."""
        model = self._model_state()
        optimizer = self.optimizer.sharded_state_dict(model, metadata=self._metadata())
        return {**model, "optimizer": optimizer}

    def load(self, path: Path, stored: set[str], steps: int) -> None:
        """All of it. stored: the names of what the checkpoint holds in parts; steps: that Adam has
        done."""
        self.make_optimizer_states()
        self._load_weights(path)
        self._load_optimizer(path, stored, steps)

    def start_from_weights(self, path: Path) -> None:
        """Weights in the place of drawn ones, before the first step."""
        self._load_weights(path)
        self.optimizer.reload_model_params()

    def _load_weights(self, path: Path) -> None:
        state = without_extra_states(self._model_state())
        load_tensors(state, path)
        for index, chunk in enumerate(unwrapped(self.chunks)):
            chunk.load_state_dict(state[f"model{index}"])

    def _load_optimizer(self, path: Path, stored: set[str], steps: int) -> None:
        """Apart from the weights, of which a master weight may have the name."""
        state = self.optimizer.sharded_state_dict(
            self._model_state(), is_loading=True, metadata=self._metadata()
        )
        name_masters(state, stored)
        load_tensors(state, path)
        one = len(self.optimizer.chained_optimizers) == 1
        for index, optimizer in enumerate(self.optimizer.chained_optimizers):
            set_adam_steps(optimizer, state if one else state[index], steps)
        self.optimizer.load_state_dict(state)

    def _metadata(self) -> dict:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {**CONTENT, "dp_cp_group": group}

    def _model_state(self) -> dict:
        return {
            f"model{index}": chunk.sharded_state_dict(metadata=self._metadata())
            for index, chunk in enumerate(unwrapped(self.chunks))
        }

    def make_optimizer_states(self) -> None:
        """torch's Adam has no state before its first step, and what is not there is not loaded.
        megatron-core's own way: a step with gradients of zero, undone by the loading."""
        for optimizer in self.optimizer.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer) and not optimizer.is_stub_optimizer:
                optimizer._init_optimizer_states_with_dummy_values()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """With overlap_param_gather a rank's parameters are gathered in the next forward pass;
        a checkpoint wants them now."""
        overlap = self.config.optimizer.overlap_param_gather
        for chunk in self.chunks if overlap else []:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in self.chunks if overlap else []:
            chunk.enable_forward_pre_hook()
