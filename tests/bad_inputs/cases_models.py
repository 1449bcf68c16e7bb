"""Caches, lenses, training states and parameters of another model: refused, with the way to do it on purpose."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from table import Case, World

import tljax
from tljax import ActivationCache, HookedTransformer
from tljax.analysis.direct_logit_attribution import direct_logit_attribution
from tljax.analysis.head_detector import detect_head
from tljax.analysis.lens_basis import LensBasis
from tljax.analysis.logit_lens import logit_lens
from tljax.analysis.tuned_lens import TunedLens
from tljax.checkpoints.layout import flatten
from tljax.errors import CacheError, CheckpointError, InputError
from tljax.patching import LogitDiff, ablation_sweep, mean_source, path_patch, sweep
from tljax.patching.transformerlens.functions import get_act_patch_resid_pre
from tljax.train import TrainConfig, train

IDS = np.array([[1, 2, 3]])


@functools.cache
def raw() -> HookedTransformer:
    """The bundled model without processing."""
    return HookedTransformer.from_pretrained_no_processing("tljax-tiny")


@functools.cache
def raw_cache(prompt: str) -> ActivationCache:
    return raw().run_with_cache(prompt)[1]


def metric(w: World) -> LogitDiff:
    return LogitDiff(w.tiny.to_single_token(" Mary"), w.tiny.to_single_token(" John"))


def sent(w: World, cache: Any) -> Any:
    """A sweep of the cache's residual stream into the processed model."""
    return sweep(w.tiny, w.Q, cache, metric(w), "resid_pre", axes=(), layers=[2]).values


def saved(thing: Any, name: str = "file.safetensors") -> Path:
    path = Path(tempfile.mkdtemp()) / name
    thing(path)
    return path


def fine_tuned(w: World) -> HookedTransformer:
    """The same config and processing, one matrix a little different."""
    params = dict(w.tiny.params)
    attn = params["blocks"][2]["attn"]
    block = {**params["blocks"][2], "attn": {**attn, "W_V": attn["W_V"] * 1.001}}
    return w.tiny.replace(params={**params, "blocks": (*params["blocks"][:2], block, *params["blocks"][3:])})


def resumed(w: World) -> Any:
    run = TrainConfig(
        steps=1, batch_size=2, log_every=1, directory=tempfile.mkdtemp(), progress=False, learning_rate=0.01, seed=0
    )
    rows = np.array([[1, 2, 3], [3, 2, 1]])
    train(w.small, rows, run)
    return train(HookedTransformer(w.config(act_fn="gelu")), rows, run, resume=True)


def lens(model: HookedTransformer) -> TunedLens:
    layers, width = model.cfg.n_layers, model.cfg.d_model
    shapes = {"weight": (layers, width, width), "bias": (layers, width), "losses": (1, layers)}
    return TunedLens(**{name: jnp.zeros(shape) for name, shape in shapes.items()}, basis=LensBasis.of(model))


def changed(w: World, change: Any) -> Any:
    """The small model's parameters, changed."""
    params = jax.tree.map(lambda leaf: leaf, w.small.params)
    change(params["blocks"][0]["attn"], params)
    return params


def turned(attn: Any, _: Any) -> None:
    attn.update({name: jnp.moveaxis(attn[name], 1, 0) for name in ("W_Q", "W_K", "W_V")})


def lose(attn: Any, params: Any) -> None:
    del attn["b_Q"], params["unembed"]["b_U"]
    attn["W_q"] = attn.pop("W_Q")


CACHES = [
    Case("a sweep from a cache of the unprocessed model", lambda w: sent(w, raw_cache(w.P)), CacheError,
         "The cache to patch from", "fold_ln applied here, not there", "cache.as_if_from(model)"),
    Case("the same on purpose", lambda w: sent(w, raw_cache(w.P).as_if_from(w.tiny)),
         equals=lambda w: sent(w, raw_cache(w.P).cache_dict)),
    Case("the same after arithmetic", lambda w: sent(w, jax.tree.map(lambda x: 2 * x, raw_cache(w.P))), CacheError,
         "fold_ln"),
    Case("the same through jit", lambda w: sent(w, jax.jit(lambda c: c)(raw_cache(w.P))), CacheError, "fold_ln"),
    Case("a sweep from a fine-tuned model's cache", lambda w: sent(w, fine_tuned(w).run_with_cache(w.P)[1]), CacheError,
         "weights are other numbers"),
    Case("a sweep from a cache in half precision", lambda w: sent(w, w.tiny.to("bfloat16").run_with_cache(w.P)[1]),
         equals=lambda w: sent(w, w.tiny.run_with_cache(w.P)[1]), tolerance=0.3),
    Case("an ablation by another model's means",
         lambda w: ablation_sweep(w.tiny, w.Q, metric(w), kind="mean", reference=raw_cache(w.P)), CacheError,
         "fold_ln"),
    Case("means of another model's cache as a source",
         lambda w: sweep(w.tiny, w.Q, mean_source(raw_cache(w.P)), metric(w), "z", ("head",)), CacheError, "fold_ln"),
    Case("path patching from another model's cache",
         lambda w: path_patch(w.tiny, w.Q, raw_cache(w.P), metric(w), "logits"), CacheError, "fold_ln"),
    Case("TransformerLens's patching from another model's cache",
         lambda w: get_act_patch_resid_pre(w.tiny, w.tiny.to_tokens(w.Q), raw_cache(w.P), metric(w)), CacheError,
         "fold_ln"),
    Case("the logit lens of another model's cache", lambda w: logit_lens(w.tiny, cache=raw_cache(w.P)), CacheError,
         "fold_ln"),
    Case("direct attribution of another model's cache",
         lambda w: direct_logit_attribution(w.tiny, cache=raw_cache(w.P), answer_tokens=" Mary"), CacheError,
         "fold_ln"),
    Case("head detection in another model's cache",
         lambda w: detect_head(w.tiny, w.P, "induction_head", cache=raw_cache(w.P)), CacheError, "fold_ln"),
    Case("another model attached to a cache", lambda w: raw_cache(w.P).with_model(w.tiny), CacheError, "as_if_from"),
    Case("a cache's file and another model", lambda w: ActivationCache.load(saved(raw_cache(w.P).save), w.tiny),
         CacheError, "fold_ln"),
    Case("a cache's file and a fine-tuned model",
         lambda w: ActivationCache.load(saved(w.tiny.run_with_cache(w.P)[1].save), fine_tuned(w)), CacheError,
         "weights are other numbers"),
    Case("a cache's file and its model",
         lambda w: ActivationCache.load(saved(raw_cache(w.P).save), raw())["resid_post", 0],
         equals=lambda w: raw_cache(w.P)["resid_post", 0]),
]  # fmt: skip

