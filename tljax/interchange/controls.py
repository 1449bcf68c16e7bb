"""Controls of interchanges: what the same fit finds where there is nothing to find, and what a direction is read by."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.errors import InputError
from tljax.hooks.interchanges import orthonormal
from tljax.hooks.names import ActName, resolve
from tljax.hooks.points import layer_of, point_table
from tljax.interchange.baselines import principal
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.stack import init_params

Control = Literal["placebo", "labels", "random_model"]
CONTROLS: tuple[Control, ...] = get_args(Control)

_NO_DIRECTION = 1e-4
"""Length of a unit column's part in a space below which the part counts as rounding."""


@typed
def reinitialized(model: HookedTransformer, seed: int = 0) -> HookedTransformer:
    """Returns the same architecture with fresh random weights, which has learned nothing.

    Args:
        model: the model.
        seed: seed of the weights.
    """
    cfg = model.cfg.replace(init_weights=True, model_name=f"{model.cfg.model_name} (random weights)")
    return model.replace(cfg=cfg, params=init_params(cfg, seed))


@typed
def reader_matrix(model: HookedTransformer, hook_name: ActName, head: int | None = None) -> jnp.ndarray:
    """Returns the matrix that reads an activation, ``[d, d_model]``: ``W_out`` of neurons, ``W_O`` of a head's ``z``.

    Args:
        model: the model.
        hook_name: ``mlp.hook_post`` or ``attn.hook_z`` of a layer.
        head: the head, for ``z``.

    Raises:
        InputError: another activation, which several matrices read.
    """
    name = resolve(hook_name, point_table(model.cfg), model.cfg.n_layers)
    layer = layer_of(name)
    if layer is not None and name.endswith(".mlp.hook_post"):
        return model.blocks[layer].mlp.W_out
    if layer is not None and name.endswith(".attn.hook_z"):
        if head is None:
            raise InputError(f"{name} has a matrix W_O for each head: say which with head=.")
        return model.blocks[layer].attn.W_O[head]
    raise InputError(
        f"No single matrix reads {name}. Give the one that you mean, [d, n], such as model.W_Q[layer, head] of a head "
        "that reads the residual stream."
    )


@typed
def split_by_reader(basis: Any, reader: Any, tolerance: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """Splits a subspace by what a matrix reads of it (Makelov et al. 2023).

    A direction that works only through its part in the reader's null space works through something that the model does
    not
    use: the interchange made it. Interchange with each part alone and compare.

    Args:
        basis: orthonormal columns ``[d, k]``.
        reader: the matrix that reads the activation, ``[d, n]``: :func:`reader_matrix`.
        tolerance: singular values below this share of the largest count as zero.

    Returns:
        Orthonormal bases of the projections of the subspace on what the reader sees, ``[d, up to k]``, and on its null
        space, ``[d, up to k]``.

    Raises:
        InputError: sizes that do not fit.
        InterventionError: columns that are not orthonormal.
    """
    columns = np.asarray(orthonormal(basis, "split_by_reader"), np.float64)
    matrix = np.asarray(reader, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != columns.shape[0]:
        raise InputError(
            f"The reader has shape {matrix.shape}; the basis has {columns.shape[0]} rows. Give the matrix that "
            "multiplies the activation from the right, [d, n]."
        )
    left, sizes, _ = np.linalg.svd(matrix, full_matrices=False)
    seen = left[:, sizes > tolerance * sizes.max(initial=0.0)]
    read = seen @ (seen.T @ columns)
    return _span(read), _span(columns - read)


def _span(vectors: np.ndarray) -> np.ndarray:
    columns, sizes = principal(vectors.T, vectors.shape[1])
    return columns[:, sizes > _NO_DIRECTION]
