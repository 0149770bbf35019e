"""Import megatron-core without its wall of warnings, and mend what every machine needs.

Written for megatron-core 0.16.1."""

import importlib
import importlib.util
import warnings

import torch


def has(package: str) -> bool:
    """Whether a top-level package can be imported here."""
    return importlib.util.find_spec(package) is not None


def import_quietly(compiled: bool) -> None:
    """Import megatron-core without the warnings that it gives, at import and later, about parts
    that are not installed. What is used instead is said in one line when a run starts.

    compiled: whether megatron-core's small fused functions go through torch.compile. On the CPU
    that takes a C++ compiler and longer than a smoke run's steps.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # torch 2.13 renames collectives that megatron-core calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    compiler = torch.compile
    if not compiled:
        torch.compile = lambda function: function
    try:
        importlib.import_module("megatron.core.models.gpt")
        importlib.import_module("megatron.core.optimizer")
    finally:
        torch.compile = compiler


def complete_without_transformer_engine() -> None:
    """Mend what megatron-core leaves undefined where Transformer Engine is not installed, on
    GPUs too."""
    core = "megatron.core."
    # The router asks `te_general_gemm is not None`, a name that it failed to import.
    importlib.import_module(core + "transformer.moe.moe_utils").te_general_gemm = None
    # Latent attention takes the import of the wrappers for that of Transformer Engine.
    importlib.import_module(core + "transformer.multi_latent_attention").HAVE_TE = False
    # Its default fp8=False means True (`fp8 is not None`), which needs Transformer Engine.
    random = importlib.import_module(core + "tensor_parallel.random")
    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def keep_step_of_torch_adam() -> None:
    """DistributedOptimizer saves Adam's step with the parameter groups, has it set by
    load_state_dict, and then looks for it among the loaded tensors, where it is not, if the Adam
    is torch's (which keeps its step as a tensor of the state). All states share the tensor that
    load_state_dict set, and each would count it on: every state gets one of its own."""
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer = module.DistributedOptimizer
    set_states = optimizer._set_main_param_and_optimizer_states

    def with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        state = self.optimizer.state[main_param]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        set_states(self, model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = with_step
