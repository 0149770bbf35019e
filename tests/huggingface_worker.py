"""What transformers makes of exported folders: huggingface_worker.py FOLDER.

FOLDER/<kind> was exported; FOLDER/given.json holds a text, how many tokens are to be generated and
a batch of token ids for each kind. Writes FOLDER/answers.pt. Runs in a process of its own, without the package: this is what a user has.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

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
        "padded": left_padded(model, tokens).float(),
        **generated(model, tokens, new_tokens, WAYS.get(folder.name, GREEDY) if trust else {}),
        "ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=False),
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


def left_padded(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a text behind seven [PAD]."""
    pad = torch.zeros((len(tokens), 7), dtype=tokens.dtype)
    mask = torch.cat([pad, torch.ones_like(tokens)], dim=1)
    return model(torch.cat([pad, tokens], dim=1), attention_mask=mask).logits[:, 7:]


def generated(model, tokens: torch.Tensor, new_tokens: int, ways: dict[str, int]) -> dict:
    """Text that goes on from a prompt, with a cache and without. ways: a name, and how many beams."""
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
