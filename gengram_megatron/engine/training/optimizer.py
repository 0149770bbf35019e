"""Adam, its learning-rate schedule, and how both are connected to the model's gradients."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.model.data_parallel import DataParallel, frozen
from gengram_megatron.engine.model.gpt import MemoryModule


class Optimizer(ChainedOptimizer):
    """megatron-core's optimizer, with a step that asks before it changes a weight."""

    @torch.no_grad()
    def step_if(self, accept: Callable[[float], bool]) -> float:
        """Does a step if `accept` returns True for the gradient norm (before clipping). Returns the
        norm."""
        self.prepare_grads()
        norm = self.get_grad_norm() or 0.0
        if accept(norm):
            self._clip(norm)
            self.step_with_ready_grads()
        return norm

    def _clip(self, norm: float) -> None:
        """Clips the gradients, as ChainedOptimizer.step does between computing the norm and the
        step (megatron-core 0.16.1)."""
        for optimizer in self.chained_optimizers:
            if getattr(optimizer, "is_stub_optimizer", False):  # this rank has no weights for it
                continue
            parameters = optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, norm)


def adam_settings(config: Config) -> tuple[OptimizerConfig, dict[ParamKey, ParamGroupOverride]]:
    """Returns Adam's settings for all weights, and overrides for some: Gengram tables may have
    their own learning rate and weight decay; norm weights and biases are not decayed."""
    settings = config.optimizer
    bf16 = config.train.dtype == "bf16"
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=settings.distributed,
        overlap_param_gather=settings.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(optimizer_config)
    if config.model.gengram.enabled:
        overrides[ParamKey(attr="is_gengram_table")] = _table_override(config)
    return optimizer_config, overrides


def build_optimizer(config: Config, chunks: list[DataParallel]) -> Optimizer:
    """Builds megatron-core's optimizer for a rank's chunks."""
    optimizer_config, overrides = adam_settings(config)
    with frozen([parameter for chunk in chunks for parameter in chunk.table_parameters]):
        optimizer = get_megatron_optimizer(
            optimizer_config, chunks, config_overrides=overrides, use_gloo_process_groups=False
        )
    optimizers = optimizer.chained_optimizers
    row_tables = [chunk.row_tables for chunk in chunks if chunk.row_tables is not None]
    if row_tables:
        optimizers = [*optimizers, _row_table_optimizer(optimizer_config, row_tables, overrides)]
    optimizer = Optimizer(optimizers)
    _connect(config, chunks, optimizer)
    return optimizer


def _row_table_optimizer(
    optimizer_config: OptimizerConfig,
    row_tables: list[DistributedDataParallel],
    overrides: dict[ParamKey, ParamGroupOverride],
) -> MegatronOptimizer:
    """Builds an optimizer for tables whose rows are split over data- or expert-parallel ranks."""
    chained = get_megatron_optimizer(
        optimizer_config,
        row_tables,
        config_overrides=overrides,
        use_gloo_process_groups=False,
        pg_collection=row_tables[0].groups,
    )
    # The last one is for expert parameters, which the tables count as; the others have no weights.
    return chained.chained_optimizers[-1]


def _table_override(config: Config) -> ParamGroupOverride:
    settings, tables = config.optimizer, config.optimizer.tables
    decay = settings.weight_decay if tables.weight_decay is None else tables.weight_decay
    return ParamGroupOverride(
        max_lr=settings.lr * tables.lr_multiplier,
        min_lr=settings.min_lr * tables.lr_multiplier,
        start_wd=decay,
        end_wd=decay,
        # When megatron-core loads a checkpoint, it does not use the keys above to tell parameter
        # groups apart; without this one it would mistake the tables' group for the main one.
        is_decoupled_lr=True,
    )


def _connect(config: Config, chunks: list[DataParallel], optimizer: MegatronOptimizer) -> None:
    """Sets in the model's config how the schedule scales, reduces and finishes gradients."""
    single = len(chunks) == 1
    transformer = chunks[0].config
    transformer.finalize_model_grads_func = _finish_gradients
    transformer.grad_scale_func = optimizer.scale_loss
    if config.optimizer.overlap_grad_reduce:
        transformer.no_sync_func = chunks[0].no_sync if single else [c.no_sync for c in chunks]
        if not single:
            transformer.grad_sync_func = [c.start_grad_sync for c in chunks]
    if config.optimizer.overlap_param_gather and not single:
        transformer.param_sync_func = [c.start_param_sync for c in chunks]


def _finish_gradients(chunks: list[DataParallel], *args: Any, **kwargs: Any) -> None:
    """Calls megatron-core's finalize_model_grads, after the memories have added the gradients that
    they accumulate themselves."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MemoryModule):
                module.finish_gradients()
    finalize_model_grads(chunks, *args, **kwargs)


def build_schedule(
    config: Config, layout: Layout, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """Builds the schedule: linear warm-up, then a cosine from lr to min_lr, both in samples."""
    settings = config.optimizer
    warmup, decay = _schedule_ends(config, layout)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=layout.samples,
        wd_incr_style="constant",
        # A run resumed with a changed config follows the config, not the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _schedule_ends(config: Config, layout: Layout) -> tuple[float, float]:
    """Returns the number of samples after which the warm-up and the decay end.

    The fractions apply to train.samples before it is rounded down to whole batches. As in the
    published launches, the decay ends after a whole number of samples, rounded down, while the
    warm-up is a fraction of the decay and is not rounded. Fractions are exact decimals here: 0.29
    of 100 samples is 29.
    """
    settings = config.optimizer
    warmup_share = Fraction(str(settings.warmup_fraction))
    decay_share = Fraction(str(settings.decay_fraction))
    decay = math.floor(decay_share * (config.train.samples or layout.samples))
    warmup = float(warmup_share / decay_share * decay) if decay_share else 0.0
    # The decay must end later than the warm-up, if only by a sample.
    return warmup, max(decay, warmup + 1)
