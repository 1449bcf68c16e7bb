"""``ShardingRules``: which named axes of a model's arrays are split over which axes of a mesh."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from tljax.config import HookedTransformerConfig
from tljax.errors import ShardingError, nearest
from tljax.modules.parameters import axis_sizes

BATCH, POS, FEATURE = "batch", "pos", "feature"
"""Axes of arrays that are no parameters of the model: prompts, their positions, and features of a dictionary."""

DATA_AXES = ("data", "fsdp")
"""Mesh axes that prompts are spread over."""

POS_AXIS = "pos"
"""Mesh axis that the positions of prompts are spread over."""

_TENSOR = ("n_heads", "n_kv", "d_mlp", "n_experts", "d_expert", "d_shared", "d_vocab", "d_vocab_out", FEATURE)
"""Axes that a tensor-parallel model splits: what is computed along them needs one sum at the end, if any."""

_FULLY = ("d_model", "d_embed", "q_rank", "kv_rank")
"""Axes that fully sharded parameters are split along: almost every matrix has one of them."""


@functools.cache
def known_axes() -> tuple[str, ...]:
    """Returns the axes that a rule may name: those of parameters, then ``"batch"``, ``"pos"`` and ``"feature"``."""
    smallest = HookedTransformerConfig(d_model=1, n_layers=1, n_ctx=1, d_head=1, n_heads=1, act_fn="relu")
    return (*axis_sizes(smallest), BATCH, POS, FEATURE)


@dataclasses.dataclass(frozen=True, init=False)
class ShardingRules:
    """Rules that split named axes over the axes of a mesh; an axis without a rule is whole on every device.

    Axes are those that parameters declare (``n_heads``, ``n_kv``, ``d_mlp``, ``n_experts``, ``d_vocab``, ``d_model``,
    …: :func:`tljax.modules.parameters.axis_sizes`), ``batch`` (prompts), ``pos`` (positions of long prompts) and
    ``feature`` (of spliced dictionaries). One array uses each axis of the mesh once, for the first of its own axes that
    has a rule and a length that divides.
    Ready-made rules add up: ``ShardingRules.tensor_parallel() | ShardingRules.fsdp()``.

    Args:
        rules: axis → name of a mesh axis, or several of them, tried in that order.

    Attributes:
        rules: pairs of an axis and the mesh axes that it is split over.

    Raises:
        ShardingError: an axis that no parameter has, or prompts over a mesh axis that is not for them.

    >>> rules = ShardingRules({"n_heads": "model", "d_mlp": "model"})
    >>> rules["n_heads"], rules["d_model"]
    (('model',), ())
    >>> (ShardingRules.tensor_parallel() | ShardingRules.fsdp()).mesh_axes
    ('model', 'data')
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, rules: "Mapping[str, Any] | ShardingRules") -> None:
        if isinstance(rules, ShardingRules):
            pairs = rules.rules
        elif isinstance(rules, Mapping):
            pairs = tuple((name, _mesh_axes(name, over)) for name, over in rules.items())
        else:
            raise ShardingError(
                f"rules is a {type(rules).__name__}; expected a mapping from axes to mesh axes such as "
                '{"n_heads": "model"}, or ready-made rules such as ShardingRules.tensor_parallel().'
            )
        object.__setattr__(self, "rules", pairs)
        for name, over in self.rules:
            _check_rule(name, over)

    @classmethod
    def tensor_parallel(cls, over: str = "model") -> "ShardingRules":
        """Heads, neurons, experts, vocabulary and features over one mesh axis (Shoeybi et al. 2019, Megatron-LM)."""
        return cls(dict.fromkeys(_TENSOR, over))

    @classmethod
    def data_parallel(cls, over: str = "data") -> "ShardingRules":
        """Prompts over one mesh axis; every device holds all parameters."""
        return cls({BATCH: over})

    @classmethod
    def fsdp(cls, over: str = "data") -> "ShardingRules":
        """Prompts and parameters over one mesh axis; a matrix is gathered while it is used (Zhao et al. 2023)."""
        return cls(dict.fromkeys((BATCH, *_FULLY), over))

    @classmethod
    def for_mesh(cls, mesh_axes: Iterable[str]) -> "ShardingRules":
        """Returns the rules that the names of a mesh's axes suggest.

        Args:
            mesh_axes: ``"model"`` is tensor parallel, ``"data"`` data parallel, ``"fsdp"`` fully sharded,
                ``"pos"`` splits positions of prompts.

        Raises:
            ShardingError: another name.
        """
        made = {
            "model": cls.tensor_parallel(),
            "data": cls.data_parallel(),
            "fsdp": cls.fsdp("fsdp"),
            POS_AXIS: cls({POS: POS_AXIS}),
        }
        names = tuple(mesh_axes)
        if unknown := [name for name in names if name not in made]:
            raise ShardingError(
                f"The mesh has an axis {unknown[0]!r}, and no rule says what it is for.{nearest(unknown[0], made)} "
                "Call it 'model' (tensor parallel), 'data' (data parallel), 'fsdp' (fully sharded) or 'pos' (positions "
                "of prompts), or pass rules= "
                f"such as ShardingRules.tensor_parallel({unknown[0]!r})."
            )
        return functools.reduce(operator.or_, (made[name] for name in names), cls({}))

    def __or__(self, other: "ShardingRules") -> "ShardingRules":
        """Returns both sets of rules; an axis that has a rule in both goes over the mesh axes of both."""
        axes = dict.fromkeys(name for name, _ in (*self.rules, *other.rules))
        return ShardingRules({name: tuple(dict.fromkeys((*self[name], *other[name]))) for name in axes})

    def __getitem__(self, axis: str) -> tuple[str, ...]:
        """Returns the mesh axes that an axis is split over, in the order in which they are tried."""
        return dict(self.rules).get(axis, ())

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The mesh axes that the rules name."""
        return tuple(dict.fromkeys(name for _, over in self.rules for name in over))

    def check(self, mesh_axes: Iterable[str]) -> None:
        """Raises ShardingError if a rule names an axis that the mesh does not have."""
        there = tuple(mesh_axes)
        for name, over in self.rules:
            for wanted in over:
                if wanted not in there:
                    raise ShardingError(
                        f"The rules split {name} over the mesh axis {wanted!r}, and the mesh has "
                        f"{', '.join(map(repr, there))}.{nearest(wanted, there)} Name the mesh's axes as the rules do, "
                        "or pass rules= for this mesh."
                    )


def _mesh_axes(name: str, over: Any) -> tuple[str, ...]:
    names = (over,) if isinstance(over, str) else tuple(over) if isinstance(over, tuple | list) else None
    if names is None or not all(isinstance(one, str) for one in names):
        raise ShardingError(
            f"The rule for {name!r} is {over!r}; expected the name of a mesh axis, 'model', or a tuple of names."
        )
    return names


def _check_rule(name: Any, over: tuple[str, ...]) -> None:
    """Raises ShardingError for an axis that no array has, and for prompts over a mesh axis that is not for them."""
    if name == POS and over != (POS_AXIS,):
        raise ShardingError(
            f"The rules spread positions over the mesh axis {over[0]!r}. Positions go over a mesh axis of their own, "
            f"called {POS_AXIS!r}: make_mesh(pos=2, model=4)."
        )
    if name not in known_axes():
        raise ShardingError(
            f"The rules name an axis {name!r} that no parameter has.{nearest(str(name), known_axes())} Axes are "
            f"{', '.join(known_axes())}."
        )
    if name == BATCH and not set(over) <= set(DATA_AXES):
        raise ShardingError(
            f"The rules spread prompts over the mesh axis {over[0]!r}. Prompts go over mesh axes called "
            f"{' and '.join(map(repr, DATA_AXES))}: call that axis of the mesh 'data'."
        )
