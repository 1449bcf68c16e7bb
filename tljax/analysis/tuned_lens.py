"""The tuned lens (Belrose et al. 2023): affine maps from each layer to the final residual stream, trained by optax."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tljax.analysis.lens_basis import LensBasis, load_lens, save_lens
from tljax.analysis.logit_lens import StreamLens, stream_name
from tljax.checks import typed
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.losses import divergences, log_probabilities
from tljax.modules.readout import Readout, by_positions
from tljax.numerics import widened
from tljax.progress import Progress
from tljax.text.batch import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TunedLens:
    """Affine maps ``h + h @ weight + bias``, one for the input of each layer; a pytree.

    Attributes:
        weight: ``[layer, d_model, d_model]``.
        bias: ``[layer, d_model]``.
        losses: mean KL divergence of each layer's distribution from the model's at each training step, in nats,
            ``[step, layer]``.
        basis: the residual stream that the lens was fitted on.
    """

    weight: Float[Array, "layer d_model d_model"]
    bias: Float[Array, "layer d_model"]
    losses: Float[Array, "step layer"]
    basis: LensBasis = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"TunedLens of {self.basis.model_name!r}, {self.basis.n_layers} layers, {len(self.losses)} steps"

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths this lens reads: the input of each layer, and the final stream, unmapped."""
        return tuple(range(self.basis.n_layers + 1))

    def check(self, model: HookedTransformer) -> None:
        """Raises InputError if the lens was not fitted on this model's residual stream."""
        self.basis.check(model)

    def carry(self, stack: jax.Array, depths: Sequence[int]) -> jax.Array:
        """Maps vectors ``[depth, ..., d_model]`` to a prediction of the final stream, each by its depth's map."""
        rows = zip(stack, depths, strict=True)
        return jnp.stack(
            [row if n == self.basis.n_layers else _translated(row, self.weight[n], self.bias[n]) for row, n in rows]
        )

    @classmethod
    @typed
    def fit(
        cls,
        model: HookedTransformer,
        prompts: Any,
        *,
        steps: int = 250,
        batch_size: int = 8,
        optimizer: optax.GradientTransformation | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> "TunedLens":
        """Trains the maps so that each layer's distribution comes close to the model's own (KL divergence).

        The maps start at zero, that is, as the logit lens. The model runs once for each step and keeps one activation
        for each layer; gradients go through the final norm and the unembedding only.

        Args:
            model: the model.
            prompts: texts, token ids ``[batch, pos]`` or a ``Batch``: text of the kind the lens is to read, thousands
                of tokens or more.
            steps: optimiser steps; batches are drawn in random order, every prompt once before any repeats.
            batch_size: prompts per step.
            optimizer: an optax optimiser; by default Adam at 1e-3, falling linearly to 0, gradients clipped to norm 1.
            seed: random seed for the order of prompts.
            progress: whether to show a progress bar; ``None`` shows one after three seconds.

        Raises:
            InputError: ``steps`` or ``batch_size`` below 1.
        """
        if steps < 1 or batch_size < 1:
            raise InputError(f"steps={steps} and batch_size={batch_size} must be at least 1.")
        cfg = model.cfg
        optimizer = optimizer or optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-3, 0.0, steps))
        )
        wide = widened(model.W_U.dtype)
        maps = (
            jnp.zeros((cfg.n_layers, cfg.d_model, cfg.d_model), wide),
            jnp.zeros((cfg.n_layers, cfg.d_model), wide),
        )
        state = optimizer.init(maps)
        readout = Readout.of(cfg, model.params)
        losses = []
        with Progress(steps, progress, "tuned lens", "step") as bar:
            for batch in _batches(model.to_batch(prompts), steps, batch_size, seed):
                streams, final = _streams(model, batch)
                maps, state, loss = _step(maps, state, streams, final, batch.mask, readout, optimizer=optimizer)
                losses.append(loss)
                bar.advance(1)
        return cls(weight=maps[0], bias=maps[1], losses=jnp.stack(losses), basis=LensBasis.of(model))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the lens as one safetensors file."""
        arrays = {"weight": self.weight, "bias": self.bias, "losses": self.losses}
        save_lens(path, "tuned", arrays, self.basis, {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TunedLens":
        """Reads a lens that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or something else.
        """

        def shapes(basis: LensBasis, _: Any) -> dict[str, tuple[int | None, ...]]:
            layers, width = basis.n_layers, basis.d_model
            return {"weight": (layers, width, width), "bias": (layers, width), "losses": (None, layers)}

        arrays, basis, _ = load_lens(path, "tuned", {}, shapes)
        return cls(**arrays, basis=basis)


@typed
def lens_divergence(
    model: HookedTransformer, prompts: Any, lens: StreamLens | None = None, batch_size: int = 8
) -> Float[Array, " layer"]:
    """Computes the mean divergence of each layer's distribution from the model's own; a perfect lens has 0.

    Args:
        model: the model.
        prompts: texts, token ids or a ``Batch``; not those that the lens was fitted on.
        lens: a ``TunedLens`` or a ``JacobianLens``; ``None`` means the plain logit lens.
        batch_size: prompts in one run.

    Returns:
        KL divergence (model || lens) in nats, averaged over all tokens, ``[layer]``: one for each of ``lens.depths``
        except the final stream.
    """
    cfg = model.cfg
    if lens is not None:
        lens.check(model)
    depths = tuple(n for n in (range(cfg.n_layers) if lens is None else lens.depths) if n < cfg.n_layers)
    whole = model.to_batch(prompts)
    total, count = jnp.zeros(len(depths)), 0.0
    for start in range(0, len(whole), batch_size):
        batch = _rows(whole, np.arange(start, min(start + batch_size, len(whole))))
        streams, final = _streams(model, batch)
        streams = streams[jnp.asarray(depths)]
        carried = streams if lens is None else lens.carry(streams, depths)
        n = float(batch.mask.sum())
        divergence = _evaluate(carried, final, batch.mask, Readout.of(cfg, model.params))
        total, count = total + n * divergence, count + n
    return total / count


def _batches(whole: Batch, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yields batches of equal size in random order, every prompt once before any repeats."""
    generator = np.random.default_rng(seed)
    size = min(batch_size, len(whole))
    order = np.zeros(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, generator.permutation(len(whole))])
        yield _rows(whole, order[:size])
        order = order[size:]


