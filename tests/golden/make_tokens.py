"""Writes tokens.json: what TransformerLens 3.9's tokenization methods answer for the tiny tokenizers.

Needs transformer-lens<4 and torch (the ``[bench]`` extra); needs no network. Run from the repository root:
``python tests/golden/make_tokens.py``
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
N_CTX = 20
SHORT_TEXTS = ["", "the", "the cat", ["The cat sat", "", "the"], ["the cat", " sat"], "{bos}the cat"]
ODD_TEXTS = ["naïve 日本 🙂", ["{bos}the", "The cat, the cat.", "the{bos}"]]
LONG_TEXTS = ["The cat sat.  The cat" * 4, ["cat", "the cat sat, the cat" * 4]]
TEXTS = [*SHORT_TEXTS, *ODD_TEXTS, *LONG_TEXTS]
TOKENS_TO_FIND = ["the", " cat", "The", "."]


def fill(text, bos):
    """Puts the tokenizer's own BOS string where the text asks for it."""
    return [fill(item, bos) for item in text] if isinstance(text, list) else text.replace("{bos}", bos)


def answers(model, mask_of):
    """Records every method's answers over the grid, one dict a case."""
    tokenizer = model.tokenizer
    for text, prepend_bos, side in itertools.product(TEXTS, (True, False), ("left", "right")):
        if isinstance(text, str) and text and side == "left":
            continue  # alone in its batch, nothing to pad
        text = fill(text, tokenizer.bos_token)
        for truncate in (True, False) if text in LONG_TEXTS else (True,):
            tokens = model.to_tokens(text, prepend_bos=prepend_bos, padding_side=side, truncate=truncate)
            yield {
                "text": text,
                "prepend_bos": prepend_bos,
                "padding_side": side,
                "truncate": truncate,
                "tokens": tokens.tolist(),
                "mask": mask_of(tokenizer, tokens, prepend_bos, side).tolist(),
            }


def per_text(model):
    """Records what does not depend on the padding side."""
    for text, prepend_bos in itertools.product(TEXTS, (True, False)):
        text = fill(text, model.tokenizer.bos_token)
        case = {"text": text, "prepend_bos": prepend_bos}
        no_tokens = not prepend_bos and "" in ([text] if isinstance(text, str) else text)
        if not no_tokens:  # transformers 4 and 5 disagree on the strings of no tokens: [] and [""]
            case["str_tokens"] = model.to_str_tokens(text, prepend_bos=prepend_bos)
        case["string"] = model.to_string(model.to_tokens(text, prepend_bos=prepend_bos))
        if isinstance(text, str):
            case["positions"] = {
                token: [position_of(model, token, text, mode, prepend_bos) for mode in ("first", "last")]
                for token in TOKENS_TO_FIND
            }
        yield case


def position_of(model, token, text, mode, prepend_bos):
    """The position, or None where TransformerLens refuses."""
    try:
        return model.get_token_position(token, text, mode=mode, prepend_bos=prepend_bos)
    except AssertionError:
        return None


def main():
    """Asks TransformerLens and writes the file."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.utilities.tokenize_utils import get_attention_mask
    from transformers import AutoTokenizer

    sys.path.insert(0, str(HERE.parent / "text"))
    from tiny_tokenizers import TINY

    golden = {"n_ctx": N_CTX, "tokenizers": {}}
    for name, build in TINY.items():
        with tempfile.TemporaryDirectory() as directory:
            build().save_pretrained(directory)
            cfg = HookedTransformerConfig(
                d_model=4, n_layers=1, n_ctx=N_CTX, d_head=4, attn_only=True, device="cpu", d_vocab=-1,
                original_architecture="Olmo2ForCausalLM" if name == "olmo" else None,
            )  # fmt: skip
            model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(directory))
            tokenizer = model.tokenizer
            golden["tokenizers"][name] = {
                "prepends_bos": model.cfg.tokenizer_prepends_bos,
                "d_vocab": model.cfg.d_vocab,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "padding_side": tokenizer.padding_side,
                "batches": list(answers(model, get_attention_mask)),
                "texts": list(per_text(model)),
            }
    lines = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace('{"text"', '\n{"text"')
    (HERE / "tokens.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
