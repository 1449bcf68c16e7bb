"""The residual stream and the logits taken apart: parts sum to the whole, under jit and vmap; memory; mistakes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from variants import TOKENS, VARIANTS, build

from tljax import ActivationCache, HookedTransformer
from tljax.errors import CacheError, InputError, TokenizerError, UnknownHookError
from tljax.modules.activations import soft_cap

close = functools.partial(compare.close, atol=3e-5, rtol=2e-4)

Pairs = dict[str, tuple[Any, Any]]
LIKE_OTHERS = (
    "local", "bidirectional", "adjacent", "qk_norm", "layer_kinds", "unrotated", "clipped", "qk_after_rotary",
    "latent_keys", "inverse_scale", "alibi_rounded", "no_positions", "soft_caps",
)  # fmt: skip
"""Variants that write to the stream as another does."""
LAYOUTS: dict[str, Callable[[], HookedTransformer]] = {
    **{kind: (lambda kind=kind: build(kind)) for kind in VARIANTS if kind not in (*LIKE_OTHERS, "residual_norm")},
    "layer_norms_after": lambda: build("gpt2", use_normalization_before_and_after=True, residual_multiplier=0.6),
    "attention_only_norms_after": lambda: build("attn_only", use_normalization_after_only=True),
}


def with_model(function: Callable[[ActivationCache], Any], model: HookedTransformer, cache: ActivationCache) -> Any:
    """A function of the cache as one program, the model and the cache its arguments."""
    return jax.jit(lambda model, cache: function(cache.with_model(model)))(model, cache)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2")


@pytest.fixture(scope="module")
def cache(model: HookedTransformer) -> ActivationCache:
    return model.run_with_cache(TOKENS)[1]


# sums


def wheres(cache: ActivationCache) -> dict[str, tuple[dict[str, Any], Any]]:
    """What ``layer`` and ``mlp_input`` may be, and the stream that enters there."""
    cfg = cache.cfg
    found = {"end": ({"layer": None}, cache["resid_post", -1]), "layer": ({"layer": 1}, cache["resid_pre", 1])}
    if not cfg.attn_only:
        whole = cache["resid_pre" if cfg.parallel_attn_mlp else "resid_mid", 1]
        found["mlp"] = {"layer": 1, "mlp_input": True}, whole
    return found


def taken_apart(cache: ActivationCache) -> dict[str, Any]:
    """Every way to take the stream and the logits apart, once."""
    cfg, W_U, right, wrong = cache.cfg, cache.model.W_U, jnp.asarray(TOKENS), jnp.asarray(TOKENS[::-1])
    expand = {"expand_neurons": cfg.num_experts is None}
    made = {}
    for name, (where, _) in wheres(cache).items():
        made[f"decomposed {name}"] = cache.decompose_resid(**where)
        made[f"full {name}"] = cache.get_full_resid_decomposition(**where, **expand)
    made["not expanded"] = cache.get_full_resid_decomposition(expand_neurons=False)
    made["normed"] = cache.get_full_resid_decomposition(apply_ln=True, **expand)
    options = {"pos_slice": (1, 4), "project_output_onto": W_U[:, :3], **expand}
    for apply_ln in (False, True):
        made[f"projected {apply_ln}"] = cache.get_full_resid_decomposition(**options, apply_ln=apply_ln)
    if cfg.has_norms_before:
        made["inner norm"] = cache.decompose_resid(1, apply_ln=True)
    parts = made["decomposed end"]
    made["logits"] = cache.logit_attrs(parts, right), cache.logit_bias(right)
    made["differences"] = cache.logit_attrs(parts, right, wrong), cache.logit_bias(right, wrong)
    made["last"] = cache.logit_attrs(parts[:, :, -1], right[:, 2], pos_slice=-1), cache.logit_bias(right[:, 2])
    made["lens"] = cache.logit_lens(pos_slice=-1)
    return made


def sums(cache: ActivationCache, made: dict[str, Any]) -> Pairs:
    """Sums of parts, and the wholes that they must be."""
    cfg, pairs, n_heads = cache.cfg, {}, cache.cfg.n_heads
    for name, (_, whole) in wheres(cache).items():
        pairs[f"decomposed {name}"] = made[f"decomposed {name}"].sum(0), whole
        pairs[f"full {name}"] = made[f"full {name}"].sum(0), whole
    full, kept = made["full end"], made["not expanded"]
    attention = cache["attn_out", 0] + cache["attn_out", 1]
    pairs["heads"] = full[: 2 * n_heads].sum(0) + kept[-1], attention
    if cfg.num_experts is None and not cfg.attn_only:
        n_starts = 1 + (cfg.positional_embedding_type == "standard")
        neurons = full[2 * n_heads : -1 - n_starts].sum(0)
        assert len(full) == 2 * n_heads + 2 * (cfg.d_mlp or 0) + n_starts + 1
        pairs["neurons"] = neurons + full[-1] - kept[-1], cache["mlp_out", 0] + cache["mlp_out", 1]
    return pairs


def readings(cache: ActivationCache, made: dict[str, Any]) -> Pairs:
    """Through norms, onto directions, and to logits."""
    cfg, W_U = cache.cfg, np.asarray(cache.model.W_U)
    pairs = {"unembedded": (made["normed"].sum(0), cache["unembed.hook_in"])}
    weight, bias = (cache.model.params.get("ln_final", {}).get(name) for name in "wb")
    if weight is not None:
        gain = np.asarray(1 + weight if cfg.rmsnorm_uses_offset else weight)
        offset = np.zeros_like(gain) if bias is None else np.asarray(bias)
        pairs["unembedded"] = made["normed"].sum(0) * gain + offset, cache["unembed.hook_in"]
    for apply_ln, whole in ((False, made["full end"]), (True, made["normed"])):
        pairs[f"projected {apply_ln}"] = made[f"projected {apply_ln}"], whole[:, :, 1:4] @ W_U[:, :3]
    if cfg.has_norms_before:
        pairs["inner norm"] = made["inner norm"].sum(0), cache["normalized", 1, "ln1"]
    logits = np.asarray(scaled_logits(cache))
    right, wrong = (np.take_along_axis(logits, ids[..., None], -1)[..., 0] for ids in (TOKENS, TOKENS[::-1]))
    last = np.take_along_axis(logits[:, -1], TOKENS[:, 2:3], -1)[:, 0]
    for name, expected in {"logits": right, "differences": right - wrong, "last": last}.items():
        attributions, constant = made[name]
        pairs[name] = attributions.sum(0) + constant, expected
    return pairs


def scaled_logits(cache: ActivationCache) -> jax.Array:
    return cache["unembed.hook_out"] * cache.cfg.logits_multiplier


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_sum_to_the_whole(layout: str) -> None:
    model = LAYOUTS[layout]()
    logits, cache = model.run_with_cache(TOKENS)
    made = jax.tree.map(np.asarray, with_model(taken_apart, model, cache))
    values = ActivationCache({name: np.asarray(value) for name, value in cache.items()}, model)  # type: ignore[misc]
    for name, (got, expected) in (sums(values, made) | readings(values, made)).items():
        scale = max(1, float(np.abs(expected).max()))
        close(got / scale, expected / scale, message=name)
    close(made["lens"][-1], logits[:, -1], message="logit lens")
    close(soft_cap(scaled_logits(cache), model.cfg.output_logits_soft_cap), logits)


def test_labels_and_order(cache: ActivationCache) -> None:
    heads, neurons = [f"L{n}H{h}" for n in (0, 1) for h in range(4)], [f"L{n}N{i}" for n in (0, 1) for i in range(64)]
    starts = ["embed", "pos_embed"]
    outputs = ["0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]

    def labels(method: str, *arguments: Any, **options: Any) -> list[str]:
        stack, names = getattr(cache, method)(*arguments, **options, pos_slice=0, return_labels=True)
        assert len(names) == len(stack)
        return names

    assert labels("decompose_resid") == labels("decompose_resid", mode="full") == starts + outputs
    assert labels("decompose_resid", 1, mlp_input=True, incl_embeds=False) == outputs[:3]
    assert labels("decompose_resid", mode="attn") == starts + outputs[::2]
    assert labels("stack_head_results", 1, incl_remainder=True) == [*heads[:4], "remainder"]
    assert labels("stack_head_results", 0) == []
    assert labels("stack_head_results", 0, incl_remainder=True) == ["remainder"]
    assert labels("stack_neuron_results", 2, neuron_slice=[5, -1]) == ["L0N5", "L0N63", "L1N5", "L1N63"]
    assert labels("stack_neuron_results", 1, neuron_slice=(62, None)) == ["L0N62", "L0N63"]
    assert labels("stack_neuron_results", -1, neuron_slice=3) == ["L0N3", "L1N3"]
    assert labels("get_full_resid_decomposition") == [*heads, *neurons, *starts, "bias"]
    mlps = [*heads, "0_mlp_out", "1_mlp_out", *starts, "bias"]
    assert labels("get_full_resid_decomposition", expand_neurons=False) == mlps
    assert labels("logit_lens", incl_mid=True) == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    parts, names = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    close(parts[names.index("1_mlp_out")], cache["mlp_out", 1])
    close(parts[names.index("pos_embed")], cache["pos_embed"])


def test_parallel_mlps_read_what_attention_reads() -> None:
    _, cache = build("neox").run_with_cache(TOKENS)
    stack, labels = cache.decompose_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out"]
    close(stack.sum(0), cache["resid_pre", 1])


def test_remainders(cache: ActivationCache) -> None:
    neurons = cache.stack_neuron_results(1, neuron_slice=(0, 5), incl_remainder=True)
    close(neurons.sum(0), cache["resid_pre", 1])
    heads = cache.stack_head_results(incl_remainder=True, apply_ln=True, pos_slice=[4, 1])
    close(heads.sum(0), cache["normalized"][:, jnp.array([4, 1])])
    onto = cache.model.W_U[:, 3]
    projected = cache.stack_neuron_results(1, incl_remainder=True, apply_ln=True, project_output_onto=onto)
    close(projected.sum(0), np.asarray(cache["normalized", 1, "ln1"]) @ np.asarray(onto))


# heads and neurons


def test_head_results_make_a_new_cache(model: HookedTransformer, cache: ActivationCache) -> None:
    names = [f"blocks.{layer}.attn.hook_result" for layer in (0, 1)]
    _, recorded = model.run_with_cache(TOKENS, names_filter=names)
    computed = cache.compute_head_results()
    assert not any(name in cache.cache_dict for name in names)
    assert list(computed) == [*cache, *names]
    for name in names:
        close(computed[name], recorded[name])
    assert computed.compute_head_results() is computed
    edited = cache.with_activations({**cache, names[0]: jnp.zeros_like(computed[names[0]])}).compute_head_results()
    assert not edited[names[0]].any()
    close(edited[names[1]], recorded[names[1]])
    close(recorded.stack_head_results(), computed.stack_head_results())
    without_model = jax.tree.map(lambda x: x, recorded)
    close(without_model.stack_head_results(), computed.stack_head_results())


def test_neuron_results(model: HookedTransformer, cache: ActivationCache) -> None:
    acts, weight = np.asarray(cache["post", 1]), np.asarray(model.W_out[1])
    close(cache.get_neuron_results(1), acts[..., None] * weight)
    close(cache.get_neuron_results(-1, neuron_slice=(3, 9, 2), pos_slice=2), (acts[..., None] * weight)[:, 2, 3:9:2])
    close(cache.get_neuron_results(1, neuron_slice=7), acts[..., 7, None] * weight[7])
    onto = np.asarray(model.W_U[:, :2])
    close(cache.get_neuron_results(1, project_output_onto=onto), acts[..., None] * (weight @ onto))
    close(cache.get_neuron_results(1, 7, -1, onto[:, 0]), acts[:, -1, 7] * (weight @ onto[:, 0])[7])
    _, normed = build("residual_norm").run_with_cache(TOKENS)
    close(normed.get_neuron_results(0).sum(2) + build("residual_norm").b_out[:1][None], normed["mlp_out", 0])


def sizes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all that a program makes, in the programs that it calls too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for called in jax.tree.leaves(equation.params):
            if isinstance(called, ClosedJaxpr):
                yield from sizes_in(called.jaxpr)
            elif isinstance(called, Jaxpr):
                yield from sizes_in(called)


def test_sizes_of_called_programs_are_seen() -> None:
    called = jax.jit(lambda x: jax.lax.cond(x.sum() > 0, lambda x: jnp.outer(x, x).sum(0), jnp.zeros_like, x))
    assert (7, 7) in sizes_in(jax.make_jaxpr(called)(jnp.ones(7)).jaxpr)


@pytest.mark.parametrize("kind", ["gpt2", "sandwich"])
def test_projected_neurons_are_never_made_whole(kind: str) -> None:
    model = build(kind)
    cfg = model.cfg
    cache = model.run_with_cache(TOKENS)[1]

    def projected(model: HookedTransformer, cache: ActivationCache) -> Any:
        cache = cache.with_model(model)
        options = {"apply_ln": True, "project_output_onto": jnp.ones(cfg.d_model)}
        return (
            cache.stack_neuron_results(-1, incl_remainder=True, **options),
            cache.get_full_resid_decomposition(**options),
            cache.get_neuron_results(0, project_output_onto=jnp.ones((cfg.d_model, 2))),
        )

    assert cfg.d_mlp
    made = list(sizes_in(jax.make_jaxpr(projected)(model, cache).jaxpr))
    assert (2 * cfg.d_mlp + 1, *TOKENS.shape) in [shape[:3] for shape in made]
    assert not [shape for shape in made if cfg.d_mlp in shape and cfg.d_model in shape]


# transformations


def analyses(cache: ActivationCache) -> Any:
    stack = cache.get_full_resid_decomposition(apply_ln=True, expand_neurons=False)
    return (
        stack,
        cache.stack_neuron_results(1, project_output_onto=cache.model.W_U[:, 2], apply_ln=True, pos_slice=-1),
        cache.logit_attrs(cache.stack_head_results(), 3, 5),
        cache.logit_lens(pos_slice=(1, 3), incl_mid=True),
        cache.accumulated_resid(1, apply_ln=True),
        cache.compute_head_results()["result", 0],
    )


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "sandwich"])
def test_vmap_over_prompts_and_no_batch_axis(kind: str, split: bool) -> None:
    model = build(kind, use_split_qkv_input=split)
    cache = model.run_with_cache(TOKENS)[1]
    expected = with_model(analyses, model, cache)
    mapped = jax.jit(lambda m, c: jax.vmap(lambda one: analyses(one.with_model(m)))(c))(model, cache)
    single = cache.apply_slice_to_batch_dim(1)
    alone = with_model(analyses, model, single)
    for number, (whole, by_prompt, one) in enumerate(zip(expected, mapped, alone, strict=True)):
        axis = 0 if number == len(expected) - 1 else 1  # the last has no axis of components
        close(jnp.moveaxis(by_prompt, 0, axis), whole)
        close(one, jnp.take(whole, 1, axis))


def test_gradients_reach_the_cache(model: HookedTransformer, cache: ActivationCache) -> None:
    def attribution(cache: ActivationCache) -> jax.Array:
        return cache.with_model(model).logit_attrs(cache.with_model(model).stack_head_results(), 3)[2, 0, -1]

    gradient = jax.grad(attribution)(cache)
    assert gradient["z", 0][0, -1, 2].any()
    assert not gradient["z", 0][0, -1, 1].any()
    assert not gradient["z", 1].any()


def test_another_position_or_token_compiles_nothing(cache: ActivationCache, compilations: Any) -> None:
    def once(pos: int, token: int) -> jax.Array:
        return cache.logit_attrs(cache.stack_head_results(pos_slice=pos), token, pos_slice=pos)

    jax.block_until_ready(once(1, 3))
    before = compilations.count
    for pos, token in ((2, 4), (-1, 0)):
        jax.block_until_ready(once(pos, token))
    assert compilations.count == before


def test_padding_and_half_precision() -> None:
    model = build("gpt2").to("bfloat16")
    mask = np.ones_like(TOKENS)
    mask[1, :2] = 0
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    parts = cache.get_full_resid_decomposition(expand_neurons=False)
    assert parts.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        parts.astype(jnp.float32).sum(0), cache["resid_post", 1].astype(jnp.float32), atol=0.15, rtol=0.05
    )
    assert cache.compute_head_results().unpad(1)["result", 0].shape[1] == 4


# batches


def test_batch_slices(cache: ActivationCache) -> None:
    stack = cache.decompose_resid()
    whole = cache.apply_ln_to_stack(stack)
    attrs = cache.logit_attrs(stack, 3)
    for chosen in (0, -1, [1], (0, 1), [1, 0]):
        index = slice(*chosen) if isinstance(chosen, tuple) else chosen
        expected = np.asarray(whole)[:, index]
        close(cache.apply_ln_to_stack(stack, batch_slice=chosen), expected)
        close(cache.logit_attrs(stack, 3, batch_slice=chosen), np.asarray(attrs)[:, index])
        if chosen != [1, 0]:  # cut before: as many prompts as there are would be cut again
            close(cache.apply_ln_to_stack(jnp.asarray(np.asarray(stack)[:, index]), batch_slice=chosen), expected)
    close(cache.apply_ln_to_stack(stack[:, 1], batch_slice=1, has_batch_dim=False), whole[:, 1])
    by_prompt = cache.logit_attrs(stack, [3, 5])
    close(by_prompt[:, 1], cache.logit_attrs(stack, 5)[:, 1])
    cut = cache.logit_attrs(stack[:, :, 4], np.array([3, 5]), pos_slice=4, batch_slice=None)
    close(cut, by_prompt[:, :, 4])


def test_strings_are_tokens(tiny: HookedTransformer) -> None:
    text = tiny.to_string(np.array([20]))
    _, cache = tiny.run_with_cache(np.array([[0, 20, 30], [0, 30, 20]], np.int32))
    stack = cache.decompose_resid()
    other = tiny.to_string(np.array([30]))
    assert isinstance(text, str)
    assert isinstance(other, str)
    close(cache.logit_attrs(stack, text, other), cache.logit_attrs(stack, 20, 30))
    close(cache.logit_attrs(stack, [text, other]), cache.logit_attrs(stack, [20, 30]))


# mistakes

Mistake = tuple[type[Exception], str, Callable[[ActivationCache], Any]]
NO_LAYER = "layer=3 is out of range: the model has 2 layers"
MISTAKES: list[Mistake] = [
    (CacheError, NO_LAYER, lambda c: c.decompose_resid(3)),
    (CacheError, NO_LAYER, lambda c: c.stack_head_results(3)),
    (CacheError, NO_LAYER, lambda c: c.stack_neuron_results(3)),
    (CacheError, NO_LAYER, lambda c: c.get_full_resid_decomposition(3)),
    (CacheError, NO_LAYER, lambda c: c.apply_ln_to_stack(c.decompose_resid(), 3)),
    (CacheError, "layer=1.5 is not a whole number", lambda c: c.decompose_resid(1.5)),
    (CacheError, "layer=2 is out of range: the model has layers 0 to 1", lambda c: c.get_neuron_results(2)),
    (CacheError, "mlp_input=True asks for what the MLP.*end of the model", lambda c: c.decompose_resid(mlp_input=True)),
    (CacheError, "end of the model", lambda c: c.accumulated_resid(mlp_input=True)),
    (CacheError, "mode='heads' is not one of 'all', 'attn', 'mlp'", lambda c: c.decompose_resid(mode="heads")),
    (CacheError, "no parts.*include the embeddings", lambda c: c.decompose_resid(0, incl_embeds=False)),
    (CacheError, "Index 6 is out of range: the cache has 6 positions", lambda c: c.stack_head_results(pos_slice=6)),
    (CacheError, "Index -7 is out of range", lambda c: c.decompose_resid(pos_slice=[0, -7])),
    (CacheError, r"\(4, 2\) keeps nothing: the cache has 6 positions", lambda c: c.decompose_resid(pos_slice=(4, 2))),
    (CacheError, r"\[\] keeps nothing", lambda c: c.decompose_resid(pos_slice=[])),
    (CacheError, "'last' is no slice: give a number", lambda c: c.decompose_resid(pos_slice="last")),
    (CacheError, "1.5 is no slice", lambda c: c.accumulated_resid(pos_slice=1.5)),
    (CacheError, "True is no slice", lambda c: c.accumulated_resid(pos_slice=True)),
    (CacheError, "is no slice", lambda c: c.decompose_resid(pos_slice=[0.5])),
    (CacheError, "is no slice", lambda c: c.decompose_resid(pos_slice=[[0], [1, 2]])),
    (CacheError, "is no slice", lambda c: c.decompose_resid(pos_slice=("a", "b"))),
    (CacheError, "Index 64 is out of range: an MLP has 64 neurons", lambda c: c.get_neuron_results(0, 64)),
    (CacheError, r"shape \(15,\).*give one direction \[d_model=16\]",
     lambda c: c.stack_neuron_results(1, project_output_onto=jnp.ones(15))),
    (CacheError, "dtype int32", lambda c: c.get_neuron_results(1, project_output_onto=jnp.ones(16, jnp.int32))),
    (CacheError, r"shape \(2, 6, 16\).*takes \[component, 2, 6, 16\].*stack\[None\]",
     lambda c: c.logit_attrs(c["resid_post", 1], 3)),
    (CacheError, r"Pass the slices that the stack was made with",
     lambda c: c.logit_attrs(c.decompose_resid(pos_slice=-1), 3)),
    (CacheError, "Index 2 is out of range: the cache has 2 prompts",
     lambda c: c.logit_attrs(c.decompose_resid(), 3, batch_slice=2)),
    (InputError, "tokens holds 13, which is no id of the output vocabulary: ids are 0 to 12",
     lambda c: c.logit_attrs(c.decompose_resid(), 13)),
    (InputError, "incorrect_tokens holds -1", lambda c: c.logit_attrs(c.decompose_resid(), 1, -1)),
    (InputError, "tokens must be a string that is one token, an id", lambda c: c.logit_attrs(c.decompose_resid(), 1.0)),
    (InputError, r"tokens have shape \(\) and incorrect_tokens \(2,\)",
     lambda c: c.logit_attrs(c.decompose_resid(), 1, [1, 2])),
    (InputError, r"Tokens of shape \(3,\) do not fit.*give ids of shape \(\) or \(2,\) or \(2, 6\)",
     lambda c: c.logit_attrs(c.decompose_resid(), [1, 2, 3])),
    (TokenizerError, "tokenizer", lambda c: c.logit_attrs(c.decompose_resid(), " Paris")),
    (CacheError, r"with_model\(model\)", lambda c: jax.tree.map(lambda x: x, c).stack_head_results()),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), MISTAKES)
def test_mistakes(cache: ActivationCache, error: type[Exception], message: str, call: Callable[..., Any]) -> None:
    with pytest.raises(error, match=message):
        call(cache)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (
            "decompose_resid",
            (),
            r"needs 'hook_embed' and 4 more activations.*endswith\(\('hook_attn_out', 'hook_embed',",
        ),
        ("accumulated_resid", (), r"needs 'blocks.0.hook_resid_pre' and 2 more"),
        ("stack_head_results", (), r"needs 'blocks.0.attn.hook_z' and 1 more.*endswith\('attn.hook_z'\)"),
        ("compute_head_results", (), r"needs 'blocks.0.attn.hook_z'"),
        (
            "get_neuron_results",
            (1,),
            r"needs 'blocks.1.mlp.hook_post', not kept in this cache. Keep what it needs: run",
        ),
        ("stack_neuron_results", (2, None, None, False, True), r"'hook_resid_post', 'mlp.hook_post'"),
        ("get_full_resid_decomposition", (), r"'attn.hook_z', 'hook_embed', 'hook_pos_embed', 'mlp.hook_post'"),
        ("logit_attrs", (np.ones((1, 2, 6, 16), np.float32), 3), "needs 'ln_final.hook_scale'"),
    ],
)
def test_missing_activations_are_named(
    model: HookedTransformer, cache: ActivationCache, method: str, arguments: tuple[Any, ...], message: str
) -> None:
    few = cache.with_activations({"blocks.0.hook_attn_out": cache["attn_out", 0]})
    with pytest.raises(UnknownHookError, match=message) as raised:
        getattr(few, method)(*arguments)
    keep = eval(str(raised.value).partition("names_filter=")[2].removesuffix(").").strip())
    _, enough = model.run_with_cache(TOKENS, names_filter=keep)
    getattr(enough, method)(*arguments)


def test_models_that_have_no_such_parts() -> None:
    _, cache = build("residual_norm").run_with_cache(TOKENS)
    stack = cache["resid_post", 1][None]
    for call in (
        cache.decompose_resid,
        cache.stack_head_results,
        lambda: cache.stack_neuron_results(1),
        cache.get_full_resid_decomposition,
        lambda: cache.logit_attrs(stack, 3),
    ):
        with pytest.raises(InputError, match="normalises the stream itself"):
            call()
    assert cache.logit_lens().shape == (3, 2, 6, 13)
    _, alone = build("attn_only").run_with_cache(TOKENS)
    for call in (lambda: alone.get_neuron_results(0), lambda: alone.stack_neuron_results(-1)):
        with pytest.raises(InputError, match="attention-only"):
            call()
    with pytest.raises(CacheError, match="attention-only"):
        alone.decompose_resid(1, mlp_input=True)
    _, mixed = build("moe").run_with_cache(TOKENS)
    assert mixed.stack_neuron_results(1).shape == (64, 2, 6, 16)
    for call in (mixed.get_full_resid_decomposition, lambda: mixed.get_neuron_results(1)):
        with pytest.raises(InputError, match=r"layer 1 has a mixture of experts.*expand_neurons=False"):
            call()
    _, after = build("post_norm_only").run_with_cache(TOKENS)
    with pytest.raises(InputError, match="reads the residual stream as it is"):
        after.decompose_resid(1, apply_ln=True)
