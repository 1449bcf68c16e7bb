"""Reads tokenizers from the files of a directory or from the hub."""

import json
import os
import textwrap
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tljax.errors import TokenizerError
from tljax.text.tokenizer import (
    BOS_NAMES,
    EOS_NAMES,
    PAD_NAMES,
    Tokenizer,
    UnreadableTokenizer,
    check_ids,
    wrap_tokenizer,
)
from tljax.typing import PaddingSide

_BYTE_LEVEL = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Vocabulary and merges under the names that transformers and OpenAI's release give them."""
VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "encoder.json", "spiece.model",
    "sentencepiece.model", "*.bpe.model", "*.spm", "*.tiktoken", "tekken.json",
)  # fmt: skip
"""Glob patterns of the files that hold a vocabulary."""
TOKENIZER_FILES = (
    *VOCABULARY_FILES, "merges.txt", "vocab.bpe", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""Glob patterns of all files that belong to a tokenizer."""
_WHOLE, _SETTINGS, _MODEL_SETTINGS = "tokenizer.json", "tokenizer_config.json", "config.json"


def load_tokenizer(
    name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    *,
    default_padding_side: PaddingSide | None = None,
    add_bos: bool = True,
) -> Tokenizer:
    """Reads a tokenizer from a directory (no network) or from the hub.

    A directory needs one of: ``tokenizer_config.json`` with the files it speaks of; ``tokenizer.json``; ``vocab.json``
    with ``merges.txt`` (read as GPT-2's byte-level BPE, unless the vocabulary is of another kind); or files that
    transformers' ``AutoTokenizer`` reads for the class that ``config.json`` names. Where no
    ``tokenizer_config.json`` names the special tokens, they come from the ids in ``config.json``, then from
    what the tokenizer itself says and puts in front of a text, then from the usual names (``<s>``,
    ``<|endoftext|>``, ``<pad>`` ...).

    Args:
        name: a directory, or a hub id.
        revision: branch, tag or commit on the hub.
        token: access token for the hub; ``None`` lets huggingface_hub find its own.
        default_padding_side, add_bos: as in :func:`~tljax.text.tokenizer.wrap_tokenizer`.

    Raises:
        TokenizerError: there is no tokenizer, or it cannot be read.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if isinstance(name, Path) or name.startswith(("/", ".", "~")):
            raise TokenizerError(f"No directory {str(name)!r}. Give a directory, or a hub id like 'org/name'.")
        hf = _from_auto(name, revision=revision, token=token)
    else:
        _check_stored_ids(directory)
        hf = _from_files(directory) if (directory / _SETTINGS).is_file() else _from_bare_files(directory)
    try:
        return wrap_tokenizer(hf, default_padding_side, add_bos=add_bos)
    except TokenizerError:
        raise
    except Exception as error:  # a tokenizer that loads may still fail when it is asked for its tokens
        raise TokenizerError(f"The tokenizer of {str(name)!r} does not work: {_said(error)}.") from error


def load_tokenizer_if_possible(directory: Path) -> Tokenizer:
    """Reads a tokenizer; if that fails, returns a stand-in, so that the model still runs on token ids."""
    try:
        return load_tokenizer(directory)
    except TokenizerError as error:
        return UnreadableTokenizer.because(str(error))


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


def _said(error: BaseException) -> str:
    """Returns another library's error as a clause."""
    text = textwrap.shorten(str(error), 300).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _from_auto(name: str, **options: Any) -> Any:
    AutoTokenizer = _transformers().AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # every class raises what it likes
        raise TokenizerError(
            f"Could not load a tokenizer from {name!r}: {_said(error)}. Give a directory that holds "
            "tokenizer.json, or a hub id; a private or gated one needs token= or HF_TOKEN."
        ) from error


def _from_files(directory: Path) -> Any:
    """Loads a tokenizer by transformers, which finds the class in tokenizer_config.json or config.json.

    A class that finds no file of the names it knows silently gives an empty vocabulary: that is refused.
    """
    fix, class_name = _fix(directory), _class_name(directory)
    holds = f"{str(directory)!r}, which holds {_listed(_file_names(directory))}"
    holds += "" if class_name is None else f" and says tokenizer_class={class_name!r}"
    try:
        hf = _transformers().AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # every class raises what it likes
        raise TokenizerError(f"Could not load a tokenizer from {holds}: {_said(error)}. {fix}") from error
    if (directory / _WHOLE).is_file():
        return hf
    added = {str(token) for token in getattr(hf, "added_tokens_decoder", {}).values()}
    if set(hf.get_vocab()) <= added | set(hf.all_special_tokens):
        raise TokenizerError(f"{type(hf).__name__} read no vocabulary from {holds}. {fix}")
    return hf


def _class_name(directory: Path) -> str | None:
    """Returns the tokenizer class that a directory names."""
    named = [_settings(directory / name).get("tokenizer_class") for name in (_SETTINGS, _MODEL_SETTINGS)]
    return next((name for name in named if isinstance(name, str)), None)


def _fix(directory: Path) -> str:
    """Returns advice on how to make a directory's tokenizer loadable."""
    names = _file_names(directory)
    given = "Or pass one that you load yourself: from_pretrained(..., tokenizer=hf_tokenizer)."
    pieces = [name for name in names if name.endswith((".model", ".spm"))]
    if pieces and find_spec("sentencepiece") is None:
        return f"Reading {pieces[0]} needs sentencepiece: pip install sentencepiece protobuf. {given}"
    if "tekken.json" in names and find_spec("mistral_common") is None:
        return f"Reading tekken.json needs mistral-common: pip install mistral-common. {given}"
    if any(name.endswith(".tiktoken") for name in names) and find_spec("tiktoken") is None:
        return f"Reading a .tiktoken file needs tiktoken: pip install tiktoken. {given}"
    return (
        "Save it there again with hf_tokenizer.save_pretrained(directory), or name its class as tokenizer_class in "
        f"tokenizer_config.json. {given}"
    )


def _file_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"The tokenizer files in {str(file.parent)!r} cannot be read: {file.name}: {_said(error)}."
        ) from error


def _check_stored_ids(directory: Path) -> None:
    """Refuses ids far too large before a library loops over all the numbers below them."""
    if (whole := directory / _WHOLE).is_file():
        content = _read_json(whole)
        parts = content if isinstance(content, dict) else {}
        vocab = (parts.get("model") or {}).get("vocab")
        ids = list(vocab.values()) if isinstance(vocab, dict) else []
        added = [entry.get("id") for entry in parts.get("added_tokens") or [] if isinstance(entry, dict)]
        check_ids([*ids, *added], len(vocab or ()), str(whole))
    for name in ("vocab.json", "encoder.json"):
        if (file := directory / name).is_file() and isinstance(vocab := _read_json(file), dict):
            check_ids(vocab.values(), len(vocab), str(file))


def _from_bare_files(directory: Path) -> Any:
    PreTrainedTokenizerFast = _transformers().PreTrainedTokenizerFast

    whole = directory / _WHOLE
    pair = next(([directory / name for name in names] for names in _BYTE_LEVEL if _all_in(directory, names)), None)
    if not whole.is_file() and (pair is None or not _is_byte_level(pair[0])):
        if not has_tokenizer_files(directory):
            raise TokenizerError(
                f"No tokenizer in {str(directory)!r}: expected tokenizer.json, or vocab.json with merges.txt, "
                f"found {_listed(_file_names(directory))}. Save one there with hf_tokenizer.save_pretrained(directory)."
            )
        return _from_files(directory)
    try:
        backend = _backend(whole, pair)
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"The tokenizer files in {str(directory)!r} cannot be read: {_said(error)}.") from error
    specials = _guess_special_tokens(backend, directory / _MODEL_SETTINGS)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def _all_in(directory: Path, names: Iterable[str]) -> bool:
    return all((directory / name).is_file() for name in names)


