"""Tiny tokenizers built on the spot, one for each habit that the BOS and padding rules must cope with."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

EOT = "<|endoftext|>"
BYTE_MERGES = ("t h", "th e", "Ġ the", "Ġ c", "a t", "Ġc at", "Ġ s", "Ġs at", "T h", "Th e", "c at")
LLAMA_MERGES = ("t h", "th e", "▁ the", "▁ c", "a t", "▁c at", "▁ s", "▁s at", "▁ T", "h e", "▁T he")


def _vocab(symbols: list[str], merges: tuple[str, ...]) -> dict[str, int]:
    pieces = [*symbols, *(merge.replace(" ", "") for merge in merges)]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def _pairs(merges: tuple[str, ...]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ")) for merge in merges]


def _fast(backend: Tokenizer, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **options)


def byte_level(specials: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE backend: the 256 bytes, a few merges, then ``specials``."""
    vocab = _vocab(sorted(pre_tokenizers.ByteLevel.alphabet()), BYTE_MERGES)
    backend = Tokenizer(models.BPE(vocab, _pairs(BYTE_MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return backend


def gpt2_like() -> Any:
    """BOS = EOS = ``<|endoftext|>``, no PAD; adds nothing by itself."""
    return _fast(byte_level((EOT,)), bos_token=EOT, eos_token=EOT, unk_token=EOT)


def qwen_like() -> Any:
    """No BOS at all, an EOS and a PAD of their own; adds nothing by itself."""
    return _fast(byte_level((EOT, "<|im_end|>")), eos_token="<|im_end|>", pad_token=EOT)


def llama_like() -> Any:
    """SentencePiece-style BPE with byte fallback, a post-processor that adds ``<s>``, PAD of its own."""
    symbols = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = _vocab([*symbols, "▁", *"THabcehst.,"], LLAMA_MERGES)
    backend = Tokenizer(models.BPE(vocab, _pairs(LLAMA_MERGES), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in symbols[:4]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return _fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def llama3_like() -> Any:
    """Byte-level BPE with a post-processor that adds its BOS, and no PAD."""
    backend = byte_level(("<|begin_of_text|>", "<|end_of_text|>"))
    bos = backend.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return _fast(backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


TINY: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2_like,
    "olmo": gpt2_like,
    "qwen": qwen_like,
    "llama": llama_like,
    "llama3": llama3_like,
}
"""The golden file's tokenizers. ``olmo`` is GPT-2's for an architecture that is not told to add BOS."""
