"""What lies beside an exported model's weights: its card, and who may read the files."""

import json
import os
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from gengram_megatron.engine.checkpoint.stored import read_config
from gengram_megatron.engine.checkpoint.weights_only import strip
from gengram_megatron.engine.exchange.card import model_card
from gengram_megatron.engine.exchange.export import export
from gengram_megatron.engine.exchange.importing import import_model
from gengram_megatron.runs.metrics import RunLog
from gengram_megatron.runs.store import FACTS, find_checkpoint
from tests.exchange_models import KINDS, Trained, load, make, run_alone

ALONE = """
for text in ("ACGTTGCAACGTTGCA", "ggcattac"):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probs = model(ids).logits.float().log_softmax(-1)[0]
    print("alone:", sum(log_probs[n, ids[0, n + 1]].item() for n in range(len(text) - 1)) / (len(text) - 1))
"""


@pytest.fixture(scope="module")
def models(one_process, tmp_path_factory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("trained")
    return {kind: make(kind, folder) for kind in ("moe_memory", "dense_gqa")}


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def rows(card: str) -> dict[str, list[str]]:
    """The tables of a card: the first cell of a line, and the others."""
    lines = re.findall(r"^\| (.+) \|$", card, re.MULTILINE)
    return {first: others for first, *others in (line.split(" | ") for line in lines)}


def test_everybody_may_read_what_is_written(models, tmp_path, usual_umask) -> None:
    checkpoint = find_checkpoint(models["moe_memory"].run)
    export(checkpoint, tmp_path / "new" / "exported", 300_000)
    strip(checkpoint, tmp_path / "light")
    import_model(tmp_path / "new" / "exported", load(tmp_path, "run", *KINDS["moe_memory"]))
    folders = [tmp_path / name for name in ("new", "light", "run")]
    written = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    assert len(written) > 20
    for path in written:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_who_may_read_is_left_to_the_umask(models, tmp_path, usual_umask) -> None:
    os.umask(0o027)
    export(find_checkpoint(models["dense_gqa"].run), tmp_path / "exported")
    files = list((tmp_path / "exported").iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


@pytest.mark.parametrize("kind", ["moe_memory", "dense_gqa"])
def test_code_of_the_card_runs(models, tmp_path, kind) -> None:
    out = tmp_path / "exported"
    export(find_checkpoint(models[kind].run), out)
    card = (out / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    printed = run_alone(out, "-c", code + ALONE)
    scores = yaml.safe_load(re.search(r"scores: (.*)", printed)[1])
    alone = [float(number) for number in re.findall(r"alone: (.*)", printed)]
    assert scores == pytest.approx(alone, rel=1e-5)
    generated = yaml.safe_load(re.search(r"generated: (.*)", printed)[1])
    assert generated[0].startswith("ACGTTGCA") and generated[1].startswith("GGC")
    assert {letter for text in generated for letter in text} <= set("ACGTN")
    assert ("trust_remote_code" in card) == (kind == "moe_memory")


def test_card_says_what_was_trained(models, tmp_path) -> None:
    model = models["moe_memory"]
    checkpoint, config = find_checkpoint(model.run), read_config(find_checkpoint(model.run))
    assert rows(model_card(checkpoint, config))["validation loss"] == ["not known"]
    with RunLog(model.run, config, resume_step=0) as log:
        for step, loss in ((2, 1.3), (3, 1.25), (4, 1.2)):  # the last is of other weights
            log.validation(step=step, samples=8 * step, tokens=512 * step, loss=loss)
    card = model_card(checkpoint, config)
    found = rows(card)
    total = sum(weight.numel() for weight in model.weights.values())
    tables = sum(w.numel() for name, w in model.weights.items() if ".tables." in name)
    assert found["parameters"] == [f"{total:,}"]
    assert found["Gengram parameters"][0].endswith(f" {tables:,} in tables")
    assert found["Gengram layers (from 1)"] == ["2, 3"]
    assert found["Gengram window"] == ["21 tokens"]
    assert found["experts"] == ["4, of which each token is routed to 2"]
    assert found["step"] == ["3"]
    assert found["tokens seen in this run"] == ["1,536 (24 samples)"]
    assert found["validation loss"][0].startswith(
        "1.2500 nats per base, 1.8034 bits per base, after step 3"
    )
    assert found["no_data"] == ["not known", "not known"]  # its facts name no data set
    front = ModelCard(card).data  # as Hugging Face reads it
    assert front.library_name == "transformers" and front.pipeline_tag == "text-generation"
    assert front.license is None and {"dna", "genomics", "gengram", "mixtral"} <= {*front.tags}


def test_card_names_data_sets_by_their_checksums(models, tmp_path) -> None:
    original = find_checkpoint(models["dense_gqa"].run)
    checkpoint = strip(original, tmp_path / "light")
    blend = "data.blend=[{path: sets/human, weight: 3}, {path: sets/apes, weight: 1, name: a|b}]"
    config = load(tmp_path, "run", *KINDS["dense_gqa"], "data.path=null", blend)
    facts = json.loads((checkpoint / FACTS).read_text())
    facts["data"] = [{"sha256": "12ab", "share": "3/4"}, {"sha256": "34cd", "share": "1/4"}]
    (checkpoint / FACTS).write_text(json.dumps(facts))
    found = rows(model_card(checkpoint, config))
    assert found["human"] == ["75.00%", "12ab"] and found["a\\|b"] == ["25.00%", "34cd"]
    assert found["validation loss"] == ["not known"]  # it lies in no run's folder
    assert found["Gengram memory"] == ["none"]


def test_card_of_imported_weights_claims_no_training(models, tmp_path) -> None:
    export(find_checkpoint(models["dense_gqa"].run), tmp_path / "exported")
    config = load(tmp_path, "run", *KINDS["dense_gqa"])
    found = rows(model_card(import_model(tmp_path / "exported", config), config))
    assert found["step"] == ["0"] and "trained" in found
    assert not {"tokens seen in this run", "validation loss", "learning rate"} & found.keys()
