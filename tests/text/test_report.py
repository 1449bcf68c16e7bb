"""Who added which token: reports, doubled BOS, chat templates, tokenizers that append EOS."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import EOT, TINY, llama_like, qwen_like
from tokenizers import processors
from variants import build

from tljax import DoubledBosWarning, HookedTransformer
from tljax.errors import InputError, TokenizerError
from tljax.text import load_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}the{% endif %}"
)
GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2-tokenizer"
USER = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "the"}


def text_model(tokenizer: Any) -> HookedTransformer:
    like = build("gpt2", d_vocab=300, n_ctx=32)
    return HookedTransformer(like.cfg, TINY[tokenizer]() if isinstance(tokenizer, str) else tokenizer, like.params)


def chat_tokenizer() -> Any:
    tokenizer = llama_like()
    tokenizer.chat_template = CHAT
    return tokenizer


def appends_eos(tokenizer: Any, template: str) -> Any:
    backend = tokenizer.backend_tokenizer
    names = [piece for piece in template.split() if piece != "$A"]
    specials = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


# reports


def test_a_report_reads_well() -> None:
    report = text_model("gpt2").tokens_report(["the cat", "the"], padding_side="left")
    assert repr(report).splitlines() == [
        f"BOS '{EOT}' (id 267): added by tljax, because cfg.default_prepend_bos is on; the tokenizer adds none by "
        "itself.",
        "Padding: on the left, to 3 tokens; masked, so never seen.",
        "Prompt 0: 3 tokens",
        f"     0  267  '{EOT}'  <- BOS, added by tljax",
        "     1  257  'the'",
        "     2  261  ' cat'",
        "Prompt 1: 2 tokens, 1 of padding on the left",
        f"     0  267  '{EOT}'  <- BOS, added by tljax",
        "     1  257  'the'",
    ]


@pytest.mark.parametrize(("name", "source"), [("gpt2", "tljax"), ("llama", "tokenizer"), ("llama3", "tokenizer")])
def test_who_added_bos(name: str, source: str) -> None:
    model = text_model(name)
    bos = model._tokenizer.bos_token_id  # type: ignore[union-attr]
    (prompt,) = model.tokens_report("the cat").prompts
    assert (prompt.bos, prompt.eos, prompt.doubled_bos, prompt.padding) == (source, None, False, 0)
    assert prompt.ids == tuple(model.to_tokens("the cat")[0].tolist())
    assert "".join(prompt.strings[1:]).replace(" ", "") == "thecat"
    without = model.tokens_report("the cat", prepend_bos=False)
    assert without.prompts[0].bos is None
    assert without.summary[0].startswith("BOS: not added, because prepend_bos is off")
    assert ("taken out" in without.summary[0]) == (source == "tokenizer")
    assert bos not in without.prompts[0].ids


def test_bos_in_the_text_and_in_ids() -> None:
    model = text_model("llama")
    (prompt,) = model.tokens_report("<s>the</s>", prepend_bos=False).prompts
    assert (prompt.bos, prompt.eos, prompt.doubled_bos) == ("text", "text", False)
    (prompt,) = model.tokens_report("<s>the").prompts
    assert (prompt.bos, prompt.doubled_bos) == ("tokenizer", True)
    assert prompt.notes[:2] == ("BOS, added by the tokenizer", "BOS, spelled in the text")
    report = model.tokens_report([[1, 274], [274, 299, 2]])
    assert [(prompt.bos, prompt.eos, prompt.padding) for prompt in report.prompts] == [
        ("ids", None, 1),
        (None, "ids", 0),
    ]
    assert report.summary[0] == "The prompts are token ids: nothing was added."
    assert report.prompts[1].strings[1] == ""
    assert model.tokens_report(model.to_batch([[1, 274], [274]])).prompts[1].ids == (274,)


@pytest.mark.filterwarnings("ignore::tljax.DoubledBosWarning")
@pytest.mark.parametrize("name", TINY)
def test_texts_of_special_tokens_alone(name: str) -> None:
    model = text_model(name)
    bos, added = model.tokenizer.bos_token, "tokenizer" if name.startswith("llama") else "tljax"
    for text, spelled in ((bos, 1), (bos * 2, 2), (bos + "the", 1), ("", 0)):
        report = model.tokens_report(text)
        (prompt,) = report.prompts
        assert prompt.ids == tuple(model.to_tokens(text)[0].tolist())
        assert (prompt.bos, prompt.doubled_bos) == (added, spelled > 0)
        assert prompt.notes[0] == f"BOS, added by {'the tokenizer' if added == 'tokenizer' else 'tljax'}"
        assert sum(note.endswith("spelled in the text") for note in prompt.notes) == spelled
        assert any("BOS stands twice" in sentence for sentence in report.summary) == (spelled > 0)
    (prompt,) = model.tokens_report(bos, prepend_bos=False).prompts
    assert (prompt.bos, prompt.doubled_bos, prompt.notes) == ("text", False, ("BOS, spelled in the text",))


@pytest.mark.skipif(not GPT2.is_dir(), reason="the shared data is not here")
def test_the_end_of_text_of_gpt2() -> None:
    like = build("gpt2", d_vocab=50257, n_ctx=32)
    report = HookedTransformer(like.cfg, load_tokenizer(GPT2), like.params).tokens_report(EOT)
    assert report.prompts[0].notes == ("BOS, added by tljax", "BOS, spelled in the text")
    assert report.prompts[0].doubled_bos


def test_what_a_tokenizer_puts_around_special_tokens() -> None:
    bracketed = text_model(appends_eos(qwen_like(), f"{EOT} $A <|im_end|>"))
    (prompt,) = bracketed.tokens_report(EOT, prepend_bos=False).prompts
    assert prompt.notes == ("added by the tokenizer", "", "EOS, added by the tokenizer")
    with_eos = text_model(appends_eos(qwen_like(), "$A <|im_end|>"))
    (prompt,) = with_eos.tokens_report("<|im_end|>").prompts
    assert (prompt.bos, prompt.eos, prompt.doubled_bos) == ("tljax", "tokenizer", True)
    assert prompt.notes == ("BOS, added by tljax", "BOS, spelled in the text", "EOS, added by the tokenizer")
    assert text_model("llama").tokens_report("</s>", prepend_bos=False).prompts[0].eos == "text"


def test_long_reports_are_cut() -> None:
    like = build("gpt2", n_ctx=200, d_vocab=300)
    model = HookedTransformer(like.cfg, TINY["gpt2"](), like.params)
    shown = repr(model.tokens_report([[1] * 100] * 20))
    assert "(36 more tokens)" in shown
    assert shown.endswith("... and 4 more prompts")
    assert len(shown.splitlines()) < 16 * 70


def test_reports_need_a_tokenizer() -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        build("gpt2").tokens_report([1, 2])


# doubled BOS


@pytest.mark.parametrize("run", ["to_tokens", "to_batch", "__call__"])
def test_doubled_bos_warns_once_for_each_tokenizer(run: str) -> None:
    model = text_model("gpt2")
    repr(model.tokens_report(EOT + "the"))
    with pytest.warns(
        DoubledBosWarning, match=r"^Text 1 starts with .* BOS twice\. Leave it out .* prepend_bos=False"
    ) as w:
        getattr(model, run)(["the", EOT + "the"])
    assert w[0].filename == __file__
    getattr(model, run)(["the", EOT + "the"])
    with pytest.warns(DoubledBosWarning, match="^The text starts with"):
        text_model("gpt2").to_tokens(EOT)


def test_bos_once_does_not_warn() -> None:
    for name in TINY:
        model = text_model(name)
        bos = model.tokenizer.bos_token
        model.to_tokens(["the", f"the{bos}the", ""])
        model.to_tokens(f"{bos}the", prepend_bos=False)
        assert model.to_tokens(f"{bos}the", prepend_bos=False)[0, 0] == model._tokenizer.bos_token_id  # type: ignore[union-attr]


# EOS


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>"])
def test_eos_of_a_tokenizer_with_bos_is_dropped_as_in_transformerlens(template: str) -> None:
    model = text_model(appends_eos(llama_like(), template))
    assert model.to_tokens(["the cat", "the"]).tolist() == [[1, 274, 277], [1, 274, 3]]
    assert model.to_tokens("the", prepend_bos=False).tolist() == [[274]]
    assert model.tokens_report("the").prompts[0].eos is None


def test_eos_of_a_tokenizer_without_bos_is_kept_and_reported() -> None:
    model = text_model(appends_eos(qwen_like(), "$A <|im_end|>"))
    assert model.to_tokens("the").tolist() == [[268, 257, 268]]
    report = model.tokens_report("the")
    assert (report.prompts[0].bos, report.prompts[0].eos) == ("tljax", "tokenizer")
    assert report.prompts[0].notes == ("BOS, added by tljax", "", "EOS, added by the tokenizer")
    assert any("add_eos_token = False" in sentence for sentence in report.summary)


# chat templates


def test_messages() -> None:
    model = text_model(chat_tokenizer())
    asked = model.to_tokens([USER])[0].tolist()
    assert asked[0] == 1
    assert asked.count(1) == 1
    assert model.to_string(asked) == "<s> the cat</s> the"
    assert model.to_string(model.to_tokens([USER, ANSWER])[0]) == "<s> the cat</s> the</s>"
    assert model.apply_chat_template([USER], add_generation_prompt=False)[0].tolist() == asked[: asked.index(2) + 1]
    assert model.apply_chat_template([USER], prepend_bos=True)[0].tolist() == asked
    assert model.apply_chat_template([USER], prepend_bos=False)[0].tolist() == asked[1:]
    batch = model.to_batch([[USER], [USER, ANSWER, USER]], padding_side="left")
    assert batch.row(0).tolist() == asked
    assert (np.asarray(model.to_tokens([[USER], [USER, ANSWER, USER]], padding_side="left")) == batch.tokens).all()
    report = model.tokens_report([USER])
    assert report.prompts[0].bos == "template"
    assert report.summary == ("The chat template wrote every special token: none was added besides.",)


def test_messages_that_cannot_be_tokens() -> None:
    model = text_model(chat_tokenizer())
    with pytest.raises(TokenizerError, match="has no chat template"):
        text_model("llama").to_tokens([USER])
    with pytest.raises(TokenizerError, match="refused these messages: no tools here"):
        model.to_tokens([{"role": "tool", "content": ""}])
    with pytest.raises(InputError, match=r"Message 1 is .*; each needs a role and a content"):
        model.to_tokens([USER, {"role": "user"}])
    for wrong in ("the", [], [1]):
        with pytest.raises(InputError, match=r"Expected messages|each needs a role"):
            model.apply_chat_template(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_ctx=32"):
        model.to_tokens([USER] * 20)


def test_no_warning_from_chat_templates() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_model(chat_tokenizer()).to_tokens([USER])
