"""Who adds up gradients and steps: megatron-core, or DeepSpeed's ZeRO. Losses are the same.

An engine is a rank's model chunks, wrapped so that megatron-core's schedules can run them and their
gradients are added up, and an optimizer with `zero_grad`, `step_if` and `param_groups`. What
checkpoints hold of the two is in checkpoint/contents.py and checkpoint/zero.py.
"""

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.model.build import wrap_for_data_parallelism
from gengram_megatron.engine.training.engines import deepspeed
from gengram_megatron.engine.training.optimizer import build_optimizer


def build_engine(config: Config, layout: Layout, models: list) -> tuple[list, object]:
    """The wrapped chunks and the optimizer of the engine that train.engine names.

    models: what build_model returned.
    """
    if config.train.engine == "deepspeed":
        return deepspeed.build(config, models)
    chunks = wrap_for_data_parallelism(models, config, layout)
    return chunks, build_optimizer(config, chunks)
