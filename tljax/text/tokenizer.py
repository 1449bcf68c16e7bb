"""``Tokenizer``: a Hugging Face tokenizer with known special tokens."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Never

from tljax.errors import InputError, TokenizerError
from tljax.typing import PaddingSide

FALLBACK_EOS = "<|endoftext|>"
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", FALLBACK_EOS)
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", FALLBACK_EOS)
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
PROBES = 64
_LARGEST_VOCABULARY = 10_000_000
REQUIRED_API = ("decode", "batch_decode", "get_vocab", "bos_token", "eos_token", "pad_token")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A Hugging Face tokenizer with known special tokens, made by :func:`wrap_tokenizer`.

    Equal only to itself and hashed by identity, so it can be static data of a jitted function.

    Attributes:
        hf: the Hugging Face tokenizer, a private copy.
        prepends_bos: whether ``hf`` puts BOS in front of every text by itself.
        bos_token_id: id that starts a text; ``None`` if the vocabulary has no such token.
        eos_token_id: id that ends a text, or ``None``.
        pad_token_id: id that fills short rows of a batch, or ``None``.
        padding_side: where short rows are filled unless a call says otherwise.
        d_vocab: the largest token id plus one.
        unk_token_id: id for text that the vocabulary cannot spell, or ``None``.
        told_to_add_bos: whether ``hf`` puts BOS there only because :func:`wrap_tokenizer` told it to.
        warned: the once-per-tokenizer warnings that were already given.
    """

    hf: Any = dataclasses.field(repr=False)
    prepends_bos: bool
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    padding_side: PaddingSide
    d_vocab: int
    unk_token_id: int | None = None
    told_to_add_bos: bool = dataclasses.field(default=False, repr=False)
    warned: set[type[Warning]] = dataclasses.field(default_factory=set, init=False, repr=False)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Returns one list of ids a text, with the special tokens ``hf`` adds by itself, unpadded.

        Args:
            texts: the texts.
            max_length: longest row kept, special tokens included; ``None`` keeps everything.

        Raises:
            TokenizerError: the vocabulary has no id for some of the text, not even an unknown token.
        """
        if max_length is not None and max_length < 1:
            return [[] for _ in texts]
        return self._encode(texts, truncation=max_length is not None, max_length=max_length)

    def plain(self, text: str) -> list[int]:
        """Returns the ids of a text alone, without the special tokens that ``hf`` adds by itself."""
        return self.plain_rows([text])[0]

    def plain_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the same for several texts, one list of ids each."""
        return self._encode(texts, add_special_tokens=False)

    def _encode(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        try:
            encoded = self.hf(list(texts), padding=False, verbose=False, **options)
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"The tokenizer cannot encode {list(texts)!r}: {error}. "
                f"Use text that its vocabulary of {self.d_vocab} ids can spell."
            ) from error
        return [[int(token) for token in row] for row in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ``ids``, special tokens included, spaces untouched."""
        return self.hf.decode(list(ids), clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns one string for each of ``ids``, each decoded on its own."""
        if not len(ids):
            return []
        return self.hf.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)

    def ready(self) -> "Tokenizer":
        """Returns the tokenizer itself; one that could not be loaded raises an error instead."""
        return self

    @functools.cached_property
    def added_around(self) -> tuple[int, int] | None:
        """Numbers of special tokens that ``hf`` itself adds before and after a text; ``None`` if no text shows them."""
        for bare, full in _probes(self.hf):
            extra, special = len(full) - len(bare), {self.bos_token_id, self.eos_token_id, self.pad_token_id}
            places = [n for n in range(extra + 1) if full[n : n + len(bare)] == bare]
            if bare and not special & set(bare) and len(places) == 1:
                return places[0], extra - places[0]
        return None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UnreadableTokenizer(Tokenizer):
    """Stand-in for a tokenizer that could not be loaded: its model runs on token ids, and text raises the reason."""

    reason: str

    @classmethod
    def because(cls, reason: str) -> "UnreadableTokenizer":
        """Makes a stand-in; ``reason`` says what failed and what to do."""
        return cls(
            hf=None, prepends_bos=False, bos_token_id=None, eos_token_id=None, pad_token_id=None, padding_side="right",
            d_vocab=0, reason=reason,
        )  # fmt: skip

    def ready(self) -> Never:
        raise TokenizerError(
            f"This model's tokenizer could not be loaded, so it takes token ids only. {self.reason} A tokenizer of "
            "your own is attached by model = model.set_tokenizer(hf_tokenizer)."
        )

    def _encode(self, texts: Sequence[str], **options: Any) -> Never:
        self.ready()

    def decode(self, ids: Sequence[int]) -> Never:
        self.ready()

    def pieces(self, ids: Sequence[int]) -> Never:
        self.ready()


