"""The engines that sum gradients and update weights: megatron-core and DeepSpeed's ZeRO. Both give
the same losses.

An engine is a rank's model chunks, wrapped so that megatron-core's schedules can run them and their
gradients are summed, and an optimizer with `zero_grad`, `step_if` and `param_groups`. What a
checkpoint stores for each engine is in checkpoint/contents.py and checkpoint/zero.py.
"""

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.model.build import wrap_for_data_parallelism
from gengram_megatron.engine.model.data_parallel import DataParallel
from gengram_megatron.engine.model.gpt import GengramGPT
from gengram_megatron.engine.training.engines import deepspeed
from gengram_megatron.engine.training.engines.deepspeed import ZeroChunk, ZeroOptimizer
from gengram_megatron.engine.training.optimizer import Optimizer, build_optimizer


def build_engine(
    config: Config, layout: Layout, models: list[GengramGPT]
) -> tuple[list[DataParallel] | list[ZeroChunk], Optimizer | ZeroOptimizer]:
    """Returns the wrapped chunks and the optimizer of the engine that train.engine names.

    models: what build_model returned.
    """
    if config.train.engine == "deepspeed":
        return deepspeed.build(config, models)
    chunks = wrap_for_data_parallelism(models, config, layout)
    return chunks, build_optimizer(config, chunks)
