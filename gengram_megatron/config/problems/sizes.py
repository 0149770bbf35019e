"""Sizes with every null resolved, and the sentence for those that do not divide."""

from collections.abc import Iterator

from gengram_megatron.config.schema import Config


def ranks_of_a_copy(config: Config) -> int:
    """Ranks that hold one copy of the model together, experts apart."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def ranks_of_the_experts(config: Config) -> int:
    """Ranks that hold one copy of all experts together."""
    return expert_tensor(config) * config.parallel.expert * config.parallel.pipeline


def expert_tensor(config: Config) -> int:
    """Ranks that share an expert."""
    return config.parallel.expert_tensor or config.parallel.tensor


def sequence_parallel(config: Config) -> bool:
    """Whether tensor-parallel ranks share the sequence where they do not share the layer."""
    if config.parallel.sequence is None:
        return config.parallel.tensor > 1
    return config.parallel.sequence


def multiple(name: str, value: int, of_name: str, of: int) -> Iterator[str]:
    """The sentence for a value that must be a multiple of another, where it is not."""
    if value % of:
        yield f"{name} is {value}, which is not a multiple of {of_name} = {of}; change one of them"
