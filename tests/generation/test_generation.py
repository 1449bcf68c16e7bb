"""Generation: cached equals uncached and full runs, hooks act at absolute positions, and mistakes are named."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

import tljax
from tljax import HookedTransformer
from tljax.errors import HookError, InputError, InterventionError, TokenizerError
from tljax.generation.methods import GenerateOutput

KINDS = ["gpt2", "neox", "llama", "local", "soft_caps", "adjacent", "no_positions", "inverse_scale", "attn_only",
         "qk_norm", "layer_kinds", "unrotated", "multipliers", "sandwich", "latent"]  # fmt: skip
PROMPT = np.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
LEFT_PADDED = np.asarray([[0, 0, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
LEFT_MASK = np.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LAYERS = [f"blocks.{n}.hook_resid_post" for n in range(3)]


def longer(kind: str) -> HookedTransformer:
    """A three-layer model with room for forty tokens."""
    changes: dict[str, Any] = {}
    if kind in ("local", "layer_kinds"):
        changes |= {"attn_types": ("global", "local", "local")}
    if kind in ("layer_kinds", "unrotated"):
        changes |= {"rotary_layers": (True, True, False)}
    return build(kind, n_layers=3, n_ctx=40, **changes)


def greedy(model: HookedTransformer, prompt: Any, n_new: int = 8, **options: Any) -> GenerateOutput:
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "output_logits": True} | options
    return model.generate(prompt, n_new, **options)


def full_logits(model: HookedTransformer, tokens: Any, n_new: int, **options: Any) -> jax.Array:
    """Logits from which each of the last tokens follows, ``[new, batch, d_vocab]``, of one ordinary run."""
    logits = model.run_with_hooks(tokens, **options)
    return jnp.moveaxis(logits[:, -n_new - 1 : -1], 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_of_a_full_run(kind: str) -> None:
    model = longer(kind)
    tokens, logits = greedy(model, PROMPT, 20)
    assert tokens.shape == (2, 25)
    np.testing.assert_array_equal(tokens[:, :5], PROMPT)
    np.testing.assert_allclose(jnp.stack(logits), full_logits(model, tokens, 20), atol=1e-4)
    np.testing.assert_array_equal(jnp.stack(logits).argmax(-1).T, tokens[:, 5:])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "local"])
def test_cached_equals_uncached(kind: str) -> None:
    model = longer(kind)
    cached, uncached = (greedy(model, PROMPT, use_past_kv_cache=use) for use in (True, False))
    np.testing.assert_array_equal(cached.sequences, uncached.sequences)
    np.testing.assert_allclose(jnp.stack(cached.logits), jnp.stack(uncached.logits), atol=1e-4)
    drawn = [model.generate(PROMPT, 8, stop_at_eos=False, seed=3, use_past_kv_cache=use) for use in (True, False)]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "local"])
def test_a_padded_batch_equals_single_prompts(kind: str) -> None:
    model = longer(kind)
    tokens, logits = greedy(model, LEFT_PADDED, attention_mask=LEFT_MASK)
    right, right_logits = greedy(
        model, [[4, 1, 5, 0, 0], [9, 2, 6, 5, 3]], attention_mask=LEFT_MASK[:, ::-1] * [[1], [1]]
    )
    for row, prompt in enumerate(([[4, 1, 5]], [[9, 2, 6, 5, 3]])):
        alone, alone_logits = greedy(model, prompt)
        np.testing.assert_array_equal(tokens[row, 5:], alone[0, len(prompt[0]) :])
        np.testing.assert_array_equal(right[row, 5:], alone[0, len(prompt[0]) :])
        np.testing.assert_allclose(jnp.stack(logits)[:, row], jnp.stack(alone_logits)[:, 0], atol=1e-4)
        np.testing.assert_allclose(jnp.stack(right_logits)[:, row], jnp.stack(alone_logits)[:, 0], atol=1e-4)


def test_sliding_layers_keep_only_their_window() -> None:
    from tljax.generation.key_values import KeyValueCache

    model = longer("local")
    cache = KeyValueCache.init_cache(model.cfg, 2)
    assert [keys.shape[2] for keys in cache.keys] == [
        2 if model.cfg.layer_kind(layer).local else 40 for layer in range(3)
    ]
    assert KeyValueCache.init_cache(longer("llama").cfg).keys[0].shape == (1, 2, 40, 8)


HOOKS = {
    "everywhere": lambda v: tljax.Add(v),
    "prompt": lambda v: tljax.Add(v, pos="prompt"),
    "new": lambda v: tljax.Scale(0.5, pos="new"),
    "number": lambda v: tljax.Add(v, pos=7),
    "numbers": lambda v: tljax.Zero(pos=[2, 6, 8]),
    "slice": lambda v: tljax.Replace(v, pos=slice(3, 9, 2)),
    "chain": lambda v: tljax.Chain(tljax.Add(v, pos="new"), tljax.Zero(pos=1)),
    "rows": lambda v: tljax.Replace(jnp.outer(jnp.arange(2.0), v), pos=[1, 6]),
    "whole text": lambda v: tljax.Add(jnp.outer(jnp.arange(13.0), v)),
    "mask of the prompt": lambda v: tljax.Add(v, pos=np.asarray([True, False, True, False, True])),
    "project": lambda v: tljax.ProjectOut(v, pos="new"),
}


def spelled_out(hook: Any, length: int = 13, prompt: int = 5) -> Any:
    """The same change for an ordinary run over the whole text, as a plain function."""

    def applied(activation: jax.Array, at: Any) -> jax.Array:
        parts = hook.parts if isinstance(hook, tljax.Chain) else (hook,)
        for part in parts:
            spans = [selector.payload for selector in part.at if selector.kind == "span"]
            masks = [selector for selector in part.at if selector.kind == "mask"]
            changed = type(part).stored(
                {name: getattr(part, name) for name in (*part.arrays, *part.settings)} | {"mask": None},
                [selector for selector in part.at if selector.kind not in ("span", "mask")],
            )(activation, at)
            where = np.ones(length, bool)
            if spans:
                where = (np.arange(length) < prompt) == (spans[0] == "prompt")
            if masks:
                where = np.pad(np.asarray(masks[0].payload) != 0, (0, length - prompt))
            activation = jnp.where(where[None, :, None], changed, activation)
        return activation

    return applied


@pytest.mark.parametrize("which", HOOKS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_interventions_act_at_absolute_positions(kind: str, which: str) -> None:
    model = longer(kind)
    hook = HOOKS[which](jnp.linspace(-1, 1, 16, dtype=jnp.float32))
    tokens, logits = greedy(model, PROMPT, 8, fwd_hooks=[(LAYERS[1], hook)])
    hooked = full_logits(model, tokens, 8, fwd_hooks=[(LAYERS[1], spelled_out(hook))])
    np.testing.assert_allclose(jnp.stack(logits), hooked, atol=1e-4)
    assert float(abs(hooked - full_logits(model, tokens, 8)).max()) > 1e-3


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.attn.hook_z", "blocks.2.hook_mlp_out", "ln_final.hook_normalized"]
)
def test_hooks_at_every_kind_of_point(name: str) -> None:
    model = longer("gpt2")
    hook = tljax.Scale(1.5, pos="new")
    tokens, logits = greedy(model.add_hook(name, hook), PROMPT)
    hooked = full_logits(model, tokens, 8, fwd_hooks=[(name, tljax.Scale(1.5, pos=slice(5, None)))])
    np.testing.assert_allclose(jnp.stack(logits), hooked, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "local"])
def test_hooks_on_attention_patterns(kind: str) -> None:
    model = longer(kind)
    hook = tljax.Zero(key_pos=[0, 3], head=1)
    tokens, logits = greedy(model, PROMPT, fwd_hooks=[("blocks.1.attn.hook_pattern", hook)])
    hooked = full_logits(model, tokens, 8, fwd_hooks=[("blocks.1.attn.hook_pattern", hook)])
    np.testing.assert_allclose(jnp.stack(logits), hooked, atol=1e-4)


def test_python_hooks_see_each_step() -> None:
    model, shapes = longer("gpt2"), []

    def steer(activation: jax.Array, hook: Any) -> jax.Array:
        shapes.append(activation.shape)
        assert not isinstance(activation, jax.core.Tracer)
        return activation + 1

    tokens, logits = greedy(model, PROMPT, 4, fwd_hooks=[(LAYERS[0], steer)])
    assert shapes == [(2, 5, 16)] + [(2, 1, 16)] * 3
    compiled = greedy(model, PROMPT, 4, fwd_hooks=[(LAYERS[0], tljax.Add(1.0))])
    np.testing.assert_array_equal(tokens, compiled.sequences)
    np.testing.assert_allclose(jnp.stack(logits), jnp.stack(compiled.logits), atol=1e-5)


def test_texts_in_and_out(tiny: HookedTransformer) -> None:
    prompt = "When John and Mary went to the store, John gave a drink to"
    whole = tiny.generate(prompt, 3, do_sample=False, verbose=False)
    assert whole.startswith(prompt + " Mary")
    several = tiny.generate([prompt, "Mary"], 3, do_sample=False, verbose=False)
    assert several == [whole, tiny.generate("Mary", 3, do_sample=False, verbose=False)]
    tokens = tiny.generate(prompt, 3, do_sample=False, verbose=False, return_type="tokens")
    np.testing.assert_array_equal(tokens[:, :-3], tiny.to_tokens(prompt))
    embeds = tiny.generate(tokens[:, :-3], 3, do_sample=False, verbose=False, return_type="embeds")
    assert embeds.shape == (1, tokens.shape[1], 64)


def test_embeddings_in(tiny: HookedTransformer) -> None:
    tokens = tiny.to_tokens("When John and Mary went to the store, John gave a drink to")
    embeds = tiny.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")[1]["blocks.0.hook_resid_pre"]
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
    new = tiny.generate(embeds, 4, return_type="tokens", **options)
    np.testing.assert_array_equal(new, tiny.generate(tokens, 4, **options)[:, -4:])
    assert tiny.generate(embeds, 4, **options).shape == (1, tokens.shape[1] + 4, 64)


def test_a_text_ends_at_eos(model: HookedTransformer) -> None:
    long = longer("gpt2")
    free = np.asarray(greedy(long, PROMPT).sequences)
    eos = int(free[0, 7])
    ended = np.asarray(long.generate(PROMPT, 8, do_sample=False, eos_token_id=eos, verbose=False))
    for row in range(2):
        stops = np.flatnonzero(free[row, 5:] == eos)
        end = 5 + int(stops[0]) + 1 if len(stops) else free.shape[1]
        end = min(end, ended.shape[1])
        np.testing.assert_array_equal(ended[row, :end], free[row, :end])
        assert (ended[row, end:] == eos).all()
    each = long.generate(
        PROMPT, 8, do_sample=False, eos_token_id=[[int(free[0, 6])], [int(free[1, 5]), eos]], verbose=False
    )
    assert each.shape[1] <= 7


def test_stop_strings(tiny: HookedTransformer) -> None:
    prompt = "When John and Mary went to the store, John gave a drink to"
    free = tiny.generate(prompt, 12, do_sample=False, stop_at_eos=False, verbose=False)
    stopped = tiny.generate(prompt, 12, do_sample=False, stop_strings=[" Mary", "."], verbose=False)
    assert stopped == prompt + " Mary"
    assert free.startswith(stopped)
    assert free != stopped
    both = tiny.generate([prompt, prompt + " Mary"], 12, do_sample=False, stop_strings=".", verbose=False)
    assert both == [prompt + " Mary.", prompt + " Mary."]


def test_what_fills_a_row_after_a_stop_string_is_no_text(tiny: HookedTransformer) -> None:
    prompts = ["When John and Mary went to the store, John gave a drink to", "Mary and"]
    options = {"do_sample": False, "stop_strings": "Mary.", "stop_at_eos": False, "verbose": False}
    texts = tiny.generate(prompts, 12, **options)
    assert texts[0] == prompts[0] + " Mary."
    assert texts[1].startswith("Mary and")
    assert "<|" not in texts[1]
    assert [tiny.generate(prompt, 12, **options) for prompt in prompts] == texts
    tokens = tiny.generate(tiny.to_tokens(prompts[0]), 12, output_logits=True, **options)
    assert tiny.to_string(tokens.sequences[0, 1:]) == texts[0]
    assert len(tokens.logits) == 2
    pieces = list(tiny.generate_stream(prompts, 12, max_tokens_per_yield=5, return_type="str", **options))
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == texts


def test_a_stop_string_may_begin_within_the_prompts_last_character(tiny: HookedTransformer) -> None:
    first, *rest = tiny.to_tokens("日", prepend_bos=False)[0].tolist()
    forced = iter([*rest, *[5] * 10])

    def force(logits: Any, hook: Any) -> Any:
        return jnp.full_like(logits, -1e9).at[:, -1, next(forced)].set(0.0)

    prompt = jnp.asarray([[first]])
    answer = tiny.generate(
        prompt, 8, do_sample=False, stop_at_eos=False, stop_strings="日", verbose=False,
        fwd_hooks=[("unembed.hook_out", force)],
    )  # fmt: skip
    assert answer.tolist() == [[first, *rest]]


def test_draws(tiny: HookedTransformer) -> None:
    tokens = jnp.tile(tiny.to_tokens("When John and"), (4, 1))
    draws = [tiny.generate(tokens, 12, seed=seed, verbose=False) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (np.asarray(draws[0])[:, :12] != np.asarray(draws[2])[:, :12]).any()
    assert len({tuple(row) for row in np.asarray(draws[0]).tolist()}) > 1
    np.testing.assert_array_equal(tiny.generate(tokens, 12, key=jax.random.key(1), verbose=False), draws[2])
    penalised = tiny.generate(tokens, 12, seed=0, freq_penalty=100.0, stop_at_eos=False, verbose=False)
    assert all(len(set(row[-12:])) == 12 for row in np.asarray(penalised).tolist())
    repeated = tiny.generate(tokens, 12, seed=0, repetition_penalty=1e6, top_k=5, top_p=0.9, stop_at_eos=False)
    assert repeated.shape == (4, tokens.shape[1] + 12)


def test_streams(tiny: HookedTransformer) -> None:
    prompt = "When John and Mary went to"
    options = {"seed": 0, "stop_at_eos": False, "verbose": False}
    whole = tiny.generate(prompt, 10, return_type="tokens", **options)
    pieces = list(tiny.generate_stream(prompt, 10, max_tokens_per_yield=4, **options))
    assert [piece.shape[1] - (n == 0) * (whole.shape[1] - 10) for n, piece in enumerate(pieces)] == [4, 4, 2]
    np.testing.assert_array_equal(jnp.concatenate(pieces, axis=1), whole)
    texts = list(tiny.generate_stream(prompt, 10, max_tokens_per_yield=1, return_type="str", **options))
    assert "".join(texts) == tiny.generate(prompt, 10, **options)
    assert len(texts) == 10


def test_the_cache_of_a_generation(tiny: HookedTransformer) -> None:
    hooks = [("blocks.1.hook_resid_post", tljax.Scale(0.9, pos="new"))]
    texts = ["When John and Mary went to the store, John gave a drink to", "Mary and"]
    answers, cache = tiny.generate_with_cache(texts, 6, do_sample=False, fwd_hooks=hooks, verbose=False)
    assert answers == tiny.generate(texts, 6, do_sample=False, fwd_hooks=hooks, verbose=False)
    tokens = tiny.generate(texts[0], 6, do_sample=False, fwd_hooks=hooks, return_type="tokens", verbose=False)
    n_prompt = tiny.to_tokens(texts[0]).shape[1]
    whole = tljax.Scale(0.9, pos=slice(n_prompt, None))
    _, alone = tiny.with_hooks([("blocks.1.hook_resid_post", whole)]).run_with_cache(tokens)
    length = tokens.shape[1]
    np.testing.assert_allclose(cache["resid_post", 3][0, :length], alone["resid_post", 3][0], atol=1e-4)


def test_nothing_is_compiled_for_other_lengths(compilations: Any) -> None:
    model = build("gpt2", n_layers=2, n_ctx=200, d_model=24)

    def run(length: int, n_new: int, value: float, temperature: float = 1.0) -> None:
        prompt = np.random.default_rng(length).integers(0, 13, (1, length))
        hooks = [("blocks.0.hook_resid_post", tljax.Add(value, pos="new"))]
        model.generate(
            prompt, n_new, stop_at_eos=False, temperature=temperature, fwd_hooks=hooks, seed=0, verbose=False
        )

    run(10, 50, 0.5)
    before = compilations.count
    run(10, 80, 0.5)
    run(12, 60, 0.7, temperature=0.3)
    assert compilations.count == before


def test_texts_of_other_lengths_compile_nothing(tiny: HookedTransformer, compilations: Any) -> None:
    tiny.generate("When John and Mary went to the store", 5, seed=0, stop_at_eos=False, verbose=False)
    before = compilations.count
    tiny.generate("When John and Mary went to the store, John", 9, seed=0, stop_at_eos=False, verbose=False)
    assert compilations.count == before


def test_mistakes(model: HookedTransformer, tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"n_ctx=12. Ask for at most 8, or drop the first 2 tokens"):
        model.generate(PROMPT, 10, stop_at_eos=False)
    with pytest.raises(InputError, match="empty prompt needs a BOS"):
        tiny.generate("", 3, prepend_bos=False)
    with pytest.raises(InputError, match="no EOS token"):
        model.generate(PROMPT, 3)
    with pytest.raises(InputError, match="whole number of at least 1"):
        model.generate(PROMPT, 0, stop_at_eos=False)
    with pytest.raises(InputError, match=r"eos_token_id=\[13\]"):
        model.generate(PROMPT, 3, eos_token_id=[13])
    with pytest.raises(InputError, match="3 lists for 2 prompts"):
        model.generate(PROMPT, 3, eos_token_id=[[1], [2], [3]])
    with pytest.raises(InputError, match="mask of prompt 0 has a gap"):
        model.generate(PROMPT, 3, stop_at_eos=False, attention_mask=[[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(InputError, match="Prompt 1 holds only padding"):
        model.generate(PROMPT, 3, stop_at_eos=False, attention_mask=[[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    with pytest.raises(InputError, match="not both"):
        model.generate(PROMPT, 3, stop_at_eos=False, seed=0, key=jax.random.key(0))
    with pytest.raises(InputError, match=r"no option 'top_q'.*top_"):
        list(model.generate_stream(PROMPT, 3, stop_at_eos=False, top_q=3))
    with pytest.raises(InputError, match="return_type='text' is not one of"):
        model.generate(PROMPT, 3, stop_at_eos=False, return_type="text")
    with pytest.raises(TokenizerError, match="needs a tokenizer"):
        model.generate(PROMPT, 3, stop_at_eos=False, return_type="str")
    with pytest.raises(TokenizerError, match="stop_strings= needs a tokenizer"):
        model.generate(PROMPT, 3, stop_at_eos=False, stop_strings="x")
    with pytest.raises(InputError, match=r"outside jax.jit"):
        jax.jit(lambda tokens: model.generate(tokens, 3, stop_at_eos=False))(jnp.asarray(PROMPT))
    with pytest.raises(InputError, match="bidirectional"):
        build("bidirectional").generate(PROMPT, 3, stop_at_eos=False)


def test_mistakes_in_hooks(model: HookedTransformer) -> None:
    def run(hook: Any, name: str = "blocks.0.hook_resid_post") -> None:
        model.generate(PROMPT, 4, stop_at_eos=False, fwd_hooks=[(name, hook)])

    with pytest.raises(InterventionError, match=r"pos=9 .* beyond the text: 5 tokens of prompt and at most 4 new"):
        run(tljax.Zero(pos=9))
    with pytest.raises(InterventionError, match=r"pos=-1 .* still growing. The last token of the prompt is pos=4"):
        run(tljax.Zero(pos=-1))
    with pytest.raises(InterventionError, match="the prompt has 5 tokens"):
        run(tljax.Zero(pos=slice(-2, None)))
    with pytest.raises(InterventionError, match=r"mask for pos= .* has 7 entries; the prompt has 5"):
        run(tljax.Zero(pos=np.ones(7, bool)))
    with pytest.raises(InterventionError, match="fits neither the prompt's 5 positions nor the text's 9"):
        run(tljax.Add(np.ones((7, 16), np.float32)))
    with pytest.raises(InterventionError, match="Pass a reference="):
        run(tljax.Mean(over="pos"))
    with pytest.raises(InterventionError, match='can be "prompt" or "new"'):
        tljax.Zero(pos="answer")
    with pytest.raises(InterventionError, match='can be "prompt" or "new"'):
        tljax.Zero(head="new")
    with pytest.raises(HookError, match="backward hook"):
        model.add_hook("blocks.0.hook_resid_post", lambda g, hook: g, dir="bwd").generate(PROMPT, 3, stop_at_eos=False)
