"""Whether this machine's GPUs can run a config, asked before processes meet."""

import torch

from gengram_megatron.config.problems.transformer_engine import TRANSFORMER_ENGINE, gpu_problems
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError


def check_gpu(config: Config) -> None:
    """UserError: one line for each reason why not. Layers of torch run anywhere."""
    if config.model.implementation != TRANSFORMER_ENGINE:
        return
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if problems := list(gpu_problems(config, capability)):
        raise UserError("\n".join(problems))
