"""Which keys a checkpoint's model may lack or have otherwise, before its weights are loaded."""

from pathlib import Path

import pytest

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.restore import check_same_model
from gengram_megatron.errors import UserError
from tests.training.tiny import RUN

CHECKPOINT = Path("runs/older/checkpoints/step_00000003")


def config_of(**gengram) -> Config:
    model = {**RUN["model"], "gengram": {**RUN["model"]["gengram"], **gengram}}
    own = {"run": {"dir": "unused"}, "data": {"path": "unused"}, "model": model}
    return Config.model_validate({**RUN, **own})


def stored_without(key: str) -> dict:
    """The `model` section of a checkpoint that was written before the key of the memory was
    there."""
    model = config_of().model.model_dump()
    del model["gengram"][key]
    return model


@pytest.mark.parametrize("new_run", [True, False])
def test_a_checkpoint_older_than_the_bias_has_none(new_run) -> None:
    older = stored_without("projection_bias")
    check_same_model(CHECKPOINT, older, config_of(), new_run)
    with pytest.raises(UserError, match=r"model\.gengram\.projection_bias = false, not true: set "):
        check_same_model(CHECKPOINT, older, config_of(projection_bias=True), new_run)


def test_other_keys_that_a_checkpoint_lacks_fit() -> None:
    older = stored_without("signed_sqrt")
    for value in (True, False):
        check_same_model(CHECKPOINT, older, config_of(signed_sqrt=value), new_run=True)


def test_a_bias_more_or_less_is_another_model() -> None:
    for theirs, ours in ((True, False), (False, True)):
        stored = config_of(projection_bias=theirs).model.model_dump()
        with pytest.raises(UserError, match=r"model\.gengram\.projection_bias"):
            check_same_model(CHECKPOINT, stored, config_of(projection_bias=ours), new_run=True)
