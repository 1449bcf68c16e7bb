"""The Jacobian lens (Gurnee et al. 2026): each layer's mean effect on the final stream, from the model's own gradients.

Let ``V`` be the positions of a prompt that count. The matrix of layer ``l`` is the mean over prompts of
``1/|V| * sum over t, t' in V, t' >= t of d final[t'] / d resid_post[l, t]``: the summed effect of a small change at a
position on the final stream there and later. The lens of a vector ``h`` is the logit lens of ``matrix @ h``.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tljax import checks
from tljax.analysis.lens_basis import LensBasis, load_lens, save_lens
from tljax.analysis.logit_lens import stream_name
from tljax.cache.attribution import logit_directions, token_ids
from tljax.checks import typed
from tljax.errors import InputError
from tljax.hooks.interventions import Add
from tljax.model.hooked_transformer import HookedTransformer
from tljax.progress import Progress
from tljax.sizes import prompt_length
from tljax.text.batch import Batch
from tljax.text.warned import level_of_caller


class ShortPromptWarning(UserWarning):
    """Warning of prompts that are left out because they have no positions that count."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class JacobianLens:
    """Mean Jacobians of the final residual stream with respect to each layer's output; a pytree.

    Attributes:
        matrices: ``[layer, d_model, d_model]``; ``matrices[n] @ h`` maps outputs of ``layers[n]`` to the final stream.
        layers: the layers whose outputs the lens reads.
        n_prompts: number of prompts averaged.
        skip_first_positions: number of leading positions of each prompt left out.
        basis: the residual stream that the lens was fitted on.
    """

    matrices: Float[Array, "layer d_model d_model"]
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_prompts: int = dataclasses.field(metadata={"static": True})
    skip_first_positions: int = dataclasses.field(metadata={"static": True})
    basis: LensBasis = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"JacobianLens of {self.basis.model_name!r}, layers {list(self.layers)}, {self.n_prompts} prompts"

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths this lens reads: ``n + 1`` for each of its layers ``n``, and the final stream, unmapped."""
        return (*(layer + 1 for layer in self.layers), self.basis.n_layers)

    def check(self, model: HookedTransformer) -> None:
        """Raises InputError if the lens was not fitted on this model's residual stream."""
        self.basis.check(model)

    def carry(self, stack: jax.Array, depths: Sequence[int]) -> jax.Array:
        """Maps ``[depth, ..., d_model]`` to their mean effect on the final stream, each row by its depth's matrix."""
        rows = zip(stack, depths, strict=True)
        return jnp.stack([row if n == self.basis.n_layers else self.transport(row, n - 1) for row, n in rows])

    @typed
    def transport(self, vectors: jax.Array, layer: int) -> jax.Array:
        """Maps outputs of a layer ``[..., d_model]`` to their mean effect on the final stream.

        Raises:
            InputError: the lens has no such layer.
        """
        matrix = self._matrix(layer)
        return jnp.matmul(vectors.astype(matrix.dtype), matrix.T, precision="highest").astype(vectors.dtype)

    def lens_vectors(self, model: HookedTransformer, tokens: Any, layer: int) -> Float[Array, "token d_model"]:
        """Returns the directions in a layer's output that raise tokens' logits, ``W_U[:, token] @ matrix``.

        The final norm's scale is left out; its weight is included unless it is folded into ``W_U``. To steer with a
        direction, add it to ``resid_post`` of the layer: ``tljax.Add(strength * vector)``.

        Args:
            model: the model.
            tokens: a token or a list of them, strings or ids.
            layer: one of ``layers``.
        """
        self.check(model)
        ids = jnp.atleast_1d(token_ids(model, tokens, None)[0])
        return jnp.matmul(logit_directions(model, ids), self._matrix(layer), precision="highest")

    def _matrix(self, layer: int) -> jax.Array:
        if layer not in self.layers:
            raise InputError(f"This lens has no matrix for layer {layer}; it has layers {list(self.layers)}.")
        return self.matrices[self.layers.index(layer)]

    @classmethod
    @typed
    def fit(
        cls,
        model: HookedTransformer,
        prompts: Any,
        *,
        source_layers: Sequence[int] | None = None,
        dim_batch: int = 8,
        batch_size: int = 4,
        max_seq_len: int = 128,
        skip_first_positions: int = 16,
        progress: bool | None = None,
    ) -> "JacobianLens":
        """Averages Jacobians over prompts by reverse-mode differentiation, one pass per dimension of the final stream.

        Each pass yields a row of every layer's matrix, so fitting all layers costs no more than fitting the first.

        Args:
            model: the model.
            prompts: texts, token ids ``[batch, pos]`` or a ``Batch``. The last position of each does not count, nor do
                the first ``skip_first_positions``.
            source_layers: the layers; by default all but the last, whose matrix is the identity.
            dim_batch: how many passes run at once; memory grows with it.
            batch_size: prompts that run at once; memory grows with it.
            max_seq_len: prompts are cut to this many tokens.
            skip_first_positions: number of leading positions to leave out, where attention rests on the first token.
            progress: whether to show a progress bar; ``None`` shows one after three seconds.

        Raises:
            InputError: layers or numbers out of range, or no prompt is long enough.

        Warns:
            ShortPromptWarning: prompts of no more than ``skip_first_positions + 1`` tokens are left out.
        """
        last = model.cfg.n_layers - 1
        layers = (
            tuple(range(last))
            if source_layers is None
            else tuple(checks.whole(n, "source_layers") for n in source_layers)
        )
        if not layers or len(set(layers)) < len(layers) or any(not 0 <= n < last for n in layers):
            raise InputError(
                f"source_layers={list(layers)} must be different layers from 0 to {last - 1}: the output of the last "
                f"layer, {last}, is the final stream itself."
            )
        if skip_first_positions < 0 or min(dim_batch, batch_size, max_seq_len) < 1:
            raise InputError("dim_batch, batch_size and max_seq_len must be at least 1, skip_first_positions 0.")
        rows = _rows(model, prompts, max_seq_len, skip_first_positions)
        alike = model.replace(cfg=model.cfg.computation, tokenizer=None)  # models that compute the same share a program
        total = jnp.zeros((len(layers), model.cfg.d_model, model.cfg.d_model), jnp.float32)
        with Progress(len(rows), progress, "Jacobian lens", "prompt") as bar:
            for start in range(0, len(rows), batch_size):
                batch = _framed(rows[start : start + batch_size], model.cfg.n_ctx)
                total += _jacobians(alike, batch, layers=layers, skip=skip_first_positions, dim_batch=dim_batch)
                bar.advance(len(batch))
        return cls(
            matrices=total / len(rows),
            layers=layers,
            n_prompts=len(rows),
            skip_first_positions=skip_first_positions,
            basis=LensBasis.of(model),
        )

    @classmethod
    def merge(cls, lenses: Iterable["JacobianLens"]) -> "JacobianLens":
        """Combines lenses fitted on different prompts into the lens of all the prompts.

        Raises:
            InputError: no lenses, or lenses of different models, layers or skipped positions.
        """
        lenses = list(lenses)
        if not lenses or any(
            not lens.basis.is_the_same_as(lenses[0].basis)
            or (lens.layers, lens.skip_first_positions) != (lenses[0].layers, lenses[0].skip_first_positions)
            for lens in lenses
        ):
            raise InputError("merge takes one or more lenses of the same model, layers and skip_first_positions.")
        count = sum(lens.n_prompts for lens in lenses)
        weighted = jnp.stack([lens.matrices * (lens.n_prompts / count) for lens in lenses])
        return dataclasses.replace(lenses[0], matrices=weighted.sum(axis=0), n_prompts=count)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the lens as one safetensors file."""
        details = {
            "layers": self.layers,
            "n_prompts": self.n_prompts,
            "skip_first_positions": self.skip_first_positions,
        }
        save_lens(path, "Jacobian", {"matrices": self.matrices}, self.basis, details)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "JacobianLens":
        """Reads a lens that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or something else.
        """

        def shapes(basis: LensBasis, details: Any) -> dict[str, tuple[int | None, ...]]:
            layers, counts = details["layers"], (details["n_prompts"] - 1, details["skip_first_positions"])
            last = basis.n_layers - 1
            if len(set(layers)) < len(layers) or any(not 0 <= n < last for n in layers) or min(counts) < 0:
                raise ValueError(f"a lens of {basis.n_layers} layers cannot have {details}")
            return {"matrices": (len(layers), basis.d_model, basis.d_model)}

        form = {"layers": [int], "n_prompts": int, "skip_first_positions": int}
        arrays, basis, details = load_lens(path, "Jacobian", form, shapes)
        return cls(matrices=arrays["matrices"], basis=basis, layers=tuple(details.pop("layers")), **details)


def _rows(model: HookedTransformer, prompts: Any, max_seq_len: int, skip: int) -> list[np.ndarray]:
    """Returns the prompts' tokens, cut to ``max_seq_len``, without prompts that are too short."""
    whole = model.to_batch(prompts)
    rows = [np.asarray(whole.row(n))[:max_seq_len] for n in range(len(whole))]
    kept = [row for row in rows if len(row) > skip + 1]
    if not kept:
        raise InputError(
            f"No prompt has more than skip_first_positions + 1 = {skip + 1} tokens; the longest has "
            f"{max(map(len, rows))}. Give longer prompts, or skip fewer positions."
        )
    if len(kept) < len(rows):
        warnings.warn(
            f"{len(rows) - len(kept)} of {len(rows)} prompts have no more than {skip + 1} tokens and are left out.",
            ShortPromptWarning,
            stacklevel=level_of_caller(),
        )
    return kept


