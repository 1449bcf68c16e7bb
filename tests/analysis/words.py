"""A tokenizer of fifty words, ``w1`` to ``w49`` and BOS, for the tiny golden models."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers


def word_tokenizer() -> Any:
    """One token a word; BOS, EOS and PAD are ``<bos>``, id 0."""
    from transformers import PreTrainedTokenizerFast

    vocab = {"<bos>": 0, **{f"w{number}": number for number in range(1, 50)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {f"{name}_token": "<bos>" for name in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials)
