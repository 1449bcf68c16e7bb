"""Shared fixtures: strict numerics, a compilation counter, tiny models, the bundled model."""

import jax
import jax.monitoring
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_COMPILED = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration: float, **_: object) -> None:
    global _count
    _count += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_listen)


class CompileCounter:
    """Counts XLA compilations since it was made."""

    def __init__(self) -> None:
        self._start = _count

    @property
    def count(self) -> int:
        return _count - self._start


@pytest.fixture
def compilations() -> CompileCounter:
    """A counter that starts at zero."""
    return CompileCounter()


CONFIGS = {
    "gpt2": {"act_fn": "gelu_new"},
    "neox": {
        "act_fn": "gelu", "positional_embedding_type": "rotary", "rotary_dim": 4, "parallel_attn_mlp": True,
    },
    "llama": {
        "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "positional_embedding_type": "rotary",
        "n_key_value_heads": 2,
    },
}  # fmt: skip


def randomised(model: HookedTransformer, seed: int = 0) -> HookedTransformer:
    """The model with every parameter random, norms and biases included: at 1 and 0 they would hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.Array) -> jax.Array:
        weight = "'w'" in str(path[-1])
        return jax.numpy.asarray((0.3 * rng.standard_normal(leaf.shape) + weight).astype(leaf.dtype))

    return model.replace(params=jax.tree_util.tree_map_with_path(draw, model.params))


def make_model(kind: str = "gpt2", **changes: object) -> HookedTransformer:
    """A tiny random model of a kind of ``CONFIGS``."""
    fields = {"d_model": 16, "n_layers": 3, "n_heads": 4, "d_head": 8, "n_ctx": 12, "d_vocab": 13} | CONFIGS[kind]
    return randomised(HookedTransformer(HookedTransformerConfig(**(fields | changes))))


@pytest.fixture(scope="session", params=list(CONFIGS))
def any_model(request: pytest.FixtureRequest) -> HookedTransformer:
    """A tiny model of each kind."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def model() -> HookedTransformer:
    """A tiny GPT-2-like model."""
    return make_model("gpt2")


@pytest.fixture(scope="session")
def tokens() -> jax.Array:
    """Two prompts of six tokens, ids below 13."""
    return jax.numpy.asarray(np.random.default_rng(1).integers(0, 13, (2, 6)), jax.numpy.int32)


@pytest.fixture(scope="session")
def tiny() -> HookedTransformer:
    """The bundled trained model."""
    return HookedTransformer.from_pretrained("tljax-tiny")