def _framed(rows: list[np.ndarray], n_ctx: int) -> Batch:
    """Pads prompts to a length that many batches share, so that few lengths are compiled."""
    return Batch.from_rows(rows, width=prompt_length(max(map(len, rows)), n_ctx))


@functools.partial(jax.jit, static_argnames=("layers", "skip", "dim_batch"))
def _jacobians(
    model: HookedTransformer, batch: Batch, *, layers: tuple[int, ...], skip: int, dim_batch: int
) -> Float[Array, "layer d_model d_model"]:
    """Sums the prompts' matrices.

    One change is added at all positions that count, and the mean of the final stream over them is pulled back to it.
    That gives the double sum of the definition, because no position affects earlier ones.
    """
    cfg = model.cfg
    count = batch.mask.sum(axis=1, keepdims=True)
    counts = batch.mask & (batch.positions >= skip) & (batch.positions < count - 1)
    where = counts.astype(model.W_U.dtype)
    share = where / where.sum(axis=1, keepdims=True)
    end = stream_name(cfg, cfg.n_layers)

    def final_sum(change: jax.Array) -> jax.Array:
        hooks = [
            (f"blocks.{layer}.hook_resid_post", Add(where[:, :, None] * change[n][None, None]))
            for n, layer in enumerate(layers)
        ]
        _, cache = model.with_hooks(hooks).run_with_cache(batch, return_type=None, names_filter=end)
        return jnp.einsum("bpd,bp->d", cache[end], share)

    nothing = jnp.zeros((len(layers), cfg.d_model), where.dtype)
    _, pull_back = jax.vjp(final_sum, nothing)
    rows = jax.lax.map(lambda one: pull_back(one)[0], jnp.eye(cfg.d_model, dtype=where.dtype), batch_size=dim_batch)
    return jnp.moveaxis(rows, 1, 0).astype(jnp.float32)
