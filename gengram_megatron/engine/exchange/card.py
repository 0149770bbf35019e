"""Writes the model card of an export: README.md, which Hugging Face shows beside the files.

The card states only facts from the checkpoint and from the folder of its run; what is in neither is
given as "not known". The license is left to those who publish the model.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from gengram_megatron import __version__
from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.errors import UserError
from gengram_megatron.runs.metrics import FILE, UNIFORM, read_metrics
from gengram_megatron.runs.store import Facts, read_facts

NOT_KNOWN = "not known"

# A test runs this code unchanged in the folder of an export.
_USE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of the model on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust}).eval()

# Score: the mean log-probability (in nats) of each base given the bases before it. The first base
# of a sequence has no context and is not scored.
batch = tokenizer(["ACGTTGCAACGTTGCA", "ggcattac"], return_tensors="pt", padding=True)
with torch.no_grad():
    log_probs = model(**batch).logits[:, :-1].float().log_softmax(-1)
bases = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
mask = batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]
print("scores:", ((bases * mask).sum(-1) / mask.sum(-1)).tolist())

# Generate: only A, C, G, T and N. Prompts of different lengths are padded on the left.
prompts = tokenizer(["ACGTTGCA", "GGC"], return_tensors="pt", padding=True)
generated = model.generate(**prompts, max_new_tokens=40, do_sample=True, temperature=1.0)
print("generated:", tokenizer.batch_decode(generated, skip_special_tokens=True))
"""

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

{summary}

## Use

Needs `torch` and `transformers` 5 or newer.{needs}

```python
{use}```

Each letter is one token. Case is folded, IUPAC's ambiguity codes are read as N, and any other
character becomes [UNK]. The end-of-document token, [EOD], also ends generated text, but training
masks it as a label, so a model that did not learn it elsewhere hardly ever generates it: set
`max_new_tokens`. The weights are not sharded and do not depend on the parallel layout in which the
model was trained. The config is for sequences of {length:,} bases; how the model does on longer
ones is not known.

## Model

{model}

## Training

{training}

{data}

## License

