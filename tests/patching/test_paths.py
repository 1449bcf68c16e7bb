"""Path patching equals the procedure it names: a forked run to see what receivers would read, then a patched run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import HookedTransformer, Replace, Zero
from tljax.errors import InputError
from tljax.patching import LogitDiff, path_patch

LAYERS = 3
SOURCE = jnp.asarray(np.random.default_rng(3).integers(0, 13, (2, 5)), jnp.int32)
PROMPT = SOURCE.at[:, 2].set(jnp.asarray([11, 7])).at[1, 1].set(3)
METRIC = LogitDiff(answer=jnp.asarray([1, 2]), wrong=jnp.asarray([3, 4]))
POINTS = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "mlp": "hook_mlp_in"}
RECEIVERS: dict[str, Any] = {
    "logits": "logits",
    "q": [("q", 2, 1)],
    "all keys": [("k", 1)],
    "several": [("q", 1, 0), ("q", 1, -1), ("v", 2, 1), ("k", -1, 0)],
    "mlp": [("mlp", 1)],
    "mixed": [("mlp", 2), ("q", 2, 3), ("v", 1)],
}


def full_name(sender: str, layer: int) -> str:
    if sender in ("embed", "pos_embed"):
        return f"hook_{sender}"
    return f"blocks.{layer}.{'attn.' if sender in ('z', 'result') else ''}hook_{sender}"


@functools.cache
def runs(model: HookedTransformer) -> tuple[Any, Any]:
    """Caches of the prompt and of the source."""
    names: list[Any] = [lambda name: True, *(f"blocks.{n}.attn.hook_result" for n in range(LAYERS))]
    return tuple(model.run_with_cache(tokens, names_filter=names)[1] for tokens in (PROMPT, SOURCE))  # type: ignore


def by_hand(
    model: HookedTransformer,
    receivers: Any,
    sender: str,
    layer: int,
    freeze_mlps: bool,
    metric: Any = METRIC,
    **at: Any,
) -> Any:
    """The metric with one sender's paths patched, by two hooked runs."""
    (base, new), name = runs(model), full_name(sender, layer)
    freeze = [f"blocks.{n}.hook_attn_out" for n in range(LAYERS) if sender not in ("z", "result") or n != layer]
    freeze += [f"blocks.{n}.hook_mlp_out" for n in range(LAYERS)] if freeze_mlps else []
    forked = model
    for frozen, hook in [*((frozen, Replace(base[frozen])) for frozen in freeze), (name, Replace(new[name], **at))]:
        forked = forked.add_hook(frozen, hook)
    if receivers == "logits":
        reads = [(f"blocks.{LAYERS - 1}.hook_resid_post", {})]
    else:
        reads = [
            (f"blocks.{n % LAYERS}.{POINTS[kind]}", {"head": head[0]} if head else {}) for kind, n, *head in receivers
        ]
    _, fork = forked.run_with_cache(PROMPT, names_filter=[read for read, _ in reads])
    return metric(model.run_with_hooks(PROMPT, fwd_hooks=[(read, Replace(fork[read], **head)) for read, head in reads]))


def check(got: Any, model: HookedTransformer, receivers: Any, sender: str, freeze: bool, **at: Any) -> None:
    for layer in range(LAYERS):
        expected = by_hand(model, receivers, sender, layer, freeze, **at)
        np.testing.assert_allclose(got[layer], expected, atol=1e-5, err_msg=f"layer {layer} {at}")


CASES = [
    ("gpt2", "logits", True), ("gpt2", "several", False), ("gpt2", "mixed", True), ("llama", "several", True),
    ("llama", "mixed", False), ("neox", "mixed", False), ("bidirectional", "mixed", True),
    ("multipliers", "mixed", False), ("sandwich", "mixed", False), ("alibi", "mixed", False),
    ("post_norm_only", "mixed", True), ("clipped", "mixed", False), ("latent", "mixed", True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "freeze"), CASES)
