"""Tokenizers in files of every kind: read, or the reason when text is asked for; the model loads all the same."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_tokenizers import EOT, gpt2_like, llama_like
from tokenizers import Tokenizer, models

from tljax import HookedTransformer
from tljax.checkpoints.files.hub import MODELS
from tljax.errors import TokenizerError
from tljax.text import load_tokenizer
from tljax.text import tokenizer_files as files

WORD_PIECES = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]) + "\n"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A directory of tokenizer files: contents by name."""

    def write(contents: dict[str, Any]) -> Path:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        for name, content in contents.items():
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return directory

    return write


def checkpoint(make: Make, contents: dict[str, Any]) -> Path:
    """A model with these tokenizer files."""
    directory = make(contents)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODELS / "tljax-tiny" / name, directory)
    return directory


def test_kinds_that_transformers_reads(make: Make) -> None:
    bert = load_tokenizer(make({"vocab.txt": WORD_PIECES, "config.json": {"tokenizer_class": "BertTokenizer"}}))
    assert bert.plain("the cats") == [5, 6, 7]
    bytes_alone = load_tokenizer(make({"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}}))
    assert bytes_alone.plain("ab") == [100, 101]
    assert bytes_alone.decode([100, 101]) == "ab"


def test_names_of_the_first_release(make: Make) -> None:
    theirs = gpt2_like().backend_tokenizer
    directory = make({})
    theirs.model.save(str(directory))
    (directory / "vocab.json").rename(directory / "encoder.json")
    (directory / "merges.txt").rename(directory / "vocab.bpe")
    assert load_tokenizer(directory).plain("The cat sat 日本") == theirs.encode("The cat sat 日本").ids


def test_a_vocabulary_of_words_ends_is_not_read_as_bytes(make: Make) -> None:
    vocabulary = {piece: n for n, piece in enumerate(["<unk>", "t", "h", "e</w>", "h", "the</w>", "th"])}
    directory = make({"vocab.json": vocabulary, "merges.txt": "#version: 0.2\nt h\nth e</w>\n", "config.json": {
        "model_type": "openai-gpt"}})  # fmt: skip
    assert load_tokenizer(directory).plain("the") == [5]


def test_the_pad_that_the_file_names(make: Make) -> None:
    backend = llama_like().backend_tokenizer
    assert load_tokenizer(make({"tokenizer.json": backend.to_str()})).pad_token_id == 3
    backend.enable_padding(pad_id=0, pad_token="<unk>")
    assert load_tokenizer(make({"tokenizer.json": backend.to_str()})).pad_token_id == 0
    backend.no_padding()
    declared = {"tokenizer.json": backend.to_str(), "config.json": {"pad_token_id": 2}}
    assert load_tokenizer(make(declared)).pad_token_id == 2


UNREADABLE = {
    "sentencepiece": ({"spiece.model": b"\x01"}, r"holds config.json, model.safetensors, spiece.model"),
    "a class that is not named": ({"vocab.txt": WORD_PIECES}, r"tokenizer_class in tokenizer_config.json"),
    "a class without its files": ({"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "no vocabulary"),
    "an unknown class": ({"tokenizer_config.json": {"tokenizer_class": "NoSuchTokenizer"}}, "NoSuchTokenizer"),
    "tekken": ({"tekken.json": {}}, r"from_pretrained\(\.\.\., tokenizer=hf_tokenizer\)"),
    "half a file": ({"tokenizer.json": '{"version": "1.0"'}, r"cannot be read: tokenizer.json"),
    "another shape": ({"tokenizer.json": [1, 2]}, r"cannot be read"),
    "deep nesting": ({"tokenizer.json": "[" * 10**5}, r"cannot be read: tokenizer.json"),
    "no vocabulary": ({"tokenizer.json": Tokenizer(models.BPE()).to_str()}, r"has no tokens"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_model_whose_tokenizer_cannot_be_read(kind: str, make: Make) -> None:
    contents, message = UNREADABLE[kind]
    model = HookedTransformer.from_pretrained(checkpoint(make, contents))
    assert model.tokenizer is None
    for ask in (model, model.to_tokens, model.to_single_token, model.generate, model.tokens_report, model.to_batch):
        with pytest.raises(TokenizerError, match=rf"(?s)tokenizer could not be loaded.*{message}"):
            ask("the")
    with pytest.raises(TokenizerError, match="could not be loaded"):
        model.to_string([1, 2])
    with pytest.raises(TokenizerError, match="could not be loaded"):
        model.generate([[1, 2]], 2, stop_strings=".", stop_at_eos=False)
    assert model.set_tokenizer(gpt2_like()).to_tokens("the").tolist() == [[267, 257]]


def test_such_a_model_runs_on_ids(make: Make) -> None:
    from tljax import patching

    model = HookedTransformer.from_pretrained(checkpoint(make, UNREADABLE["tekken"][0]), default_padding_side="left")
    ids = [[1, 2, 3]]
    assert model.add_hook("hook_embed", lambda x, hook: x)(ids).shape == (1, 3, 969)
    assert model.generate(ids, 2, stop_at_eos=False, verbose=False).shape == (1, 5)
    result = patching.sweep(model, ids, [[1, 4, 3]], patching.Logit(5), "resid_pre", axes=("pos",))
    assert result.values.shape == (4, 3)


def test_an_id_far_beyond_the_vocabulary_is_refused_at_once(make: Make) -> None:
    whole = json.loads(gpt2_like().backend_tokenizer.to_str())
    whole["model"]["vocab"]["zz"] = 2**31
    start = time.monotonic()
    for contents in (
        {"tokenizer.json": whole},
        {"tokenizer.json": whole, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        {"vocab.json": {"a": 0, "b": 2**31}, "merges.txt": "#version: 0.2\n"},
        {"tokenizer.json": {"added_tokens": [{"id": 2**31, "content": "<x>"}], "model": {"vocab": {"a": 0}}}},
    ):
        with pytest.raises(TokenizerError, match=r"id 2147483648 in a vocabulary of .* damaged"):
            load_tokenizer(make(contents))
    assert time.monotonic() - start < 5


def test_what_tokenizer_files_are_called() -> None:
    names = ["vocab.txt", "spiece.model", "sentencepiece.bpe.model", "encoder.json", "vocab.bpe", "tekken.json"]
    assert all(any(Path(name).match(pattern) for pattern in files.TOKENIZER_FILES) for name in names)


def test_a_tokenizer_that_fails_at_its_first_text(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise IndexError("list index out of range")

    gpt2 = gpt2_like()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: gpt2)
    monkeypatch.setattr(type(gpt2), "get_vocab", fail)
    directory = make({"tokenizer_config.json": {}, "tokenizer.json": "{}"})
    with pytest.raises(TokenizerError, match=r"does not work: IndexError: list index out of range"):
        load_tokenizer(directory)
    assert EOT  # nothing else is asked of it
