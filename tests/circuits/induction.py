"""An attention-only model of two layers whose weights are set by hand: it continues ``... a b ... a`` with ``b``.

Head 0 of layer 0 copies each token to the place after it; head 1 of layer 1 looks for the place after the current
token's last occurrence and copies what stands there. The other two heads read tokens and write where nothing reads.
"""

import jax.numpy as jnp
import numpy as np

from tljax import HookedTransformer, HookedTransformerConfig

V, LENGTH = 12, 7
SIZES = (V, V, V, V, LENGTH)
TOKEN, BEFORE, OUT, JUNK, PLACE = (slice(sum(SIZES[:n]), sum(SIZES[: n + 1])) for n in range(5))
CIRCUIT = ("input->a0.h0<v>", "a0.h0->a1.h1<k>", "input->a1.h1<q>", "input->a1.h1<v>", "a1.h1->logits")
"""The edges that the behaviour needs. Where tokens stand is no writer's: both runs have the same positions."""


def induction_model() -> HookedTransformer:
    width = 4 * V + LENGTH
    cfg = HookedTransformerConfig(
        d_model=width, n_heads=2, d_head=V, n_layers=2, n_ctx=LENGTH, d_vocab=V, attn_only=True, normalization_type=None
    )
    rng, eye, sharp = np.random.default_rng(0), np.eye(V), 8.0
    weights = {name: np.zeros((2, 2, *shape)) for name, shape in (
        ("W_Q", (width, V)), ("W_K", (width, V)), ("W_V", (width, V)), ("W_O", (V, width)),
    )}  # fmt: skip
    weights["W_Q"][0, 0, PLACE, :LENGTH] = sharp * np.eye(LENGTH, k=-1)
    weights["W_K"][0, 0, PLACE, :LENGTH] = sharp * np.eye(LENGTH)
    weights["W_V"][0, 0, TOKEN], weights["W_O"][0, 0][:, BEFORE] = eye, eye
    weights["W_Q"][1, 1, TOKEN], weights["W_K"][1, 1, BEFORE] = sharp * eye, sharp * eye
    weights["W_V"][1, 1, TOKEN], weights["W_O"][1, 1][:, OUT] = eye, 6 * eye
    for layer, head in ((0, 1), (1, 0)):
        for name in ("W_Q", "W_K", "W_V"):
            weights[name][layer, head, : 4 * V] = rng.normal(size=(4 * V, V))
        weights["W_O"][layer, head][:, JUNK] = rng.normal(size=(V, V))
    params = HookedTransformer(cfg).params
    params["embed"]["W_E"] = jnp.eye(V, width)
    params["pos_embed"]["W_pos"] = jnp.zeros((LENGTH, width)).at[:, PLACE].set(jnp.eye(LENGTH))
    params["unembed"]["W_U"] = jnp.zeros((width, V)).at[OUT].set(jnp.eye(V))
    for layer, block in enumerate(params["blocks"]):
        for name, value in weights.items():
            ours = value[layer] if name == "W_O" else np.moveaxis(value[layer], 0, 1)  # tljax: [d_model, head, d_head]
            block["attn"][name] = jnp.asarray(ours, jnp.float32)
    return HookedTransformer(cfg).replace(params=params)


def induction_prompts(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns prompts, corrupted prompts and answers: different tokens, of which the last repeats an earlier one."""
    rng = np.random.default_rng(seed)
    both = np.stack([np.stack([rng.permutation(V)[:LENGTH] for _ in range(count)]) for _ in range(2)])
    repeated = rng.integers(1, LENGTH - 2, (2, count))
    both[:, :, -1] = np.take_along_axis(both, repeated[..., None], axis=2)[..., 0]
    answers = np.take_along_axis(both[0], repeated[0][:, None] + 1, axis=1)[:, 0]
    return both[0], both[1], answers
