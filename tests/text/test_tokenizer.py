"""Wrapping and loading tokenizers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import transformers
from tiny_tokenizers import EOT, TINY, byte_level, gpt2_like, llama_like, qwen_like
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from tljax import DoubledBosWarning
from tljax.errors import TokenizerError
from tljax.text import load_tokenizer, to_single_token, to_str_tokens, to_tokens, wrap_tokenizer

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text())["tokenizers"]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def settled(tokenizer):
    names = ("prepends_bos", "bos_token_id", "eos_token_id", "pad_token_id", "padding_side", "d_vocab")
    return {name: getattr(tokenizer, name) for name in names}


def word_level(words, unk=None, **options):
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unk) if unk else models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.mark.parametrize("name", TINY)
def test_special_tokens_equal_transformerlens(name):
    wrapped = wrap_tokenizer(TINY[name](), add_bos=name != "olmo")
    assert settled(wrapped) == {key: RECORDED[name][key] for key in settled(wrapped)}
    assert wrapped.hf.padding_side == wrapped.padding_side


def test_the_callers_tokenizer_is_left_alone():
    theirs = gpt2_like()
    before = (theirs.encode("the cat"), theirs.pad_token, theirs.padding_side)
    wrapped = wrap_tokenizer(theirs, "left")
    to_tokens(wrapped, ["the cat", "the"], n_ctx=10)
    assert (theirs.encode("the cat"), theirs.pad_token, theirs.padding_side) == before
    assert wrapped.hf is not theirs
    assert theirs.backend_tokenizer.padding is None


def test_rewrapping_keeps_habits_and_changes_only_the_side():
    olmo = wrap_tokenizer(gpt2_like(), add_bos=False)
    assert wrap_tokenizer(olmo) is olmo
    assert wrap_tokenizer(olmo, "right") is olmo
    left = wrap_tokenizer(olmo, "left")
    assert settled(left) == settled(olmo) | {"padding_side": "left"}
    assert (left.hf.padding_side, olmo.hf.padding_side) == ("left", "right")


def test_own_padding_side_is_kept_unless_overridden():
    theirs = llama_like()
    theirs.padding_side = "left"
    assert wrap_tokenizer(theirs).padding_side == "left"
    assert wrap_tokenizer(theirs, "right").padding_side == "right"


def test_static_data_of_a_jitted_function():
    first, second = wrap_tokenizer(gpt2_like()), wrap_tokenizer(gpt2_like())
    assert first == first
    assert first != second
    traces = []

    def shift(x, tokenizer):
        traces.append(tokenizer)
        return x + tokenizer.bos_token_id

    jitted = jax.jit(shift, static_argnums=1)
    assert [int(jitted(jnp.int32(0), first)) for _ in range(2)] == [267, 267]
    assert traces == [first]
    with pytest.raises(AttributeError, match="cannot assign"):
        first.padding_side = "left"


def test_a_tokenizer_that_only_appends_eos_does_not_prepend_bos():
    theirs = qwen_like()
    backend = theirs.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", backend.token_to_id("<|im_end|>"))]
    )
    wrapped = wrap_tokenizer(theirs)
    assert not wrapped.prepends_bos
    end = wrapped.eos_token_id
    assert to_tokens(wrapped, "the", prepend_bos=False).tolist() == [[257, end]]
    assert to_tokens(wrapped, "the").tolist() == [[end, 257, end]]


def test_unknown_words_are_not_mistaken_for_bos():
    wrapped = wrap_tokenizer(word_level([EOT, "the"], unk=EOT), add_bos=False)
    assert not wrapped.prepends_bos
    assert to_tokens(wrapped, "what the").tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("prepends", [True, False])
def test_one_id_for_bos_and_eos_at_either_end(prepends):
    theirs = word_level([EOT, "the", "cat"])
    theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A" if prepends else f"$A {EOT}", special_tokens=[(EOT, 0)]
    )
    wrapped = wrap_tokenizer(theirs)
    assert wrapped.prepends_bos is prepends
    assert to_tokens(wrapped, "the cat").tolist() == [[0, 1, 2] if prepends else [0, 1, 2, 0]]
    assert to_tokens(wrapped, "the cat", prepend_bos=False).tolist() == [[1, 2] if prepends else [1, 2, 0]]


def test_words_outside_the_vocabulary():
    without = wrap_tokenizer(word_level(["the", "cat"]))
    with pytest.raises(TokenizerError, match=r"^The tokenizer cannot encode \['the dog'\]: .*vocabulary of 2 ids"):
        to_tokens(without, "the dog", prepend_bos=False)
    known = wrap_tokenizer(word_level(["<unk>", "the"], unk="<unk>", unk_token="<unk>"))
    with pytest.raises(TokenizerError, match=r"^'dog' is not in the vocabulary: it becomes the unknown token '<unk>'"):
        to_single_token(known, "dog")
    assert to_single_token(known, "the") == 1
    assert to_single_token(known, "<unk>") == 0


def test_a_bos_that_a_template_cannot_spell():
    backend = byte_level(("<seed:bos>",))
    backend.add_special_tokens([AddedToken(EOT)])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<seed:bos>", eos_token=EOT)
    wrapped = wrap_tokenizer(theirs)
    assert not wrapped.prepends_bos
    assert to_str_tokens(wrapped, "the cat") == ["<seed:bos>", "the", " cat"]


def test_a_vocabulary_without_special_tokens():
    wrapped = wrap_tokenizer(word_level(["the", "cat"]))
    assert (wrapped.bos_token_id, wrapped.eos_token_id, wrapped.pad_token_id) == (None, None, None)
    assert to_tokens(wrapped, ["the cat", "cat the"], prepend_bos=False).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(TokenizerError, match=r"^prepend_bos is on, but the tokenizer has no BOS token\. Pass prepend"):
        to_tokens(wrapped, "the cat")
    with pytest.raises(TokenizerError, match=r"^Texts of \[1, 2\] tokens need padding, but the tokenizer has no PAD"):
        to_tokens(wrapped, ["the cat", "cat"], prepend_bos=False)


@pytest.mark.parametrize(("thing", "name"), [("gpt2", "str"), (byte_level(()), "Tokenizer"), (None, "NoneType")])
def test_what_is_not_a_tokenizer_is_refused(thing, name):
    with pytest.raises(TokenizerError, match=rf"^Expected a Hugging Face tokenizer, got {name} without "):
        wrap_tokenizer(thing)


# Loading


def test_directory_with_everything(tmp_path):
    llama_like().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert settled(loaded) == settled(wrap_tokenizer(llama_like()))
    assert load_tokenizer(str(tmp_path), default_padding_side="left").padding_side == "left"


@pytest.mark.parametrize("add_bos", [True, False])
def test_directory_with_vocab_and_merges_only(tmp_path, add_bos):
    theirs = gpt2_like()
    theirs.backend_tokenizer.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text()) | {EOT: 267}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    loaded, wrapped = load_tokenizer(tmp_path, add_bos=add_bos), wrap_tokenizer(theirs, add_bos=add_bos)
    assert settled(loaded) == settled(wrapped)
    texts = ["The cat sat 日本", EOT + "the cat", ""]
    with pytest.warns(DoubledBosWarning):
        assert to_tokens(loaded, texts).tolist() == to_tokens(wrapped, texts).tolist()
    assert to_str_tokens(loaded, texts) == to_str_tokens(wrapped, texts)


def test_directory_with_tokenizer_json_only(tmp_path):
    (tmp_path / "tokenizer.json").write_text(llama_like().backend_tokenizer.to_str())
    loaded = load_tokenizer(tmp_path)
    assert settled(loaded) == settled(wrap_tokenizer(llama_like()))


def test_special_tokens_come_from_config_json_then_from_the_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level(("<|first|>", "<|second|>", "<s>")).to_str())
    assert load_tokenizer(tmp_path).bos_token_id == 269
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 267, "eos_token_id": [268, 267]}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (267, 268)
    assert to_str_tokens(loaded, "the") == ["<|first|>", "the"]
    backend = byte_level(("<|first|>", "<|second|>", "<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<|second|> $A", special_tokens=[("<|second|>", 268)])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "config.json").write_text("{}")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.prepends_bos, loaded.bos_token_id) == (True, 268)


def test_directory_without_a_tokenizer(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        TokenizerError, match=r"expected tokenizer.json, or vocab.json with merges.txt, found model.saf"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match=r"^The tokenizer files in '.*' cannot be read: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("path", ["./no/such/directory", Path("no/such/directory")])
def test_missing_directory_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(TokenizerError, match=r"^No directory '.*no/such/directory'\. Give a directory, or a hub id"):
        load_tokenizer(path)


def test_hub_id_with_revision_and_token(monkeypatch):
    calls = []

    def from_pretrained(name, **options):
        calls.append((name, options))
        if name == "org/missing":
            raise OSError("org/missing is not a local folder and is not a valid model identifier.")
        return gpt2_like()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    assert load_tokenizer("org/name", revision="step7", token="secret").bos_token_id == 267
    assert calls == [("org/name", {"revision": "step7", "token": "secret"})]
    with pytest.raises(TokenizerError, match=r"^Could not load a tokenizer from 'org/missing': .* token= or HF_TOKEN"):
        load_tokenizer("org/missing")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_real_tokenizers():
    gpt2 = load_tokenizer(SHARED / "gpt2-tokenizer")
    assert settled(gpt2) == {
        "prepends_bos": True, "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256,
        "padding_side": "right", "d_vocab": 50257,
    }  # fmt: skip
    assert to_str_tokens(gpt2, "Neel likes cafés") == [EOT, "Ne", "el", " likes", " caf", "és"]
    assert to_tokens(gpt2, ["The Eiffel Tower is in", "Rome"], padding_side="left").tolist() == [
        [50256, 464, 412, 733, 417, 8765, 318, 287],
        [50256, 50256, 50256, 50256, 50256, 50256, 49, 462],
    ]
    stories = load_tokenizer(SHARED / "stories260K")
    assert (stories.prepends_bos, stories.bos_token_id, stories.pad_token_id, stories.d_vocab) == (
        True,
        1,
        2,
        512,
    )
    assert to_tokens(stories, "Hi there").tolist() == [[1, 320, 417, 383]]
