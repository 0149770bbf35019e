"""What batches, optimizer and checkpoints ask for."""

from collections.abc import Iterator

from gengram_megatron.config.problems.sizes import ranks_of_a_copy
from gengram_megatron.config.schema import Config


def batch_problems(config: Config, world_size: int) -> Iterator[str]:
    """A sentence for each reason why the batches do not come out even."""
    train, parallel = config.train, config.parallel
    if (train.steps is None) == (train.samples is None):
        what = "neither is given" if train.steps is None else "both are given"
        yield f"the length of the run is train.steps or train.samples, but {what}; give one"
    if train.samples is not None and train.samples < train.global_batch_size:
        yield (
            f"train.samples is {train.samples}, less than one step of train.global_batch_size = "
            f"{train.global_batch_size}; raise samples or lower the batch"
        )
    if world_size % ranks_of_a_copy(config):
        return  # the data-parallel size is not known
    data = world_size // ranks_of_a_copy(config)
    together = train.micro_batch_size * data
    if train.global_batch_size % together:
        yield (
            f"train.global_batch_size is {train.global_batch_size}, which is not a multiple of "
            f"train.micro_batch_size * data-parallel size = {train.micro_batch_size} * {data}; "
            "change the batch, or the number of processes"
        )
        return
    microbatches, virtual = train.global_batch_size // together, parallel.virtual_pipeline
    if virtual is not None and microbatches % parallel.pipeline:
        yield (
            f"with parallel.virtual_pipeline = {virtual} the microbatches of a step must be a "
            f"multiple of parallel.pipeline = {parallel.pipeline}, but train.global_batch_size / "
            f"(micro_batch_size * data-parallel size) is {microbatches}; change the batch"
        )


def optimizer_problems(config: Config) -> Iterator[str]:
    """A sentence for each setting of the optimizer that cannot work."""
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr is {optimizer.min_lr:g}, above optimizer.lr = {optimizer.lr:g}; "
            "lower min_lr or raise lr"
        )
    if optimizer.warmup_fraction > optimizer.decay_fraction:
        yield (
            f"optimizer.warmup_fraction is {optimizer.warmup_fraction:g}, more than "
            f"optimizer.decay_fraction = {optimizer.decay_fraction:g}; the warm-up must end "
            "before the decay does"
        )
    pipeline, gengram = config.parallel.pipeline, config.model.gengram.enabled
    if not optimizer.distributed and config.train.dtype == "bf16" and pipeline > 1 and gengram:
        # A stage without memory has no tables, and megatron-core 0.16.1 cannot read the empty
        # parameter group back that it writes for them.
        yield (
            f"optimizer.distributed is false with train.precision {config.train.precision}, "
            f"parallel.pipeline = {pipeline} and Gengram, whose checkpoints megatron-core might not read back: set "
            "distributed to true"
        )
    if optimizer.overlap_param_gather:
        for name in ("distributed", "overlap_grad_reduce"):
            if not getattr(optimizer, name):
                yield (
                    f"optimizer.overlap_param_gather needs optimizer.{name}, which is false; "
                    f"set {name} to true, or overlap_param_gather to false"
                )


def checkpoint_problems(config: Config) -> Iterator[str]:
    """A sentence for each setting of checkpoints that cannot work."""
    interval, keep_every = config.checkpoint.interval, config.checkpoint.keep_every
    if keep_every and (interval is None or keep_every % interval):
        yield (
            f"checkpoint.keep_every is {keep_every}, which is no multiple of checkpoint.interval "
            f"({interval}): no checkpoint would stay for it"
        )