def _is_byte_level(vocabulary: Path) -> bool:
    """Whether a vocabulary can be GPT-2's kind; GPT-1's and others mark the end of a word with ``</w>``."""
    return not any(piece.endswith("</w>") for piece in _read_json(vocabulary))


def _backend(whole: Path, pair: list[Path] | None) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    if pair is None or whole.is_file():
        return Backend.from_file(str(whole))
    backend = Backend(models.BPE.from_file(*map(str, pair)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def has_tokenizer_files(directory: Path) -> bool:
    """Whether a directory holds a vocabulary, or settings that name a tokenizer's class."""
    if (directory / _SETTINGS).is_file() or any(next(directory.glob(name), None) for name in VOCABULARY_FILES):
        return True
    return _class_name(directory) is not None


def _settings(file: Path) -> dict[str, Any]:
    content = _read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _guess_special_tokens(backend: Any, model_config: Path) -> dict[str, str]:
    declared = _settings(model_config)
    bare, full = (backend.encode("a", add_special_tokens=add).tokens for add in (False, True))
    added_first = full[0] if len(full) > len(bare) and full[1 : 1 + len(bare)] == bare else None
    guesses = {
        "bos_token": _declared_token(backend, declared, "bos_token_id") or added_first or _known(backend, BOS_NAMES),
        "eos_token": _declared_token(backend, declared, "eos_token_id") or _known(backend, EOS_NAMES),
        "pad_token": _own_padding(backend)
        or _declared_token(backend, declared, "pad_token_id")
        or _known(backend, PAD_NAMES),
    }
    return {role: token for role, token in guesses.items() if token is not None}


def _own_padding(backend: Any) -> str | None:
    """Returns the PAD token in a tokenizer's own padding settings."""
    token = (backend.padding or {}).get("pad_token")
    return token if token is not None and backend.token_to_id(token) is not None else None


def _declared_token(backend: Any, config: dict[str, Any], field: str) -> str | None:
    token_id = config.get(field)
    token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
    return backend.id_to_token(token_id) if isinstance(token_id, int) and token_id >= 0 else None


def _known(backend: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)