FILES = [
    Case("training resumed with another activation", resumed, CheckpointError, "act_fn='relu' there, 'gelu' here"),
    Case("a lens of another activation",
         lambda w: logit_lens(w.small, IDS, lens=lens(HookedTransformer(w.config(act_fn="gelu")))), InputError,
         "act_fn"),
    Case("a lens of unrelated weights",
         lambda w: logit_lens(w.small, IDS, lens=lens(HookedTransformer(w.config(seed=5)))), InputError,
         "nothing in common"),
    Case("a lens of the base on a fine-tuned model",
         lambda w: logit_lens(fine_tuned(w), w.P, lens=lens(w.tiny)).top_ids, equals=lambda w: logit_lens(
             fine_tuned(w), w.P).top_ids),
    Case("interventions for another model", lambda w: tljax.load_interventions(
        saved(lambda path: tljax.save_interventions([("blocks.0.hook_mlp_out", tljax.Zero())], path, raw())), w.tiny),
         CheckpointError, "saved for another model", "fold_ln", "without model="),
    Case("interventions for no model in particular", lambda w: tljax.load_interventions(
        saved(lambda path: tljax.save_interventions([("blocks.0.hook_mlp_out", tljax.Zero())], path)), w.tiny),
         CheckpointError, "does not say which model"),
]  # fmt: skip

PARAMETERS = [
    Case("TransformerLens's layout", lambda w: HookedTransformer(w.small.cfg, params=changed(w, turned)),
         CheckpointError, "blocks.0.attn.W_Q is (2, 8, 4), should be (8, 2, 4)", "W_V", "from_transformer_lens"),
    Case("missing and unknown parameters", lambda w: w.small.replace(params=changed(w, lose)), CheckpointError,
         "blocks.0.attn.b_Q is absent", "unembed.b_U is absent", "blocks.0.attn.W_q",
         "Did you mean 'blocks.0.attn.W_Q'"),
    Case("parameters of more layers", lambda w: w.small.replace(params=HookedTransformer(w.config(n_layers=2)).params),
         CheckpointError, "blocks.1.attn.W_Q", "should be absent"),
    Case("parameters of another vocabulary", lambda w: w.small.replace(cfg=w.config(d_vocab=13)), CheckpointError,
         "embed.W_E is (12, 8), should be (13, 8)", "unembed.b_U"),
    Case("whole numbers for parameters",
         lambda w: w.small.replace(params=jax.tree.map(lambda p: p.astype(int), w.small.params)), CheckpointError,
         "floating-point", "int32"),
    Case("flat parameters", lambda w: w.small.replace(params=flatten(w.small.params)), CheckpointError, "nested"),
    Case("a state dict's blocks by name",
         lambda w: w.small.replace(params={**w.small.params, "blocks": {"0": w.small.params["blocks"][0]}}),
         CheckpointError, "must be a tuple"),
    Case("no parameters", lambda w: w.small.replace(params=None), CheckpointError, "NoneType"),
    Case("a parameter that is no array",
         lambda w: w.small.replace(params=changed(w, lambda attn, _: attn.update(W_Q=3))),
         CheckpointError, "blocks.0.attn.W_Q is no array"),
    Case("gradients as parameters", lambda w: w.small.replace(params=jax.grad(lambda p: w.small.replace(params=p)(
        IDS, return_type="loss"))(w.small.params)).params["unembed"]["b_U"].shape, equals=(12,)),
    Case("models stacked for vmap", lambda w: jax.vmap(lambda model: model(IDS))(w.small.replace(
        params=jax.tree.map(lambda p: jnp.stack([p, p]), w.small.params)))[1], equals=lambda w: w.small(IDS)),
    Case("a config of the same shapes", lambda w: w.small.replace(cfg=dataclasses.replace(
        w.small.cfg, act_fn="gelu")).cfg.act_fn, equals="gelu"),
]  # fmt: skip

CASES = [*CACHES, *FILES, *PARAMETERS]
