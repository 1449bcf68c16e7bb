"""Right values where the arithmetic is delicate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax import HookedTransformer, HookPoint, Project, ProjectOut, sample_logits
from tljax.errors import GenerationError, InputError
from tljax.patching.engine.report import block_flops
from tljax.patching.result import PatchingResult

E = np.eye(8, dtype=np.float32)
X = np.random.default_rng(0).normal(size=(1, 2, 8)).astype(np.float32)
POINT = HookPoint("hook_resid_pre", ("batch", "pos", "d_model"))
QUIET: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}
LATENT = {"kv_lora_rank": 6, "q_lora_rank": 5, "d_head": 6, "rotary_dim": 2, "d_value": 4, "n_ctx": 64, "d_model": 16,
          "positional_embedding_type": "rotary"}  # fmt: skip


def _without(*numbers: int) -> np.ndarray:
    """``X`` without some of its coordinates."""
    kept = X.copy()
    kept[..., list(numbers)] = 0
    return kept


def _out(directions: Any) -> Any:
    return ProjectOut(directions)(jnp.asarray(X), POINT)


def _gradient(directions: Any) -> Any:
    return jax.grad(lambda rows: (_out(rows) * X).sum())(jnp.asarray(directions))


def _nan(w: World) -> HookedTransformer:
    return w.small.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, w.small.params))


def _step(w: World, **options: Any) -> Any:
    """A generation whose logits are NaN once the text has four tokens."""
    hook = ("unembed.hook_out", lambda x, hook: x * jnp.nan if len(seen.append(0) or seen) == 2 else x)
    seen: list[int] = []
    return w.small.generate([[1, 2]], 3, fwd_hooks=[hook], **QUIET, **options)


def _longest(w: World, **options: Any) -> Any:
    return w.small.generate([[1, 2, 3]], 2, **QUIET, **options)


def _by_hand(w: World) -> Any:
    tokens = [1, 2, 3]
    for _ in range(2):
        tokens.append(int(w.small([tokens])[0, -1].argmax()))
    return np.asarray([tokens])


def _block_flops(w: World) -> float:
    """XLA's count of a block under latent attention, over ours."""
    cfg = w.config(**LATENT)
    block = HookedTransformer(cfg).blocks[0]
    analysis = jax.jit(block).lower(jnp.ones((1, 64, 16))).compile().cost_analysis()
    counted: Any = analysis[0] if isinstance(analysis, list) else analysis
    return counted["flops"] / block_flops(cfg, 64, 64, 1, 64, 64)


def _norms(w: World) -> Any:
    """Norms of the stream itself, as the views of GPT-1's kind give them."""
    model = HookedTransformer(w.config(normalization_type="LN", use_normalization_of_residual=True))
    resid = jnp.asarray(X)
    block = model.blocks[0]
    mid = block.ln1(resid + block.attn(resid, resid, resid))
    return block.ln2(mid + block.mlp(mid)) - block(resid)


def _post_norm(w: World) -> Any:
    model = HookedTransformer(w.config(normalization_type="RMS", use_normalization_after_only=True))
    return model.blocks[0].ln1(X)


ONE = PatchingResult(jnp.ones((2, 1)), ("layer", "batch"), baseline=jnp.zeros(1))

CASES: tuple[Case, ...] = (
    Case("directions of unlike length", lambda w: _out(np.stack([1e3 * E[0], E[1]])), equals=_without(0, 1)),
    Case(
        "kept", lambda w: Project(np.stack([1e3 * E[0], E[1]]))(jnp.asarray(X), POINT), equals=X - _without(0, 1)
    ),
    Case("very unlike", lambda w: _out(np.stack([1e30 * E[0], 1e-30 * E[1]])), equals=_without(0, 1)),
    Case("nearly parallel", lambda w: _out(np.stack([E[0], E[0] + 1e-5 * E[1]])), equals=_without(0, 1)),
    Case(
        "nearly parallel under trace", lambda w: jax.jit(_out)(np.stack([E[0], E[0] + 1e-3 * E[1]])),
        equals=_without(0, 1), tolerance=1e-3,
    ),
    Case("parallel", lambda w: _out(np.stack([E[0], 2 * E[0]])), equals=_without(0)),
    Case("parallel under trace", lambda w: jax.jit(_out)(np.stack([E[0], 2 * E[0]])), equals=_without(0)),
    Case("of zeros", lambda w: _out(np.stack([E[0], 0 * E[1]])), equals=_without(0)),
    Case("only zeros", lambda w: _out(0 * E[0]), equals=X),
    Case("more than dimensions", lambda w: _out(np.concatenate([E, E + 1])), equals=np.zeros_like(X)),
    Case(
        "finite gradients", lambda w: bool(jnp.isfinite(_gradient(np.stack([E[0], E[0], 0 * E[1]]))).all()), equals=True
    ),
    Case(
        "right gradients", lambda w: _gradient(3 * E[:1])[0], equals=lambda w: np.r_[0, _slope(3 * E[0])],
        tolerance=1e-4,
    ),
    Case("norms of the stream", _norms, equals=np.zeros_like(X)),
    Case("a norm that is not there", _post_norm, AttributeError, "ln1_post", "as it is"),
    Case("FLOPs under latent attention", _block_flops, equals=1.1, tolerance=0.12),
    Case("NaN logits", lambda w: _nan(w).generate([[1]], 2, **QUIET), GenerationError, "Prompt 0", "new token 0"),
    Case("sampled", lambda w: _nan(w).generate([[1]], 2, stop_at_eos=False), GenerationError, "NaN"),
    Case("streamed", lambda w: list(_nan(w).generate_stream([[1]], 2, stop_at_eos=False)), GenerationError, "NaN"),
    Case("NaN later", _step, GenerationError, "new token 1"),
    Case("NaN without a cache", lambda w: _step(w, use_past_kv_cache=False), GenerationError, "new token 1"),
    Case("logits drawn from alone", lambda w: sample_logits(jnp.full((1, 3), jnp.nan)), InputError, "Row 0", "NaN"),
    Case("no token allowed", lambda w: sample_logits(jnp.full(3, -jnp.inf)), InputError, "-inf"),
    Case("the token that needs no position", _longest, equals=_by_hand),
    Case("without a cache", lambda w: _longest(w, use_past_kv_cache=False), equals=_by_hand),
    Case("and no more", lambda w: w.small.generate([[1, 2, 3]], 3, **QUIET), InputError, "n_ctx=4", "at most 2"),
    Case(
        "whose activations are asked for", lambda w: w.small.generate_with_cache([[1, 2, 3]], 2, **QUIET), InputError,
        "n_ctx=4", "at most 1",
    ),
    Case("nothing to score", lambda w: w.small([[1, 2]], "loss", attention_mask=[[0, 1]]), InputError, "score"),
    Case("an interval of one prompt", lambda w: ONE.bootstrap_ci(), InputError, "two prompts"),
)  # fmt: skip


def _slope(direction: np.ndarray) -> np.ndarray:
    """The gradient of ``(ProjectOut(v)(X) * X).sum()`` by all but ``v``'s first coordinate, at a multiple of E[0]."""
    return -2 * np.einsum("bp,bpd->d", X[..., 0], X[..., 1:]) / np.linalg.norm(direction)
