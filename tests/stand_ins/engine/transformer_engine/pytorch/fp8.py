"""Whether products are in fp8, and by which recipe."""

from contextlib import contextmanager


class FP8GlobalStateManager:
    """The innermost context."""

    recipe = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls):
        return cls.recipe


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    """Products inside are in fp8."""
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    """Weights would be in fp8 themselves."""
    raise NotImplementedError("weights in fp8 have no stand-in")
