"""Weights that tensor-parallel ranks split need a sharded state that says so."""

import pytest
from megatron.core.transformer.module import MegatronModule

from gengram_megatron.engine.model.build import transformer_config
from gengram_megatron.engine.model.initialize import initialize, split_weight, whole_weight
from tests.plan.ranks import as_rank
from tests.plan.small import config_of


def test_a_split_weight_that_the_sharded_state_presents_as_whole_is_refused() -> None:
    """Else all ranks would start with the same values, and a checkpoint would keep one part."""
    config, layout = config_of(2, {}, {"tensor": 2}, "none")
    with as_rank(layout, 0):
        settings = transformer_config(config, layout)
        module = MegatronModule(settings)
        module.weight = whole_weight((8, 4), settings, settings.init_method)
        initialize([module], seed=7)
        module.weight = split_weight((8, 4), 0, settings, settings.init_method)
        with pytest.raises(AssertionError, match=r"weight is split .* sharded_state_dict"):
            initialize([module], seed=7)