def need_tokenizer(tokenizer: Tokenizer | None, what: str | None = None, otherwise: str = "") -> Tokenizer:
    """Returns a model's tokenizer, ready to use; if it has none, raises a TokenizerError that says what needs one."""
    if tokenizer is None:
        lack = "This model has no tokenizer" if what is None else f"{what} needs a tokenizer, and this model has none"
        raise TokenizerError(f"{lack}. Attach one: model = model.set_tokenizer(hugging_face_tokenizer){otherwise}.")
    return tokenizer.ready()


def check_padding_side(padding_side: str | None) -> None:
    """Raises ``InputError`` unless ``padding_side`` is ``"left"``, ``"right"`` or ``None``."""
    if padding_side not in ("left", "right", None):
        raise InputError(f"padding_side must be 'left', 'right' or None (the tokenizer's own), got {padding_side!r}.")


def wrap_tokenizer(
    hf_tokenizer: Any, default_padding_side: PaddingSide | None = None, *, add_bos: bool = True
) -> Tokenizer:
    """Wraps a copy of a Hugging Face tokenizer, with special tokens chosen as in TransformerLens 3.9.

    A tokenizer that knows a BOS token is told to add it by itself, a missing EOS becomes
    ``<|endoftext|>``, a missing PAD becomes EOS, a missing BOS becomes EOS. A token that is not in the
    vocabulary stays missing, and whatever needs it raises.

    Args:
        hf_tokenizer: a ``PreTrainedTokenizerFast`` or anything with its call signature and methods, or a
            :class:`Tokenizer`.
        default_padding_side: where to pad; ``None`` takes the tokenizer's own side.
        add_bos: whether to make the tokenizer add its BOS, as TransformerLens does for every
            architecture but OLMo's. :func:`~tljax.text.tokens.to_tokens` gives the same ids either way,
            but for one token when it truncates without BOS.

    Returns:
        The wrapped copy.

    Raises:
        TokenizerError: ``hf_tokenizer`` lacks a method that tokenization needs, or its vocabulary is empty or damaged.
        InputError: ``default_padding_side`` is neither ``"left"`` nor ``"right"``.

    >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Backend(models.WordLevel({"<|endoftext|>": 0, "John": 1, "met": 2}))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> wrap_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    Tokenizer(prepends_bos=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
              padding_side='right', d_vocab=3, unk_token_id=None)
    """
    check_padding_side(default_padding_side)
    if isinstance(hf_tokenizer, Tokenizer):
        return _with_padding_side(hf_tokenizer, default_padding_side)
    _check_api(hf_tokenizer)
    vocab = hf_tokenizer.get_vocab()
    if not vocab:
        raise TokenizerError(f"This {type(hf_tokenizer).__name__} has no tokens: its vocabulary was not read.")
    check_ids(vocab.values(), len(vocab), f"This {type(hf_tokenizer).__name__}")
    hf, told = _copy_that_adds_bos(hf_tokenizer) if add_bos else (copy.deepcopy(hf_tokenizer), False)
    if hf.eos_token is None and FALLBACK_EOS in vocab:
        hf.eos_token = FALLBACK_EOS
    if hf.pad_token is None and hf.eos_token is not None:
        hf.pad_token = hf.eos_token
    if hf.bos_token is None and hf.eos_token is not None:
        hf.bos_token = hf.eos_token
    hf.padding_side = default_padding_side or getattr(hf, "padding_side", None) or "right"
    bos, eos = vocab.get(hf.bos_token), vocab.get(hf.eos_token)
    return Tokenizer(
        hf=hf,
        prepends_bos=_prepends(hf, bos, eos),
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=vocab.get(hf.pad_token),
        unk_token_id=vocab.get(getattr(hf, "unk_token", None)),
        padding_side=hf.padding_side,
        d_vocab=max(vocab.values()) + 1,
        told_to_add_bos=told,
    )


