"""``Tokenizer``: a Hugging Face tokenizer with its special tokens settled, and how one is read."""

import copy
import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tljax.errors import InputError, TokenizerError
from tljax.typing import PaddingSide

FALLBACK_EOS = "<|endoftext|>"
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", FALLBACK_EOS)
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", FALLBACK_EOS)
PROBES = 64
REQUIRED_API = ("decode", "batch_decode", "get_vocab", "bos_token", "eos_token", "pad_token")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer whose special tokens and habits are known; made by :func:`wrap_tokenizer`.

    Equal only to itself and hashed by identity, so it can be static data of a jitted function.

    Attributes:
        hf: the Hugging Face tokenizer, a private copy.
        prepends_bos: whether ``hf`` puts BOS in front of every text by itself.
        bos_token_id: id that starts a text; ``None`` if the vocabulary has no such token.
        eos_token_id: id that ends a text, or ``None``.
        pad_token_id: id that fills short rows of a batch, or ``None``.
        padding_side: where short rows are filled unless a call says otherwise.
        d_vocab: the largest token id plus one.
        unk_token_id: id that stands for what the vocabulary cannot spell, or ``None``.
        told_to_add_bos: whether ``hf`` puts BOS there only because :func:`wrap_tokenizer` told it to.
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
        cut = max_length is not None
        try:
            encoded = self.hf(list(texts), padding=False, truncation=cut, max_length=max_length, verbose=False)
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


def check_padding_side(padding_side: str | None) -> None:
    """Raises ``InputError`` unless ``padding_side`` is ``"left"``, ``"right"`` or ``None``."""
    if padding_side not in ("left", "right", None):
        raise InputError(f"padding_side must be 'left', 'right' or None (the tokenizer's own), got {padding_side!r}.")


def wrap_tokenizer(
    hf_tokenizer: Any, default_padding_side: PaddingSide | None = None, *, add_bos: bool = True
) -> Tokenizer:
    """Settles a tokenizer's special tokens as TransformerLens 3.9 does, on a copy.

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
        TokenizerError: ``hf_tokenizer`` lacks a method that tokenization needs.
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
    hf, told = _copy_that_adds_bos(hf_tokenizer) if add_bos else (copy.deepcopy(hf_tokenizer), False)
    vocab = hf.get_vocab()
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


def _copy_that_adds_bos(hf_tokenizer: Any) -> tuple[Any, bool]:
    """A copy that puts BOS in front of texts, if it can, and whether it did not before."""
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
    for probe in itertools.islice(hf.get_vocab(), PROBES):  # one id for both: see at which end of a text it stands
        try:
            bare, full = (list(hf(probe, add_special_tokens=add)["input_ids"]) for add in (False, True))
        except Exception:  # tokenizers' own way to say that it has no id for some of the text
            continue
        if bare and bos not in bare:
            return full[: len(bare) + 1] == [bos, *bare]
    return True


def load_tokenizer(
    path_or_name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    *,
    default_padding_side: PaddingSide | None = None,
    add_bos: bool = True,
) -> Tokenizer:
    """Reads a tokenizer from a directory (no network) or from the hub.

    A directory needs one of: ``tokenizer_config.json`` with the files it speaks of, ``tokenizer.json``, or
    ``vocab.json`` with ``merges.txt`` (read as GPT-2's byte-level BPE). Where no
    ``tokenizer_config.json`` names the special tokens, they come from the ids in ``config.json``, then from
    what the tokenizer itself puts in front of a text, then from the usual names (``<s>``,
    ``<|endoftext|>``, ...).

    Args:
        path_or_name: a directory, or a hub id.
        revision: branch, tag or commit on the hub.
        token: access token for the hub; ``None`` lets huggingface_hub find its own.
        default_padding_side, add_bos: as in :func:`wrap_tokenizer`.

    Raises:
        TokenizerError: nothing to read there, or what is there cannot be read.
    """
    directory = Path(path_or_name).expanduser()
    if not directory.is_dir():
        if isinstance(path_or_name, Path) or path_or_name.startswith(("/", ".", "~")):
            raise TokenizerError(f"No directory {str(path_or_name)!r}. Give a directory, or a hub id like 'org/name'.")
        hf = _from_auto(path_or_name, revision=revision, token=token)
    elif (directory / "tokenizer_config.json").is_file():
        hf = _from_auto(str(directory), local_files_only=True)
    else:
        hf = _from_bare_files(directory)
    return wrap_tokenizer(hf, default_padding_side, add_bos=add_bos)


def _transformers() -> Any:
    """Imports transformers without its advice to install PyTorch, which tokenizers do not need."""
    silent = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(silent)
    os.environ[silent] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[silent]
        else:
            os.environ[silent] = before
    return transformers


def _from_auto(path_or_name: str, **options: Any) -> Any:
    AutoTokenizer = _transformers().AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path_or_name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise TokenizerError(
            f"Could not load a tokenizer from {path_or_name!r}: {error} Give a directory that holds "
            "tokenizer.json, or a hub id; a private or gated one needs token= or HF_TOKEN."
        ) from error


def _from_bare_files(directory: Path) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    PreTrainedTokenizerFast = _transformers().PreTrainedTokenizerFast

    whole, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
        if any(directory.glob("*.model")):
            return _from_auto(str(directory), local_files_only=True)
        found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise TokenizerError(
            f"No tokenizer in {str(directory)!r}: expected tokenizer.json, or vocab.json with merges.txt, "
            f"found {found}. Save one there with hf_tokenizer.save_pretrained(directory)."
        )
    try:
        if whole.is_file():
            backend = Backend.from_file(str(whole))
        else:
            backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"The tokenizer files in {str(directory)!r} cannot be read: {error}") from error
    specials = _guess_special_tokens(backend, directory / "config.json")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def _guess_special_tokens(backend: Any, model_config: Path) -> dict[str, str]:
    declared = json.loads(model_config.read_text()) if model_config.is_file() else {}
    bare, full = (backend.encode("a", add_special_tokens=add).tokens for add in (False, True))
    added_first = full[0] if len(full) > len(bare) and full[1 : 1 + len(bare)] == bare else None
    guesses = {
        "bos_token": _declared_token(backend, declared, "bos_token_id") or added_first or _known(backend, BOS_NAMES),
        "eos_token": _declared_token(backend, declared, "eos_token_id") or _known(backend, EOS_NAMES),
    }
    return {role: token for role, token in guesses.items() if token is not None}


def _declared_token(backend: Any, config: dict[str, Any], field: str) -> str | None:
    token_id = config.get(field)
    token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
    return backend.id_to_token(token_id) if isinstance(token_id, int) else None


def _known(backend: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)
