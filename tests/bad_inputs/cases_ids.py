"""Numbers of things that do not exist: token ids, layers, heads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax import Add, Batch, HookedTransformer, Replace, Zero
from tljax.errors import GenerationError, HookError, InputError
from tljax.patching import Logit, LogitDiff, LogProb, steering_sweep, sweep

A = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
WIDE = {"d_vocab": 12, "d_vocab_out": 10}


def _written(w: World, change: Any) -> list[float]:
    """The metric with ``A[i]`` at layer 3 - i, one run each."""
    names = ("blocks.3.hook_resid_pre", "blocks.2.hook_resid_pre")
    return [float(w.m(w.tiny.run_with_hooks(w.Q, fwd_hooks=[(name, change(A[i]))]))[0]) for i, name in enumerate(names)]


def _traced(w: World, head: int) -> Any:
    """Head ``head`` of layer 1 ablated, its number unknown while the run is traced: the last token's logits."""
    tokens = w.tiny.to_tokens(w.S)
    return jax.jit(
        lambda number: w.tiny.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", Zero(head=number))])[0, -1]
    )(head)


def _likes(token: int, **fields: Any) -> HookedTransformer:
    """A model that always says one token."""
    model = HookedTransformer(World.config(**(WIDE | fields)))
    unembed = model.params["unembed"]
    return model.replace(params=model.params | {"unembed": unembed | {"b_U": unembed["b_U"].at[token].set(99.0)}})


def _token(logits: jax.Array, metric: type, token: int, pos: int = -1) -> Any:
    """A metric of a token and a position that are traced."""
    return jax.jit(lambda token, pos: metric(token, pos=pos)(logits))(jnp.asarray([token]), jnp.asarray([pos]))


ALL_NAN = np.full(12, np.nan)

CASES: tuple[Case, ...] = (
    Case("a token id beyond the vocabulary", lambda w: w.small([[1, 12]]), InputError, "12"),
    Case("its direction", lambda w: w.tiny.tokens_to_residual_directions(10**6), InputError, "1000000", "0 to 968"),
    Case("a negative id", lambda w: w.tiny.tokens_to_residual_directions([3, -1]), InputError, "-1"),
    Case(
        "a direction under trace",
        lambda w: jax.jit(w.small.tokens_to_residual_directions)(np.asarray([12, -1]))[:, 0],
        equals=ALL_NAN[:2],
    ),
    Case("embedding it", lambda w: w.small.embed(np.asarray([[1, 12]])), InputError, "12", "0 to 11"),
    Case("positions past n_ctx", lambda w: w.small.pos_embed(np.zeros((1, 5), int)), InputError, "5", "n_ctx=4"),
    Case("traced ids", lambda w: jax.jit(w.small)(np.asarray([[12, 1]]))[0, -1], equals=ALL_NAN),
    Case("a traced id of -1", lambda w: jax.jit(w.small)(np.asarray([[-1, 1]]))[0, -1], equals=ALL_NAN),
    Case(
        "a hook that writes it",
        lambda w: w.small.run_with_hooks([[1, 2]], fwd_hooks=[("hook_tokens", lambda x, hook: x.at[0, 1].set(10**6))]),
        HookError, "1000000", "0 to 11",
    ),
    Case(
        "an intervention that writes it",
        lambda w: w.small.run_with_hooks([[1, 2]], fwd_hooks=[("hook_tokens", Replace(12, pos=1))]), HookError, "12",
    ),
    Case(
        "half a token",
        lambda w: w.small.run_with_hooks([[1, 2]], fwd_hooks=[("hook_tokens", Replace(2.5, pos=1))]), HookError, "2.5",
    ),
    Case("an id that int32 does not hold", lambda w: LogitDiff(2**32 + 5, 0), InputError, str(2**32 + 5)),
    Case("in the other answer", lambda w: LogitDiff(0, [2**32 + 5]), InputError, str(2**32 + 5)),
    Case("such a position", lambda w: Logit(5, pos=2**32), InputError, str(2**32)),
    Case("in a Batch", lambda w: Batch.from_mask(np.asarray([[2**32 + 5]]), [[1]]), InputError, str(2**32 + 5)),
    Case("in rows", lambda w: Batch.from_rows([np.asarray([2**32 + 5])]), InputError, str(2**32 + 5)),
    Case("a traced id of a metric", lambda w: _token(w.small([[1, 2]]), Logit, 12), equals=ALL_NAN[:1]),
    Case("its log-probability", lambda w: _token(w.small([[1, 2]]), LogProb, -1), equals=ALL_NAN[:1]),
    Case("a traced position of a metric", lambda w: _token(w.small([[1, 2]]), Logit, 3, 2), equals=ALL_NAN[:1]),
    Case(
        "and ones that exist", lambda w: _token(w.small([[1, 2]]), Logit, 3, -2),
        equals=lambda w: w.small([[1, 2]])[0, :1, 3],
    ),
    Case("a traced head", lambda w: _traced(w, 99), equals=np.full(969, np.nan)),
    Case("one below the first", lambda w: _traced(w, -5), equals=np.full(969, np.nan)),
    Case("one that exists", lambda w: _traced(w, -1), equals=lambda w: _traced(w, 3)),
    Case(
        "heads under vmap",
        lambda w: jnp.isnan(jax.vmap(lambda n: w.small.run_with_hooks(
            [[1, 2]], fwd_hooks=[("z0", Zero(head=n))])[0, -1, 0])(jnp.arange(4))),
        equals=np.asarray([False, False, True, True]),
    ),
    Case(
        "an array for chosen layers",
        lambda w: sweep(w.tiny, w.Q, A, w.m, "resid_pre", axes=(), layers=[3, 2]).values,
        equals=lambda w: np.asarray(_written(w, Replace)),
    ),
    Case(
        "steered along chosen layers",
        lambda w: steering_sweep(w.tiny, w.Q, A, w.m, [1.0], layers=[3, 2]).values[:, 0],
        equals=lambda w: np.asarray(_written(w, Add)),
    ),
    Case(
        "an array for other layers",
        lambda w: sweep(w.tiny, w.Q, np.zeros((3, 1, 14, 64), np.float32), w.m, "resid_pre", axes=(), layers=[3, 2]),
        InputError, "array[i]", "layers[i]",
    ),
    Case("a layer twice", lambda w: sweep(w.tiny, w.P, w.Q, w.m, "resid_pre", layers=[2, -2]), InputError, "twice"),
    Case(
        "a loss of a token without a logit",
        lambda w: HookedTransformer(w.config(**WIDE))([[1, 11]], return_type="loss"), InputError, "11", "d_vocab_out",
    ),
    Case(
        "unless it does not count",
        lambda w: _likes(3)([[1, 3, 11]], return_type="loss", attention_mask=[[1, 1, 0]]), equals=0.0, tolerance=1e-4,
    ),
    Case(
        "a choice that cannot be fed back",
        lambda w: _likes(11, d_vocab=10, d_vocab_out=12).generate([[1]], 2, stop_at_eos=False, verbose=False),
        GenerationError, "11", "0 to 9",
    ),
    Case(
        "and need not be",
        lambda w: _likes(11, d_vocab=10, d_vocab_out=12).generate([[1]], 1, stop_at_eos=False, verbose=False),
        equals=np.asarray([[1, 11]]),
    ),
)  # fmt: skip
