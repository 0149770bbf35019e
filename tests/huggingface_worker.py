"""What transformers makes of exported folders: huggingface_worker.py FOLDER.

FOLDER/<kind> was exported; FOLDER/given.json holds a text, how many tokens are to be generated and
a batch of token ids for each kind. Writes FOLDER/answers.pt. Runs in a process of its own, without
the package: this is what a user has.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PROMPTS = ["ACGTNACGTTGCA", "ggc", "TTTTACGTAAAACCCGGGTTTNACGACTGACC"]
GREEDY = {"greedy": 1}
WAYS = {"moe_memory": {"greedy": 1, "beams": 2}}


@torch.no_grad()
def answers(folder: Path, tokens: torch.Tensor, text: str, new_tokens: int) -> dict:
    """All that the tests look at, of one model."""
    trust = {"trust_remote_code": True} if list(folder.glob("*.py")) else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    decoder = AutoModel.from_pretrained(folder, **trust).eval()
    model.save_pretrained(folder.with_name(f"{folder.name}_saved"))
    whole = model(tokens, output_hidden_states=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    ids = tokenizer(text)["input_ids"]
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "logits": whole.logits.float(),
        "hidden": whole.hidden_states[-1].float(),
        "layers": [state.float() for state in whole.hidden_states],
        "decoder": decoder(tokens).last_hidden_state.float(),
        "in_pieces": in_pieces(model, tokens).float(),
        "padded": padded(model, tokens),
        "gradients": gradients(model, tokens) if trust and model.dtype == torch.float32 else {},
        **generated_from_text(model, tokenizer),
        **generated(model, tokens, new_tokens, WAYS.get(folder.name, GREEDY) if trust else {}),
        "ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=False),
        "generation": GenerationConfig.from_pretrained(folder).to_dict(),
        "eos": (tokenizer.eos_token, tokenizer.eos_token_id),
    }


def in_pieces(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a text that comes in pieces, the first shorter than what memory reaches back."""
    logits, cache, start = [], None, 0
    for length in (3, 1, 1, 20, 1, tokens.shape[1] - 26):
        piece = tokens[:, start : start + length]
        out = model(piece, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        cache, start = out.past_key_values, start + length
    return torch.cat(logits, dim=1)


def padded(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of a text with 40 hidden tokens on one side. They are letters, which differ from one
    another in what they would do if the mask did not hide them."""
    pad = tokens[:, :40].flip(1)
    hidden, shown = torch.zeros_like(pad), torch.ones_like(tokens)
    left = model(torch.cat([pad, tokens], 1), attention_mask=torch.cat([hidden, shown], 1))
    right = model(torch.cat([tokens, pad], 1), attention_mask=torch.cat([shown, hidden], 1))
    return {"left": left.logits[:, 40:].float(), "right": right.logits[:, : -len(pad[0])].float()}


@torch.enable_grad()
def gradients(model, tokens: torch.Tensor) -> dict[str, float]:
    """Ways to train, and for each the largest relative error of a parameter's gradient, compared
    with that without a cache and without recomputation."""

    def compute(**settings) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens, **settings).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    def largest_error(**settings) -> float:
        try:
            found = compute(**settings)
        except CheckpointError:
            return float("inf")
        return max(
            ((found[name] - grad).norm() / grad.norm().clamp(min=1e-12)).item()
            for name, grad in right.items()
        )

    model.train()
    right, errors = compute(use_cache=False), {}
    for cache in ({}, {"use_cache": True}, {"use_cache": False}):
        errors[f"kept {cache}"] = largest_error(**cache)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            errors[f"recomputed, reentrant {reentrant} {cache}"] = largest_error(**cache)
            model.gradient_checkpointing_disable()
    # As FSDP does it: the model does not know.
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    errors["recomputed by another library"] = largest_error()
    for layer in model.model.layers:
        del layer.forward
    model.eval()
    return errors


def generated_from_text(model, tokenizer) -> dict:
    """What goes on from prompts of unequal length, with the settings that the folder brings."""
    together = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    length = together["input_ids"].shape[1]
    exactly = {"min_new_tokens": 12, "max_new_tokens": 12}
    alone = [model.generate(**tokenizer(text, return_tensors="pt"), **exactly) for text in PROMPTS]
    torch.manual_seed(0)
    many = {"min_new_tokens": 40, "max_new_tokens": 40}
    sampled = model.generate(**together, **many, do_sample=True, temperature=20.0)
    only_eod = [n for n in range(model.config.vocab_size) if n != tokenizer.eos_token_id]
    ended = model.generate(**together, max_new_tokens=100, suppress_tokens=only_eod)
    return {
        "together": model.generate(**together, **exactly)[:, length:].tolist(),
        "alone": [one[0, -12:].tolist() for one in alone],
        "sampled": set(sampled[:, length:].flatten().tolist()),
        "ended": ended[:, length:].tolist(),
    }


def generated(model, tokens: torch.Tensor, new_tokens: int, ways: dict[str, int]) -> dict:
    """Text that goes on from a prompt, with a cache and without. ways: a name, and how many
    beams."""
    prompt = tokens[:, :10]
    settings = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    return {
        f"generated_{name}_{cache}": model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            use_cache=cache,
            num_beams=beams,
            **settings,
        )
        for name, beams in ways.items()
        for cache in (True, False)
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    given = json.loads((place / "given.json").read_text())
    found = {
        kind: answers(place / kind, torch.tensor(tokens), given["text"], given["new_tokens"])
        for kind, tokens in given["tokens"].items()
    }
    torch.save(found, place / "answers.pt")
