"""What could mean two things: refused, or decided and said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from table import Case, World

import tljax
from tljax import Batch, HookedTransformer
from tljax.analysis.logit_lens import readout
from tljax.errors import CacheError, InputError, InterventionError, UnknownHookError
from tljax.model.losses import lm_accuracy, lm_cross_entropy_loss
from tljax.patching import LogitDiff, Loss, steering_sweep, sweep

TOKENS, OTHERS = [[1, 2, 3, 4]], [[5, 6, 7, 8]]
MASK = np.array([[0, 0, 1, 1]])
ADDITIVE = np.where(MASK == 1, 0.0, -1e9).astype(np.float32)
LOGITS = np.random.default_rng(1).normal(size=(1, 4, 12)).astype(np.float32)
DIFF = LogitDiff(1, 2)


@functools.cache
def mixture() -> HookedTransformer:
    """One layer of experts after one without."""
    return HookedTransformer(
        World.config(
            d_mlp=8,
            n_layers=2,
            act_fn="silu",
            gated_mlp=True,
            normalization_type="RMS",
            num_experts=3,
            experts_per_token=2,
            d_expert=4,
            moe_layers=(False, True),
            seed=1,
        )
    )


@functools.cache
def two_layers() -> HookedTransformer:
    return HookedTransformer(World.config(n_layers=2, seed=2))


def patched(name: object, axes: tuple[str, ...] = ("pos",), model: HookedTransformer | None = None, **options: object):
    return sweep(model or mixture(), TOKENS, OTHERS, DIFF, name, axes=axes, **options)  # type: ignore[arg-type]


def swept(source: object, run: object = sweep, model: HookedTransformer | None = None, **options: object) -> np.ndarray:
    model = model or two_layers()
    if run is steering_sweep:
        return np.asarray(steering_sweep(model, TOKENS, source, DIFF, [1.0], **options).values)[:, 0]  # type: ignore[arg-type]
    return np.asarray(sweep(model, TOKENS, source, DIFF, "resid_pre", axes=(), **options).values)  # type: ignore[arg-type]


def layered() -> np.ndarray:
    """A vector for each layer."""
    return np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)


def hand_loss(keep: list[int]) -> float:
    log_probs = np.asarray(jax.nn.log_softmax(LOGITS[0]))
    return float(-np.mean([log_probs[n, TOKENS[0][n + 1]] for n in keep]))


LABELS = np.array([[1, -100, 3, 4]])
CASES: tuple[Case, ...] = (
    # names of what is swept
    Case(
        "a layer in a short name",
        lambda w: patched("resid_pre1").values,
        equals=lambda w: patched("resid_pre", layers=[1]).values,
    ),
    Case("its label", lambda w: list(patched("resid_pre1").labels["layer"]), equals=["L1"]),
    Case("z0", lambda w: patched("z0").values, equals=lambda w: patched("z", layers=[0]).values),
    Case(
        "a layer in the name and another in layers=",
        lambda w: patched("resid_pre1", layers=[0]),
        InputError,
        "'resid_pre1'",
        "layers=[0]",
    ),
    Case("no such layer", lambda w: patched("z9"), UnknownHookError, "2 layers"),
    Case(
        "a mixture's router",
        lambda w: patched("router_scores").values,
        equals=lambda w: patched("blocks.1.mlp.hook_router_scores").values,
    ),
    Case(
        "experts' neurons",
        lambda w: patched("mlp.experts.hook_post").values,
        equals=lambda w: patched("blocks.1.mlp.experts.hook_post").values,
    ),
    Case("a norm inside the blocks", lambda w: patched("ln1.hook_scale").shape, equals=(2, 4)),
    Case(
        "which norm", lambda w: patched("hook_normalized"), InputError, "'ln1.hook_normalized' or 'ln2.hook_normalized'"
    ),
    Case("the final norm is no site", lambda w: patched("scale"), InputError, "ln_final.hook_scale", "ln1.hook_scale"),
    Case("a layer without experts", lambda w: patched("router_scores", layers=[0]), InputError, "Layer 0 has no"),
    # arrays by layer or by position
    Case(
        "as many layers as tokens",
        lambda w: sweep(two_layers(), [[1, 2]], np.ones((2, 8), np.float32), DIFF, "resid_pre", axes=()),
        InputError,
        "one value for each layer",
        "dict(enumerate(array))",
    ),
    Case(
        "as many layers as tokens, steered",
        lambda w: steering_sweep(two_layers(), [[1, 2]], np.ones((2, 8), np.float32), DIFF, [1.0]),
        InputError,
        "dict(enumerate(array))",
    ),
    Case("layers by number", lambda w: swept(dict(enumerate(layered()))), equals=lambda w: swept(layered())),
    Case(
        "layers by number, steered",
        lambda w: swept(dict(enumerate(layered())), steering_sweep),
        equals=lambda w: swept(layered(), steering_sweep),
    ),
    Case(
        "layers in another order",
        lambda w: swept(layered(), layers=[1, 0]),
        equals=lambda w: swept(dict(enumerate(layered()[::-1])))[::-1],
    ),
    Case("a layer that was not given", lambda w: swept({0: layered()[0]}), InputError, "for layers [0]"),
    # masks
    *(
        Case(f"an additive mask, {name}", call, InputError, "additive", "mask == 0")
        for name, call in {
            "run": lambda w: w.small(TOKENS, attention_mask=ADDITIVE),
            "batch": lambda w: Batch.from_mask(TOKENS, ADDITIVE),
            "generation": lambda w: w.small.generate([[1, 2, 3]], 1, attention_mask=ADDITIVE[:, 1:]),
            "loss": lambda w: w.small.loss_fn(LOGITS, TOKENS, ADDITIVE),
            "a metric": lambda w: Loss(np.array(TOKENS), ADDITIVE)(jnp.asarray(LOGITS)),
        }.items()
    ),
    Case("a mask of halves", lambda w: w.small(TOKENS, attention_mask=[[0.5, 1, 1, 1]]), InputError, "holds 0.5"),
    Case("a mask with NaN", lambda w: w.small(TOKENS, attention_mask=[[np.nan, 1, 1, 1]]), InputError, "holds nan"),
    Case("a mask of counts", lambda w: Batch.from_mask(TOKENS, [[1, 2, 3, 4]]), InputError, "holds 2"),
    Case(
        "a mask of floats under jit",
        lambda w: jax.jit(lambda m: w.small(jnp.asarray(TOKENS), attention_mask=m))(ADDITIVE),
        InputError,
        "mask == 1",
    ),
    Case(
        "a mask of floats",
        lambda w: w.small(TOKENS, attention_mask=MASK.astype(np.float32)),
        equals=lambda w: w.small(TOKENS, attention_mask=MASK.astype(bool)),
    ),
    # labels
    Case("ignored labels", lambda w: w.small.loss_fn(LOGITS, LABELS), equals=lambda w: hand_loss([1, 2])),
    Case(
        "ignored labels, each",
        lambda w: lm_cross_entropy_loss(jnp.asarray(LOGITS), jnp.asarray(LABELS), per_token=True)[0, 0],
        equals=0.0,
    ),
    Case(
        "ignored labels of a metric", lambda w: Loss(LABELS)(jnp.asarray(LOGITS))[0], equals=lambda w: hand_loss([1, 2])
    ),
    Case(
        "ignored labels and accuracy",
        lambda w: lm_accuracy(jnp.asarray(LOGITS), jnp.asarray([[0, -100, *LOGITS.argmax(-1)[0, 1:3]]])),
        equals=1.0,
    ),
    Case(
        "another negative label", lambda w: w.small.loss_fn(LOGITS, [[1, -1, 3, 4]]), InputError, "no token -1", "-100"
    ),
    Case(
        "a label beyond the vocabulary",
        lambda w: lm_cross_entropy_loss(jnp.asarray(LOGITS), jnp.array([[1, 12, 3, 4]])),
        InputError,
        "no token 12",
    ),
    Case(
        "labels beyond it, under jit",
        lambda w: bool(jnp.isnan(jax.jit(lm_cross_entropy_loss)(LOGITS, np.array([[1, 12, -7, 4]])))),
        equals=True,
    ),
    Case("labels of another length", lambda w: w.small.loss_fn(LOGITS, [[1, 2]]), InputError, "(1, 4, 12)", "(1, 2)"),
    # numbers or masks, numbers or ends
    Case(
        "a mask of whole numbers",
        lambda w: w.small.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", tljax.Zero(pos=[0, 1, 1, 0]))]),
        InterventionError,
        "could be a mask",
    ),
    Case("sites by such a mask", lambda w: patched("z", at={"pos": [0, 1, 1, 0]}), InputError, "could be a mask"),
    Case(
        "a cut by such a mask",
        lambda w: w.small.run_with_cache(TOKENS)[1].accumulated_resid(pos_slice=[1, 1, 0, 1]),
        CacheError,
        "could be a mask",
    ),
    Case(
        "a run cut by such a mask",
        lambda w: w.small.run_with_cache(TOKENS, pos_slice=[1, 1, 0, 1]),
        CacheError,
        "could be a mask",
    ),
    Case(
        "a mask of booleans",
        lambda w: w.small.run_with_hooks(
            TOKENS, fwd_hooks=[("hook_embed", tljax.Zero(pos=np.array([False, True, True, False])))]
        ),
        equals=lambda w: w.small.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", tljax.Zero(pos=[1, 2]))]),
    ),
    Case("a start and an end, or two numbers", lambda w: tljax.Zero(pos=(0, 3)), InterventionError, "[0, 3]", "slice"),
    Case("a layer and a head, or two heads", lambda w: tljax.Zero(head=(1, 1)), InterventionError, "[1, 1]"),
    Case("a truth instead of an entry", lambda w: patched("z", at={"pos": True}), InputError, "a number, a list"),
    Case("a fraction of a position", lambda w: patched("z", at={"pos": 1.5}), InputError, "a number, a list"),
    # order, kinds, tokens
    Case(
        "layer first", lambda w: w.small.run_with_cache(TOKENS)[1][0, "resid_pre"], UnknownHookError, "('resid_pre', 0)"
    ),
    Case("a number as names", lambda w: w.small.run_with_cache(TOKENS, names_filter=0), UnknownHookError, "a string"),
    Case(
        "one name or a list of it",
        lambda w: list(w.small.run_with_cache(TOKENS, names_filter="hook_embed")[1]),
        equals=lambda w: list(w.small.run_with_cache(TOKENS, names_filter=["hook_embed"])[1]),
    ),
    Case("one prompt or a list of it", lambda w: w.tiny(w.S), equals=lambda w: w.tiny([w.S])),
    Case("ids with or without the batch", lambda w: w.small(TOKENS[0]), equals=lambda w: w.small(TOKENS)),
    Case("ids as floats", lambda w: w.small(np.array([[1.0, 2.0]])), InputError, "integers", "float"),
    Case("texts in an array", lambda w: w.tiny(np.array(["a b"])), InputError, "integers"),
    Case(
        "BOS asked for in front of ids",
        lambda w: w.tiny(np.array([[5, 6]]), prepend_bos=True),
        InputError,
        "only texts get one",
    ),
    Case(
        "BOS asked for in front of ids that have it",
        lambda w: w.tiny(w.tiny.to_tokens(w.S), prepend_bos=True),
        equals=lambda w: w.tiny(w.S),
    ),
    Case(
        "whether to keep tokens",
        lambda w: readout(w.small, np.ones(8, np.float32), top_k=True),
        InputError,
        "whole number",
    ),
    Case(
        "answers for another number of prompts",
        lambda w: LogitDiff([1, 2], 3)(jnp.asarray(LOGITS)),
        InputError,
        "one for each prompt [1]",
    ),
)
