"""Text and tokenizers."""

import functools
from typing import Any

import jax.numpy as jnp
import tokenizers
from table import Case, World

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.errors import ConfigError, TokenizerError

WORDS = ("[PAD]", "[CLS]", "[SEP]", "the", "cat")


@functools.cache
def bracketed() -> HookedTransformer:
    """A model whose tokenizer puts ``[CLS]`` before and ``[SEP]`` after each text."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(WORDS[:3]))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", pad_token="[PAD]")
    return HookedTransformer(World.config(n_ctx=16), tokenizer)


def notes(model: HookedTransformer, text: str, **options: Any) -> list[Any]:
    """What a report says of each token, and whether BOS is doubled."""
    (prompt,) = model.tokens_report(text, **options).prompts
    return [*prompt.notes, prompt.doubled_bos]


def stopped(w: World, prompt: Any, **options: Any) -> Any:
    return w.tiny.generate(
        prompt, 8, do_sample=False, stop_strings="Mary.", stop_at_eos=False, verbose=False, **options
    )


CASES: tuple[Case, ...] = (
    Case("a report of EOT alone", lambda w: notes(w.tiny, "<|endoftext|>"),
         equals=["BOS, added by tljax", "BOS, spelled in the text", True]),
    Case("a report of EOT alone, without BOS", lambda w: notes(w.tiny, "<|endoftext|>", prepend_bos=False),
         equals=["BOS, spelled in the text", False]),
    Case("a report of EOT twice", lambda w: notes(w.tiny, "<|endoftext|>" * 2),
         equals=["BOS, added by tljax", "BOS, spelled in the text", "EOS, spelled in the text", True]),
    Case("a report of no text", lambda w: notes(w.tiny, ""), equals=["BOS, added by tljax", False]),
    Case("a report of what the tokenizer adds too", lambda _: notes(bracketed(), "[CLS]", prepend_bos=False),
         equals=["added by the tokenizer", "", "EOS, added by the tokenizer", False]),
    Case("a single token where SEP is appended", lambda _: bracketed().to_single_token("cat"), equals=4),
    Case("no single token either way", lambda _: bracketed().to_single_token("the cat"), TokenizerError, "is 2 tokens"),
    Case("where that token stands", lambda _: bracketed().get_token_position("cat", "the cat", prepend_bos=False),
         equals=2),
    Case("what fills a row after a stop string", lambda w: stopped(w, w.P), equals=lambda w: w.P + " Mary."),
    Case("the same in a batch", lambda w: stopped(w, [w.P, w.S]), equals=lambda w: [stopped(w, w.P), stopped(w, w.S)]),
    Case("the same as tokens", lambda w: stopped(w, w.tiny.to_tokens(w.P)),
         equals=lambda w: w.tiny.to_tokens(w.P + " Mary.")),
    Case("stop ids that are never met", lambda w: _silent(w).generate(jnp.array([[1]]), 3, verbose=False).shape,
         equals=(1, 4)),
    Case("a stop id that is text", lambda _: World.config(eos_token_ids="</s>"), ConfigError, "must be a token id"),
    Case("a stop id that is a truth value", lambda _: World.config(pad_token_id=True), ConfigError, "=True"),
    Case("stop ids by their old names", lambda _: HookedTransformerConfig.from_dict({"eos_token_id": 1}), ConfigError,
         "'eos_token_ids'"),
)  # fmt: skip


def _silent(w: World) -> HookedTransformer:
    """A model that never meets the token that its checkpoint says ends a text, and has no tokenizer."""
    return w.small.replace(cfg=w.small.cfg.replace(eos_token_ids=(10**6,)))
