"""The model card of an export: README.md, which Hugging Face shows beside the files.

It says only what the checkpoint and the folder of its run say; what neither knows is named as not
known. A license is left to those who publish the model.
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

# It runs as it is in the folder of the export; a test does so.
_USE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of the model on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust}).eval()

# Score: the mean log-probability (nats) of each base given those before it. The first base of a
# sequence has none before it and is not scored.
batch = tokenizer(["ACGTTGCAACGTTGCA", "ggcattac"], return_tensors="pt", padding=True)
with torch.no_grad():
    log_probs = model(**batch).logits[:, :-1].float().log_softmax(-1)
bases = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
mask = batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]
print("scores:", ((bases * mask).sum(-1) / mask.sum(-1)).tolist())

# Generate: A C G T N only. Prompts of unequal length are padded on the left.
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

A letter is a token. Case is folded, IUPAC's ambiguous letters are read as N, and any other letter
becomes [UNK]. The end of a document, [EOD], also ends generated text, but training does not score
it as a label, so a model that learned nothing else hardly ever gives it: set `max_new_tokens`.
The weights are whole: nothing depends on how many processes trained the model, or on how they
shared it. Its config is for sequences of {length:,} bases; of longer ones nothing is known.

## Model

{model}

## Training

{training}

{data}

## License

None is given here. Whoever publishes this model chooses one, as `license:` in the first lines of
this file, and sees to the terms of the data and of weights that training began with.
"""


def model_card(checkpoint: Path, config: Config) -> str:
    """README.md of what is exported from a checkpoint."""
    facts, model = read_facts(checkpoint), config.model
    memory = model.gengram.enabled
    kind = "dense" if model.num_experts is None else "mixture-of-experts"
    base = "Llama" if model.num_experts is None else "Mixtral"
    tags = ["dna", "genomics", base.lower(), *(["gengram"] if memory else [])]
    if memory:
        summary = (
            f"A {kind} language model of DNA: {base} with Gengram k-mer memory "
            "([arXiv 2601.22203](https://arxiv.org/abs/2601.22203)), written by gengram_megatron."
        )
        needs = (
            " The memory's code lies in this folder, and `trust_remote_code=True` lets "
            "`transformers` run it: read it first."
        )
    else:
        summary = f"A {kind} language model of DNA: a plain {base}, written by gengram_megatron."
        needs = " No code but theirs is run."
    return _CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        name=Path(config.run.dir).name or "model",
        summary=summary,
        needs=needs,
        use=_USE.format(trust=", trust_remote_code=True" if memory else ""),
        length=model.seq_length,
        model=_table(("", ""), _model_rows(config)),
        training=_table(("", ""), _training_rows(checkpoint, facts, config)),
        data=_data(facts, config),
    )


def _model_rows(config: Config) -> Iterable[tuple[str, str]]:
    model, gengram, counted = config.model, config.model.gengram, count_parameters(config)
    yield "parameters", f"{counted.total:,}"
    if model.num_experts is not None:
        yield "parameters that a token uses", f"{counted.activated:,}"
        yield "experts", f"{model.num_experts}, of which a token goes to {model.moe_router_topk}"
    yield "layers", str(model.num_layers)
    yield "hidden size", f"{model.hidden_size:,}"
    groups = model.num_query_groups or model.num_attention_heads
    yield "attention", f"{model.num_attention_heads} heads, {groups} of keys and values"
    yield (
        f"feed-forward width{'' if model.num_experts is None else ' of an expert'}",
        f"{model.ffn_hidden_size:,}",
    )
    yield "sequence length", f"{model.seq_length:,}"
    yield "RoPE base", f"{model.rotary_base:,}"
    yield "vocabulary", f"{model.vocab_size} (13 ids in use)"
    yield "weights in", "float32" if config.train.dtype == "fp32" else "bfloat16"
    if not gengram.enabled:
        yield "Gengram memory", "none"
        return
    yield "memory in layers (from 1)", ", ".join(map(str, sorted(gengram.layers)))
    yield "memory's k-mers", ", ".join(map(str, gengram.kmer_sizes))
    window = (
        f"{gengram.window} tokens" if gengram.window else "none: the k-mers that end at a token"
    )
    yield "memory's window", window
    yield "memory's columns a k", f"{gengram.dim:,}"
    yield "memory's parameters", f"{counted.gengram:,}, of them in tables {counted.tables:,}"
    yield "memory's output", gengram.output
    options = {
        "k-mers counted once a window": gengram.deduplicate,
        "stops at a document's end": gengram.reset_at_document,
        "shared rows of reverse complements": gengram.share_reverse_complements,
        "signed square root at the gate": gengram.signed_sqrt,
        "bias of key and value": gengram.projection_bias,
    }
    yield "memory's options", ", ".join(name for name, on in options.items() if on) or "none"


def _training_rows(checkpoint: Path, facts: Facts, config: Config) -> Iterable[tuple[str, str]]:
    train, optimizer = config.train, config.optimizer
    yield "step", f"{facts.step:,}"
    if facts.step == 0:
        yield "trained", "not by gengram_megatron: the weights are as they were imported"
    else:
        tokens = facts.samples * config.model.seq_length
        yield "tokens seen in this run", f"{tokens:,} ({facts.samples:,} samples)"
        start = config.checkpoint.load
        if start is not None:
            yield "weights at its start", f"those of the run or checkpoint {Path(start).name}"
        yield "validation loss", _loss(checkpoint, facts)
        limit = train.validation_samples
        samples = "all" if limit is None else f"at most {limit:,}"
        yield "samples of a validation", f"{samples} of the held-out ones"
        yield "samples a step", f"{train.global_batch_size:,}"
        yield "learning rate", f"{optimizer.lr:g} to {optimizer.min_lr:g}, cosine"
        yield "precision", train.precision
        yield "seed", str(facts.seed)
    installed = ("torch", "safetensors", "tokenizers")
    packages = ", ".join(f"{name} {version(name)}" for name in installed)
    yield "exported with", f"gengram_megatron {__version__}, {packages}"


def _loss(checkpoint: Path, facts: Facts) -> str:
    """The last validation that the run's metrics have up to the checkpoint's step."""
    file = checkpoint.resolve().parent.parent / FILE
    try:
        entries = read_metrics(file)
    except (OSError, UserError):  # a checkpoint that was copied lies in no run's folder
        return NOT_KNOWN
    found = [e for e in entries if e["kind"] == "validation" and e["step"] <= facts.step]
    if not found or not math.isfinite(loss := found[-1]["loss"]):
        return NOT_KNOWN
    return (
        f"{loss:.4f} nats a base, {loss / math.log(2):.4f} bits a base, after step "
        f"{found[-1]['step']:,} (uniform over A C G T: {UNIFORM:.4f} nats, 2 bits)"
    )


def _data(facts: Facts, config: Config) -> str:
    if facts.step == 0:
        return f"Data: {NOT_KNOWN}."
    data = config.data
    names = [part.label for part in data.blend] if data.blend else [Path(data.path).name]
    known = facts.data if len(facts.data) == len(names) else [{}] * len(names)
    rows = [
        (
            name,
            f"{float(Fraction(one['share'])):.2%}" if one else NOT_KNOWN,
            one.get("sha256", NOT_KNOWN),
        )
        for name, one in zip(names, known)
    ]
    return _table(("data set", "share of the samples", "SHA-256 of its training split"), rows)


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
