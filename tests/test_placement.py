"""Of all placements of layers over pipeline stages, the checks allow those, and only those, in
which megatron-core gives each layer to one stage, in order."""

from dataclasses import replace
from itertools import product

import pytest

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from tests.layouts.cases import EIGHT_LAYERS, MODEL

OWN = (None, *range(1, 10))
PLACEMENTS = list(product((2, 3, 4), (None, 2, 3), OWN, OWN))


def config_of(**parallel) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {**MODEL, **EIGHT_LAYERS},
            "parallel": parallel,
            "data": {"path": "unused"},
            "train": {"global_batch_size": 12, "steps": 1, "precision": "fp32"},
        }
    )


def memory_in_order(config: Config, monkeypatch) -> list[bool]:
    """For each layer, as a token passes them: whether it is built with memory."""
    from megatron.core import parallel_state
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from gengram_megatron.engine.model.build import build_memory, transformer_config
    from gengram_megatron.engine.model.specs import block_spec

    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    layout = replace(check_layout(config_of(), 1), pipeline=pipeline, virtual_pipeline=virtual)
    transformer, found = transformer_config(config, layout), []
    memory = build_memory(config, layout)
    for chunk, rank in product(range(virtual or 1), range(pipeline)):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda r=rank: r)
        vp_stage = chunk if virtual else None
        # megatron-core numbers the layers of a stage from here.
        assert get_transformer_layer_offset(transformer, vp_stage=vp_stage) == len(found)
        specs = block_spec(config.model, memory, transformer, vp_stage).layer_specs
        assert specs
        found += [spec.submodules.memory is not IdentityOp for spec in specs]
    return found


def test_checks_allow_what_works(monkeypatch) -> None:
    allowed = 0
    for pipeline, virtual, first, last in PLACEMENTS:
        config = config_of(
            pipeline=pipeline,
            virtual_pipeline=virtual,
            first_stage_layers=first,
            last_stage_layers=last,
        )
        try:
            check_layout(config, pipeline)
        except UserError:
            with pytest.raises((ValueError, AssertionError, ZeroDivisionError)):
                memory_in_order(config, monkeypatch)
            continue
        allowed += 1
        expected = [number in (2, 5, 7) for number in range(1, 9)]
        assert memory_in_order(config, monkeypatch) == expected, config.parallel
    assert allowed > 40
