"""Untrained models, and a tokenizer that has the words of all tasks as single tokens, for machines without GPT-2's."""

import re
import string
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.tasks.generators import agreement, docstring, facts, gender, ioi, numbers, questions
from tljax.tasks.words import facts as known
from tljax.tasks.words import people, things

EOT = "<|endoftext|>"


def untrained(tokenizer: Any, d_vocab: int, **fields: Any) -> HookedTransformer:
    """A model that only its tokenizer matters of."""
    base = {"d_model": 4, "n_heads": 1, "n_layers": 1, "n_ctx": 128, "act_fn": "relu", "normalization_type": None}
    return HookedTransformer(HookedTransformerConfig(**(base | {"d_vocab": d_vocab} | fields)), tokenizer)


def listed(held: Any) -> list[str]:
    """All texts in nested lists."""
    if isinstance(held, str):
        return [held]
    values = held.values() if isinstance(held, dict) else held
    return [text for one in values for text in listed(one)]


def word_tokenizer() -> Any:
    """Words with their leading space and digits in pairs, as GPT-2 splits most years; bytes for all else."""
    from transformers import PreTrainedTokenizerFast

    lists = [value for module in (people, things, known) for name, value in vars(module).items() if name.isupper()]
    templates = [
        ioi.VARIANTS,
        numbers.YEARS,
        numbers.PRICES,
        numbers.SEQUENCES,
        numbers.SUMS,
        gender.DEEDS,
        gender.PRAISE,
        agreement.SENTENCES,
    ]
    templates += [facts.CITIES, facts.LISTS, questions.SHELVES, questions.CHOICES, docstring.SENTENCE]
    more = "he she because isn So That person woman man Answer A Q is _ def self param The"
    text = " ".join(listed([lists, templates, more]))
    own = sorted(set(re.findall(r"[A-Za-z]+", text)))
    letters = [chr(number) for number in range(65, 91)]
    pairs = [f"{number:02d}" for number in range(100)] + [str(number) for number in range(100, 199)]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [
        EOT,
        *symbols,
        *own,
        *(f"Ġ{word}" for word in [*own, *letters, *pairs, *map(str, range(10)), *string.punctuation]),
        *pairs,
    ]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(dict.fromkeys(vocab))}, unk_token=EOT))
    split = r" ?1[0-9](?=[0-9]{2}(?![0-9]))| ?[0-9]+| ?[A-Za-z]+| ?[^\sA-Za-z0-9]|\s"
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytewise])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOT, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOT, eos_token=EOT)
