"""Values of the wrong type, or out of the range where they mean anything."""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax import Mean, Noise, TruncationWarning, Zero, get_act_name
from tljax.analysis.direct_logit_attribution import direct_logit_attribution
from tljax.analysis.induction import induction_scores
from tljax.analysis.logit_lens import logit_lens, readout
from tljax.analysis.patchscopes import patchscope
from tljax.analysis.probes import logistic_probe, ridge_probe, sparse_probe
from tljax.errors import CacheError, ConfigError, HookError, InputError, InterventionError
from tljax.patching import PatchingResult, ablation_sweep, sweep
from tljax.train.trainer import TrainConfig

X = np.random.default_rng(0).normal(size=(8, 3))
Y = np.arange(8) % 2
LONG = "John and Mary went to the store. " * 40
RESULT = PatchingResult(jnp.ones((2, 3)), ("layer", "pos"), baseline=jnp.asarray(0.0))


def _config(**fields: Any) -> Any:
    return lambda w: w.config(**fields)


def _says_so_each_time(w: World) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            w.tiny.to_tokens(LONG)
    return sum(issubclass(one.category, TruncationWarning) for one in caught)


CASES: tuple[Case, ...] = (
    Case("a flag in words", _config(parallel_attn_mlp="false"), ConfigError, "'false'", "True or False"),
    Case("a flag as a number", _config(gated_mlp=1), ConfigError, "gated_mlp=1"),
    Case("a flag of numpy", lambda w: w.config(gated_mlp=np.bool_(True)).gated_mlp, equals=True),
    Case("eps of NaN", _config(eps=float("nan")), ConfigError, "eps=nan"),
    Case("eps of infinity", _config(eps=float("inf")), ConfigError, "eps", "finite"),
    Case("eps as text", _config(eps="1e-5"), ConfigError, "eps='1e-5'"),
    Case("attn_scale of zero", _config(attn_scale=0), ConfigError, "attn_scale must be positive"),
    Case("rotary_base of zero", _config(positional_embedding_type="rotary", rotary_base=0), ConfigError, "base"),
    Case("half a seed", _config(seed=1.5), ConfigError, "seed=1.5", "whole number"),
    Case("flags of layers in words", _config(moe_layers=["no"]), ConfigError, "moe_layers", "True or False"),
    Case("half a layer in a name", lambda w: get_act_name("z", 2.9), InputError, "layer=2.9"),
    Case("half a layer", lambda w: sweep(w.tiny, w.P, w.Q, w.m, "z", layers=[2.9]), InputError, "layers=[2.9]"),
    Case("of a lens", lambda w: logit_lens(w.tiny, w.S, layers=[2.9]), InputError, "layers=[2.9]"),
    Case(
        "of a patchscope", lambda w: patchscope(w.tiny, w.S, w.S, source_layers=[0.5]), InputError,
        "source_layers=[0.5]",
    ),
    Case("to stop at", lambda w: w.small([[1]], stop_at_layer=0.5), InputError, "stop_at_layer=0.5"),
    Case("a side that is none", lambda w: w.tiny.generate(w.S, 1, padding_side="x"), InputError, "padding_side", "'x'"),
    Case("for the model itself", lambda w: w.tiny(w.S, padding_side="x"), InputError, "padding_side", "'x'"),
    Case("for ids", lambda w: w.small([[1]], padding_side="x"), InputError, "padding_side", "'x'"),
    Case("no steps", lambda w: logistic_probe(X, Y, max_steps=0), InputError, "max_steps=0", "at least 1"),
    Case("half a neuron", lambda w: sparse_probe(X, Y, k=1.5), InputError, "k=1.5"),
    Case("a penalty of NaN", lambda w: ridge_probe(X, Y, l2=float("nan")), InputError, "l2=nan"),
    Case("the best -1", lambda w: RESULT.top(-1), InputError, "k=-1", "at least 1"),
    Case(
        "parts of an attribution", lambda w: direct_logit_attribution(w.tiny, w.S, " John").top(-1), InputError, "k=-1"
    ),
    Case("half a token", lambda w: readout(w.tiny, np.zeros(64, np.float32), top_k=2.5), InputError, "top_k=2.5"),
    Case("a flag of a loss", lambda w: w.small([[1, 2]], "loss", loss_per_token="no"), InputError, "token='no'"),
    Case("a flag of text", lambda w: w.tiny.to_tokens(w.S, prepend_bos="no"), InputError, "prepend_bos='no'"),
    Case("truncate in words", lambda w: w.tiny.to_tokens(w.S, truncate="no"), InputError, "truncate='no'"),
    Case(
        "a flag of generation", lambda w: w.small.generate([[1]], 1, stop_at_eos=False, do_sample="no"), InputError,
        "do_sample='no'",
    ),
    Case("whether to stop", lambda w: w.small.generate([[1]], 1, stop_at_eos="no"), InputError, "stop_at_eos='no'"),
    Case("half a new token", lambda w: w.small.generate([[1]], 1.5), InputError, "max_new_tokens=1.5"),
    Case(
        "a flag of a cache", lambda w: w.small.run_with_cache([[1]])[1].accumulated_resid(incl_mid="no"), CacheError,
        "incl_mid='no'",
    ),
    Case("a return type", lambda w: w.small([[1]], return_type="logit"), InputError, "'logit'", "'logits'"),
    Case("a direction", lambda w: w.small.add_hook("z0", Zero(), dir="back"), InputError, "dir='back'", "'bwd'"),
    Case(
        "reduce", lambda w: sweep(w.tiny, w.P, w.Q, w.m, "resid_pre", reduce="no"), InputError,
        "reduce='no'", "'none'",
    ),
    Case("a kind", lambda w: ablation_sweep(w.tiny, w.S, w.m, kind="zeros"), InputError, "kind='zeros'", "'zero'"),
    Case("half a batch", lambda w: induction_scores(w.tiny, batch_size=0.5), InputError, "batch_size=0.5"),
    Case("copies of no tokens", lambda w: induction_scores(w.tiny, length=0), InputError, "length=0"),
    Case("training half a step", lambda w: TrainConfig(steps=1.5), ConfigError, "steps=1.5"),
    Case("at an infinite rate", lambda w: TrainConfig(steps=1, learning_rate=np.inf), ConfigError, "rate"),
    Case("a mean over nothing", lambda w: Mean(over=()), InterventionError, "over"),
    Case("a negative seed", lambda w: Noise(1.0, seed=-1), InterventionError, "seed=-1"),
    Case("half of one", lambda w: Noise(1.0, seed=0.5), InterventionError, "seed=0.5"),
    Case(
        "seeds that float32 does not tell apart",
        lambda w: repr(Noise(1.0, seed=2**24 + 1)), equals=f"Noise(scale=1.0, seed={2**24 + 1})",
    ),
    Case(
        "their noise",
        lambda w: bool((_noise(w, 2**24) == _noise(w, 2**24 + 1)).any()), equals=False,
    ),
    Case(
        "backward hooks without a gradient",
        lambda w: w.small.run_with_hooks([[1]], bwd_hooks=[("z0", Zero())]), HookError, "jax.grad", "incl_bwd=True",
    ),
    Case("a text that is too long", lambda w: w.tiny(LONG), InputError, "n_ctx=128", "to_tokens"),
    Case("one of several", lambda w: w.tiny([w.S, LONG], padding_side="left"), InputError, "n_ctx=128"),
    Case("continued", lambda w: w.tiny.generate(LONG, 1), InputError, "n_ctx=128"),
    Case("in a Batch", lambda w: w.tiny.to_batch([w.S, LONG]), InputError, "n_ctx=128", "to_tokens"),
    Case("in a lens", lambda w: logit_lens(w.tiny, LONG), InputError, "n_ctx=128"),
    Case("cut on purpose", _says_so_each_time, equals=3),
)  # fmt: skip


def _noise(w: World, seed: int) -> Any:
    _, cache = w.small.with_hooks([("hook_embed", Noise(1.0, seed=seed))]).run_with_cache(
        [[1, 2]], names_filter="hook_embed"
    )
    return np.asarray(cache["hook_embed"])