def _rows(whole: Batch, rows: np.ndarray) -> Batch:
    return dataclasses.replace(whole, tokens=whole.tokens[rows], mask=whole.mask[rows], positions=whole.positions[rows])


def _streams(model: HookedTransformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the input of each layer ``[layer, batch, pos, d_model]``, and the final stream."""
    names = [stream_name(model.cfg, n) for n in range(model.cfg.n_layers + 1)]
    _, cache = model.run_with_cache(batch, return_type=None, names_filter=names)
    return jnp.stack([cache[name] for name in names[:-1]]), cache[names[-1]]


def _translated(vectors: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    mapped = jnp.matmul(vectors.astype(weight.dtype), weight, precision="highest")
    return (vectors + (mapped + bias.reshape((1,) * (vectors.ndim - 1) + bias.shape)).astype(vectors.dtype)).astype(
        vectors.dtype
    )


def _divergences(carried: jax.Array, final: jax.Array, mask: jax.Array, readout: Readout) -> Float[Array, " layer"]:
    """Computes KL(distribution of ``final`` || that of ``carried``) of each layer, mean over ``mask``'s tokens."""
    each = by_positions(_divergences_of_layers, readout, final, jnp.moveaxis(carried, 0, 2), n_logits=2)
    return jnp.where(mask[..., None], each, 0).sum((0, 1)) / mask.sum(dtype=each.dtype)


def _divergences_of_layers(readout: Readout, final: jax.Array, carried: jax.Array) -> jax.Array:
    """Computes ``[batch, pos, layer]`` of the final stream and ``[batch, pos, layer, d_model]``."""
    wanted = log_probabilities(readout.logits(final))

    @jax.checkpoint
    def one_layer(stream: jax.Array) -> jax.Array:
        return divergences(wanted, log_probabilities(readout.logits(stream)))

    return jnp.moveaxis(jax.lax.map(one_layer, jnp.moveaxis(carried, 2, 0)), 0, 2)


@functools.partial(jax.jit, static_argnames="optimizer")
def _step(
    maps: Any,
    state: Any,
    streams: jax.Array,
    final: jax.Array,
    mask: jax.Array,
    readout: Readout,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, Any, jax.Array]:
    def loss(maps: Any) -> tuple[jax.Array, jax.Array]:
        each = _divergences(jax.vmap(_translated)(streams, *maps), final, mask, readout)
        return each.sum(), each

    gradient, each = jax.grad(loss, has_aux=True)(maps)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, state = optimizer.update(gradient, state, maps)
    return optax.apply_updates(maps, updates), state, each


_evaluate = jax.jit(_divergences)