No license is given here. Whoever publishes this model must choose one, add it as `license:` to the
first lines of this file, and comply with the terms of the data and of any weights that training
started from.
"""


def model_card(checkpoint: Path, config: Config) -> str:
    """Returns the text of README.md for an export of a checkpoint."""
    facts, model = read_facts(checkpoint), config.model
    has_gengram = model.gengram.enabled
    kind = "dense" if model.num_experts is None else "mixture-of-experts"
    base = "Llama" if model.num_experts is None else "Mixtral"
    tags = ["dna", "genomics", base.lower(), *(["gengram"] if has_gengram else [])]
    if has_gengram:
        summary = (
            f"A {kind} language model of DNA: {base} with Gengram k-mer memory "
            "([arXiv 2601.22203](https://arxiv.org/abs/2601.22203)), written by gengram_megatron."
        )
        needs = (
            " The code of Gengram is in this folder, and `trust_remote_code=True` lets "
            "`transformers` run it: read it first."
        )
    else:
        summary = f"A {kind} language model of DNA: a plain {base}, written by gengram_megatron."
        needs = " No custom code is run."
    return _CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        name=Path(config.run.dir).name or "model",
        summary=summary,
        needs=needs,
        use=_USE.format(trust=", trust_remote_code=True" if has_gengram else ""),
        length=model.seq_length,
        model=_table(("", ""), _model_rows(config)),
        training=_table(("", ""), _training_rows(checkpoint, facts, config)),
        data=_data(facts, config),
    )


def _model_rows(config: Config) -> Iterable[tuple[str, str]]:
    """Yields a name and a value for each property of the model."""
    model, gengram, counted = config.model, config.model.gengram, count_parameters(config)
    yield "parameters", f"{counted.total:,}"
    if model.num_experts is not None:
        yield "active parameters per token", f"{counted.activated:,}"
        topk = model.moe_router_topk
        yield "experts", f"{model.num_experts}, of which each token is routed to {topk}"
    yield "layers", str(model.num_layers)
    yield "hidden size", f"{model.hidden_size:,}"
    groups = model.num_query_groups or model.num_attention_heads
    yield "attention", f"{model.num_attention_heads} query heads, {groups} key-value heads"
    yield (
        f"feed-forward width{'' if model.num_experts is None else ' per expert'}",
        f"{model.ffn_hidden_size:,}",
    )
    yield "sequence length", f"{model.seq_length:,}"
    yield "RoPE base", f"{model.rotary_base:,}"
    yield "vocabulary", f"{model.vocab_size} (13 ids in use)"
    yield "dtype of the weights", "float32" if config.train.dtype == "fp32" else "bfloat16"
    if not gengram.enabled:
        yield "Gengram memory", "none"
        return
    yield "Gengram layers (from 1)", ", ".join(map(str, sorted(gengram.layers)))
    yield "k-mer sizes", ", ".join(map(str, gengram.kmer_sizes))
    no_window = "none: only the k-mers that end at the token"
    yield "Gengram window", f"{gengram.window} tokens" if gengram.window else no_window
    yield "embedding columns per k-mer size", f"{gengram.dim:,}"
    yield "Gengram parameters", f"{counted.gengram:,}, of which {counted.tables:,} in tables"
    yield "Gengram output", gengram.output
    options = {
        "each k-mer counted once per window": gengram.deduplicate,
        "stops at document boundaries": gengram.reset_at_document,
        "rows shared by reverse complements": gengram.share_reverse_complements,
        "signed square root in the gate": gengram.signed_sqrt,
        "bias of key and value": gengram.projection_bias,
    }
    yield "Gengram options", ", ".join(name for name, on in options.items() if on) or "none"


def _training_rows(checkpoint: Path, facts: Facts, config: Config) -> Iterable[tuple[str, str]]:
    """Yields a name and a value for each fact about the training."""
    train, optimizer = config.train, config.optimizer
    yield "step", f"{facts.step:,}"
    if facts.step == 0:
        yield "trained", "not by gengram_megatron: these are the imported weights"
    else:
        tokens = facts.samples * config.model.seq_length
        yield "tokens seen in this run", f"{tokens:,} ({facts.samples:,} samples)"
        start = config.checkpoint.load
        if start is not None:
            yield "initial weights", f"from the run or checkpoint {Path(start).name}"
        yield "validation loss", _loss(checkpoint, facts)
        limit = train.validation_samples
        samples = "all" if limit is None else f"at most {limit:,}"
        yield "samples per validation", f"{samples} of the held-out samples"
        yield "samples per step", f"{train.global_batch_size:,}"
        yield "learning rate", f"{optimizer.lr:g} to {optimizer.min_lr:g}, cosine"
        yield "precision", train.precision
        yield "seed", str(facts.seed)
    installed = ("torch", "safetensors", "tokenizers")
    packages = ", ".join(f"{name} {version(name)}" for name in installed)
    yield "exported with", f"gengram_megatron {__version__}, {packages}"


def _loss(checkpoint: Path, facts: Facts) -> str:
    """Returns the loss of the run's last validation up to the checkpoint's step, as text."""
    file = checkpoint.resolve().parent.parent / FILE
    try:
        entries = read_metrics(file)
    except (OSError, UserError):  # a copied checkpoint is not in the folder of a run
        return NOT_KNOWN
    validations = [e for e in entries if e["kind"] == "validation" and e["step"] <= facts.step]
    if not validations or not math.isfinite(loss := validations[-1]["loss"]):
        return NOT_KNOWN
    return (
        f"{loss:.4f} nats per base, {loss / math.log(2):.4f} bits per base, after step "
        f"{validations[-1]['step']:,} (uniform over A, C, G, T: {UNIFORM:.4f} nats, 2 bits)"
    )


def _data(facts: Facts, config: Config) -> str:
    """Returns a table of the training data sets, or a line that says that they are not known."""
    if facts.step == 0:
        return f"Data: {NOT_KNOWN}."
    data = config.data
    names = [Path(data.path).name] if data.path else [part.label for part in data.blend or ()]
    data_facts = facts.data if len(facts.data) == len(names) else [{}] * len(names)
    rows = [
        (
            name,
            f"{float(Fraction(one['share'])):.2%}" if one else NOT_KNOWN,
            one.get("sha256", NOT_KNOWN),
        )
        for name, one in zip(names, data_facts)
    ]
    return _table(("data set", "share of the samples", "SHA-256 of its training split"), rows)


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Returns a Markdown table."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
