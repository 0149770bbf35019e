"""What every rank imports; see ranks.py."""
# ruff: noqa: E402, F401

import torch

torch.set_num_threads(1)
import torch._dynamo
import torch._inductor.config
import torch.utils.tensorboard

import gengram_megatron.commands.cli
import gengram_megatron.engine.training.run
import gengram_megatron.runs.plot