def _with_padding_side(tokenizer: Tokenizer, padding_side: PaddingSide | None) -> Tokenizer:
    if padding_side is None or padding_side == tokenizer.padding_side:
        return tokenizer
    if isinstance(tokenizer, UnreadableTokenizer):
        return tokenizer
    hf = copy.deepcopy(tokenizer.hf)
    hf.padding_side = padding_side
    return dataclasses.replace(tokenizer, hf=hf, padding_side=padding_side)


def _check_api(hf_tokenizer: Any) -> None:
    missing = [name for name in REQUIRED_API if not hasattr(hf_tokenizer, name)]
    if not callable(hf_tokenizer):
        missing.insert(0, "__call__")
    if missing:
        raise TokenizerError(
            f"Expected a Hugging Face tokenizer, got {type(hf_tokenizer).__name__} "
            f"without {', '.join(missing)}. Load one with load_tokenizer(name_or_directory), or wrap a "
            "tokenizers.Tokenizer as PreTrainedTokenizerFast(tokenizer_object=..., bos_token=...)."
        )


def check_ids(ids: Iterable[Any], count: int, origin: str) -> None:
    """Refuses a vocabulary with an id far above its size: libraries loop over all the numbers below it.

    Raises:
        TokenizerError: there is such an id.
    """
    largest = max((one for one in ids if isinstance(one, int)), default=-1)
    if largest > max(_LARGEST_VOCABULARY, 100 * count):
        raise TokenizerError(
            f"{origin} has a token of id {largest} in a vocabulary of {count}: the file is damaged. Fetch it again."
        )


def _copy_that_adds_bos(hf_tokenizer: Any) -> tuple[Any, bool]:
    """Returns a copy that puts BOS in front of texts, if it can, and whether the original did not."""
    hf = copy.deepcopy(hf_tokenizer)
    if hf.bos_token is None or getattr(hf, "add_bos_token", False):
        return hf, False
    added_before = _prepends(hf, hf.bos_token_id, getattr(hf, "eos_token_id", None))
    try:
        if isinstance(getattr(type(hf), "add_bos_token", None), property):
            hf.add_bos_token = True
        elif getattr(hf, "backend_tokenizer", None) is not None:  # transformers 4: most classes lack the switch
            hf.backend_tokenizer.post_processor = _bos_template(hf.bos_token, hf.bos_token_id)
    except ValueError:  # the template language of post-processors cannot spell a token with a colon in it
        return copy.deepcopy(hf_tokenizer), False
    return hf, not added_before


def _bos_template(bos_token: str, bos_token_id: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{bos_token}:0 $A:0",
        pair=f"{bos_token}:0 $A:0 {bos_token}:1 $B:1",
        special_tokens=[(bos_token, bos_token_id)],
    )


def _prepends(hf: Any, bos: int | None, eos: int | None) -> bool:
    """Whether ``hf`` puts ``bos`` in front of a text by itself."""
    if bos is None or list(hf("")["input_ids"])[:1] != [bos]:
        return False
    if bos != eos:
        return True
    for bare, full in _probes(hf):  # one id for both: see at which end of a text it stands
        if bare and bos not in bare:
            return full[: len(bare) + 1] == [bos, *bare]
    return True


def _probes(hf: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the ids of some texts without and with the special tokens that ``hf`` adds."""
    for probe in itertools.islice(hf.get_vocab(), PROBES):
        try:
            bare, full = (list(hf(probe, add_special_tokens=add)["input_ids"]) for add in (False, True))
        except Exception:  # tokenizers' own way to say that it has no id for some of the text
            continue
        yield bare, full