def test_heads(kind: str, name: str, freeze: bool) -> None:
    model, receivers = build(kind, n_layers=LAYERS), RECEIVERS[name]
    got = path_patch(model, PROMPT, SOURCE, METRIC, receivers, freeze_mlps=freeze, reduce="none")
    assert got.shape == (LAYERS, model.cfg.n_heads, 2)
    assert np.abs(got.effect()).max() > 1e-4
    check(got.values[:, 2], model, receivers, "z", freeze, head=2)
    np.testing.assert_allclose(got.baseline, METRIC(model(PROMPT)), atol=1e-5)
    np.testing.assert_allclose(got.clean, METRIC(model(SOURCE)), atol=1e-5)


SENT = [
    ("gpt2", "mlp_out", False), ("gpt2", "attn_out", True), ("gpt2", "embed", False), ("llama", "result", False),
    ("neox", "attn_out", False), ("neox", "mlp_out", True), ("multipliers", "result", True),
    ("multipliers", "mlp_out", False), ("sandwich", "result", True), ("sandwich", "attn_out", False),
    ("alibi", "embed", False), ("post_norm_only", "result", False), ("post_norm_only", "mlp_out", True),
    ("qk_after_rotary", "attn_out", False), ("latent", "result", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sender", "freeze"), SENT)
def test_other_senders(kind: str, sender: str, freeze: bool) -> None:
    model, receivers = build(kind, n_layers=LAYERS), [("k", 1, 1), ("mlp", 2)]
    got = path_patch(model, PROMPT, SOURCE, METRIC, receivers, sender, ("pos",), freeze_mlps=freeze, reduce="none")
    values = got.values if sender != "embed" else got.values[None]
    assert np.abs(got.effect()).max() > 1e-4
    for layer in range(len(values)):
        expected = by_hand(model, receivers, sender, layer, freeze, pos=2)
        np.testing.assert_allclose(values[layer, 2], expected, atol=1e-5, err_msg=f"layer {layer}")


def test_embeddings_reach_the_first_layer(model: HookedTransformer) -> None:
    sender, receivers = "pos_embed", [("k", 0), ("mlp", 0)]
    got = path_patch(model, PROMPT, Zero(), METRIC, receivers, sender, reduce="none", axes=("pos",))
    assert got.axis_names == ("pos", "batch")
    name = f"hook_{sender}"
    reads = [f"blocks.0.{POINTS[kind]}" for kind, _ in receivers]
    forked = model.add_hook("blocks.0.hook_attn_out", Replace(runs(model)[0]["attn_out", 0]))
    _, fork = forked.add_hook(name, Zero(pos=3)).run_with_cache(PROMPT, names_filter=reads)
    expected = METRIC(model.run_with_hooks(PROMPT, fwd_hooks=[(read, Replace(fork[read])) for read in reads]))
    np.testing.assert_allclose(got.values[3], expected, atol=1e-5)


def test_senders_at_positions(model: HookedTransformer) -> None:
    receivers = RECEIVERS["mixed"]
    got = path_patch(model, PROMPT, SOURCE, METRIC, receivers, axes=("pos", "head"), reduce="none")
    assert got.shape == (LAYERS, 5, 4, 2)
    check(got.values[:, 2, 3], model, receivers, "z", False, pos=2, head=3)
    last = path_patch(model, PROMPT, SOURCE, METRIC, receivers, at={"pos": -1}, reduce="none")
    np.testing.assert_allclose(last.values, got.values[:, -1], atol=1e-5)
    part = path_patch(model, PROMPT, SOURCE, METRIC, receivers, layers=[1, 0], at={"head": [3, 0]}, reduce="none")
    heads = path_patch(model, PROMPT, SOURCE, METRIC, receivers, reduce="none")
    np.testing.assert_allclose(part.values, heads.values[jnp.asarray([1, 0])][:, jnp.asarray([3, 0])], atol=1e-5)


def test_parts_of_a_head_and_of_the_stream(model: HookedTransformer) -> None:
    receivers = [("mlp", 1), ("q", 2, 1)]
    got = path_patch(model, PROMPT, SOURCE, METRIC, receivers, axes=("head", "d_head"), reduce="none")
    check(got.values[:, 1, 5], model, receivers, "z", False, head=1, d_head=5)
    got = path_patch(
        model, PROMPT, SOURCE, METRIC, receivers, "attn_out", at={"d_model": [3, 8]}, axes=(), reduce="none"
    )
    check(got.values, model, receivers, "attn_out", False, d_model=[3, 8])


def test_senders_after_all_receivers_have_no_effect(model: HookedTransformer) -> None:
    for receivers, sender, first in (
        ([("q", 1, 1)], "z", 1),
        ([("mlp", 1)], "mlp_out", 1),
        ([("mlp", 1)], "z", 2),
    ):
        got = path_patch(model, PROMPT, SOURCE, METRIC, receivers, sender, ("pos",), reduce="none")
        np.testing.assert_array_equal(got.effect()[first:], 0)
        assert np.abs(got.effect()[:first]).max() > 1e-4


def test_any_metric_and_several(model: HookedTransformer) -> None:
    def python(logits: Any) -> Any:
        return jax.nn.log_softmax(logits[:, 3])[:, 5] + logits[:, -1, 0]

    def plain(logits: Any) -> float:
        return float(logits[0, 3, 5])

    receivers = RECEIVERS["mixed"]
    got = path_patch(model, PROMPT, SOURCE, {"a": python, "b": METRIC}, receivers, reduce="none")
    assert got.axis_names == ("metric", "layer", "head", "batch")
    for name, metric in (("a", python), ("b", METRIC)):
        expected = by_hand(model, receivers, "z", 0, False, metric, head=1)
        np.testing.assert_allclose(got[name].values[0, 1], expected, atol=1e-5)
    scalar = path_patch(model, PROMPT, SOURCE, plain, receivers)
    np.testing.assert_allclose(scalar.values[1, 1], by_hand(model, receivers, "z", 1, False, plain, head=1), atol=1e-5)


def test_caches_hooks_and_means(model: HookedTransformer) -> None:
    from_prompt = path_patch(model, PROMPT, SOURCE, METRIC, "logits", reduce="none")
    from_cache = path_patch(model, PROMPT, model.run_with_cache(SOURCE)[1], METRIC, "logits")
    np.testing.assert_allclose(from_cache.values, from_prompt.values.mean(-1), atol=1e-5)
    zeroed = path_patch(model, PROMPT, Zero(), METRIC, "logits")
    base, _ = runs(model)
    forked = model.add_hook("blocks.2.hook_attn_out", Replace(base["attn_out", 2]))
    logits = forked.run_with_hooks(
        PROMPT,
        fwd_hooks=[("blocks.1.attn.hook_z", Zero(head=2)), ("blocks.0.hook_attn_out", Replace(base["attn_out", 0]))],
    )
    np.testing.assert_allclose(zeroed.values[1, 2], METRIC(logits).mean(), atol=1e-5)


def test_padding(tiny: HookedTransformer) -> None:
    source = [
        "Then, John and Mary went to the store. John gave a drink to",
        "John and Mary went to the park. Mary gave a ring to",
    ]
    prompts = [source[0].replace("John gave", "Mary gave"), source[1].replace("Mary gave", "John gave")]
    lengths = [tiny.to_tokens(prompt).shape[1] for prompt in source]
    assert lengths[0] != lengths[1]
    answer, wrong = tiny.to_single_token(" Mary"), tiny.to_single_token(" John")
    receivers = [("q", 2, 1), ("v", 3), ("mlp", 2)]
    left = tiny.set_tokenizer(tiny.tokenizer, default_padding_side="left")
    together = path_patch(left, prompts, source, LogitDiff(answer, wrong), receivers, reduce="none").values
    for n, (prompt, other) in enumerate(zip(prompts, source, strict=True)):
        alone = path_patch(tiny, prompt, other, LogitDiff(answer, wrong), receivers)
        np.testing.assert_allclose(together[..., n], alone.values, atol=1e-4)


def test_narrow_models() -> None:
    got, expected = (
        path_patch(build("gpt2", n_layers=LAYERS, dtype=dtype), PROMPT, SOURCE, METRIC, RECEIVERS["mixed"]).values
        for dtype in ("bfloat16", "float32")
    )
    np.testing.assert_allclose(np.float32(got), expected, atol=0.1)


def test_groups_of_senders_and_chunks_change_nothing(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    receivers = RECEIVERS["mixed"]
    whole = path_patch(model, PROMPT, SOURCE, METRIC, receivers, axes=("pos", "head"))
    in_chunks = path_patch(model, PROMPT, SOURCE, METRIC, receivers, axes=("pos", "head"), max_batch=3)
    monkeypatch.setattr("tljax.memory.WORKING_BYTES", 20_000)
    in_groups = path_patch(model, PROMPT, SOURCE, METRIC, receivers, axes=("pos", "head"))
    np.testing.assert_allclose(in_chunks.values, whole.values, atol=1e-5)
    np.testing.assert_allclose(in_groups.values, whole.values, atol=1e-5)
    assert in_groups.report.sites == whole.report.sites == 60
    assert in_groups.report.skipped == whole.report.skipped
    assert in_groups.report.naive_flops == whole.report.naive_flops


def test_a_second_sweep_compiles_nothing(compilations: Any) -> None:
    model = build("gpt2", n_layers=LAYERS, d_model=20)

    def run(first: jax.Array, second: jax.Array, head: int) -> None:
        path_patch(model, first, second, METRIC, [("q", 2, head), ("mlp", 1)])
        path_patch(model, first, second, METRIC, "logits", freeze_mlps=True)

    run(PROMPT, SOURCE, 1)
    start = compilations.count
    run(PROMPT, SOURCE, 3)
    run(SOURCE, PROMPT, 0)
    assert compilations.count == start


@pytest.mark.parametrize(
    ("receivers", "sentence"),
    [
        ([("queries", 1, 1)], r"Receiver \('queries', 1, 1\) is not of the form \(\"q\", layer, head\)"),
        ([("q",)], "is not of the form"),
        ([("q", 3, 1)], "layer 3 does not exist; there are 3, numbered 0 to 2"),
        ([("q", -4, 1)], "layer -4 does not exist"),
        ([("q", None, 1)], "layer None does not exist"),
        ([("q", 1, 4)], "head 4 does not exist; there are 4, numbered 0 to 3"),
        ([("v", 1, 1.5)], "head 1.5 does not exist"),
        ([("q", 1, 1), "logits"], "cannot be one receiver among others: the others reach the logits too"),
        ([("mlp", 1, 2)], "an MLP has no heads"),
        ([], r'give "logits" or a list such as'),
        ("mlp", r'give "logits" or a list such as'),
    ],
)
def test_receivers_that_do_not_exist(model: HookedTransformer, receivers: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        path_patch(model, PROMPT, SOURCE, METRIC, receivers)


def test_other_mistakes(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match="this model has no MLPs"):
        path_patch(build("attn_only"), PROMPT, SOURCE, METRIC, [("mlp", 1)])
    with pytest.raises(InputError, match="head 2 does not exist; there are 2, numbered 0 to 1"):
        path_patch(build("llama"), PROMPT, SOURCE, METRIC, [("k", 1, 2)])
    with pytest.raises(InputError, match=r"added to the residual stream: one of .*; got 'attn.hook_pattern'"):
        path_patch(model, PROMPT, SOURCE, METRIC, "logits", "pattern")
    with pytest.raises(InputError, match="normalises the whole stream after each addition"):
        path_patch(build("residual_norm"), PROMPT, SOURCE, METRIC, "logits")
    with pytest.raises(InputError, match="must have equally many"):
        path_patch(model, PROMPT, SOURCE[:, :3], METRIC, "logits")
    with pytest.raises(InputError, match="cannot go along 'head'"):
        path_patch(model, PROMPT, SOURCE, METRIC, "logits", "mlp_out")
    hooked = model.add_hook("blocks.0.hook_resid_post", Zero())
    with pytest.raises(InputError, match="carries hooks"):
        path_patch(hooked, PROMPT, SOURCE, METRIC, "logits")
