"""From a checkpoint of Megatron-LM to a model of transformers: the same logits at both ends."""

import pytest
import torch

from gengram_megatron.engine.exchange.export import export
from gengram_megatron.engine.exchange.importing import import_model
from gengram_megatron.tokenizer import BASE_IDS, EOD
from tests.exchange_models import load, run_alone
from tests.published_model import logits, published_model, save_distributed, save_ranks
from tests.published_worker import describe_as_mcore_metadata

ANSWER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load("tokens.pt")).logits, "logits.pt")
assert "gengram_megatron" not in sys.modules
"""


@pytest.mark.parametrize("form", ["distributed", "ranks"])
def test_published_model_answers_the_same_in_transformers(one_process, tmp_path, form) -> None:
    config = load(tmp_path, "run")
    gpt = published_model(config, one_process)
    if form == "distributed":
        save_distributed(gpt, config, tmp_path / "there")
        describe_as_mcore_metadata(tmp_path / "there" / "iter_0000100")
    else:
        save_ranks(gpt, config, tmp_path / "there", 2, 2, 2, "grouped")
    export(import_model(tmp_path / "there", config), tmp_path / "exported")
    generator = torch.Generator().manual_seed(4)
    tokens = torch.tensor(BASE_IDS)[torch.randint(5, (2, 48), generator=generator)]
    tokens[0, 20] = EOD
    torch.save(tokens, tmp_path / "tokens.pt")
    run_alone(tmp_path, "-c", ANSWER)
    expected = logits(gpt, config, tokens)
    assert expected.std() > 0.1  # and not all the same
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
