"""Models on many devices: ``shard``, ``sharding_table`` and ``mesh``."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tljax.checkpoints.layout import flatten, parameter_axes, unflatten
from tljax.checks import is_traced, typed
from tljax.config import HookedTransformerConfig
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionary_params import dictionaries_in, with_dictionaries, without_dictionaries
from tljax.errors import OffloadError, ShardingError
from tljax.offload import abstract, is_offloaded
from tljax.processes import put
from tljax.quantized_weight import CODES, TABLE, QuantizedWeight
from tljax.scale.layout import Placement, lay_out
from tljax.scale.mesh import checked_mesh, make_mesh, mesh_of
from tljax.scale.rules import FEATURE, ShardingRules
from tljax.scale.table import ShardingTable, show_spec
from tljax.typing import Params

if TYPE_CHECKING:
    from tljax.hooks.dictionary import HookDictionary
    from tljax.model.hooked_transformer import HookedTransformer

_BY_FEATURE = ("b_enc", "threshold", "b_gate", "b_mag", "r_mag", "sparsity")
_OTHER = "other"
"""An axis of a dictionary that no rule splits."""


class ShardingMethods:
    """Methods for models on many devices."""

    cfg: HookedTransformerConfig
    params: Params
    _hooks: "HookDictionary"

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters lie on; ``None`` if they are on one device."""
        return mesh_of(self.params)

    @typed
    def shard(self, mesh: Any = None, rules: Any = None, *, n_devices: int | None = None) -> "HookedTransformer":
        """Returns the model with its parameters, and those of spliced dictionaries, spread over a mesh.

        What runs on it follows: activations, caches and gradients lie where XLA computes them, and prompts are spread
        over the mesh's axes ``"data"`` and ``"fsdp"`` where their number divides.

        Args:
            mesh: a ``jax.sharding.Mesh``, such as ``jax.make_mesh((2, 4), ("data", "model"))``.
            rules: which axes are split over which of the mesh's: a :class:`tljax.scale.ShardingRules`, or a mapping
                such as ``{"n_heads": "model"}``. By default what the names of the mesh's axes suggest: ``"model"`` is
                tensor parallel, ``"data"`` data parallel, ``"fsdp"`` fully sharded.
            n_devices: instead of a mesh, how many devices to use, all along ``"model"``.

        Raises:
            ShardingError: there are fewer devices, or mesh and rules do not fit each other.

        >>> from tljax import HookedTransformer, HookedTransformerConfig
        >>> cfg = HookedTransformerConfig(d_model=8, n_heads=2, n_layers=2, n_ctx=6, d_vocab=5)
        >>> HookedTransformer(cfg).shard(n_devices=1).sharding_table()["embed.W_E"].why
        'the model is on one device'
        """
        if mesh is not None and n_devices is not None:
            raise ShardingError("mesh= and n_devices= came together, and each says which devices. Pass one of them.")
        if mesh is None and n_devices is None:
            raise ShardingError("shard() needs a mesh, model.shard(make_mesh(data=2, model=4)), or n_devices=.")
        if is_offloaded(self.params):
            raise OffloadError(
                "The blocks of this model stay on the host (offload='host') and go to one device, so it is not spread "
                "over a mesh. Load it without offload=, or bring its blocks back first: model.offload(None)."
            )
        mesh, rules = checked_mesh(make_mesh(n_devices) if mesh is None else mesh, rules)
        model, axes = cast("HookedTransformer", self), parameter_axes(self.cfg)

        def placed_at(path: str, leaf: Any) -> Any:
            def on_mesh(part: jax.Array, names: tuple[str, ...]) -> jax.Array:
                return put(part, NamedSharding(mesh, lay_out(names, part.shape, rules, mesh.shape).spec))

            if isinstance(leaf, QuantizedWeight):
                return leaf.with_parts(
                    {n: on_mesh(part, leaf.axes_of(n, axes[path])) for n, part in leaf.parts.items()}
                )
            return on_mesh(leaf, axes[path])

        plain = flatten(without_dictionaries(self.params))
        own = unflatten({path: placed_at(path, leaf) for path, leaf in plain.items()})
        placed = {name: _put_dictionary(one, mesh, rules) for name, one in dictionaries_in(self.params).items()}
        hooks = jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec())), self._hooks)
        return model._make(self.cfg, with_dictionaries(own, placed), hooks, model._tokenizer)

    @typed
    def sharding_table(self, rules: Any = None) -> ShardingTable:
        """Returns where every parameter lies and what each device holds of it; prints as a table.

        Args:
            rules: the rules that the model was sharded by, for the reasons in the last column; by default those that
                the names of the mesh's axes suggest.

        Raises:
            ShardingError: no rule says what an axis of the mesh is for; pass ``rules=``.
        """
        mesh, axes = self.mesh, parameter_axes(self.cfg)
        if mesh is not None:
            mesh, rules = checked_mesh(mesh, rules)
        rows = {}
        for path, leaf in flatten(abstract(without_dictionaries(self.params))).items():
            parts = leaf.parts if isinstance(leaf, QuantizedWeight) else {CODES: leaf}
            for name, part in parts.items():
                names = leaf.axes_of(name, axes[path]) if isinstance(leaf, QuantizedWeight) else axes[path]
                rows[path if name == CODES else f"{path}.{name}"] = _where(part, names, mesh, rules)
        for name, dictionary in dictionaries_in(self.params).items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(dictionary):
                rows[f"{name}.{_name(path)}"] = _where(leaf, _axes_of(_name(path), leaf.ndim), mesh, rules)
        ordered = [*axes, *(path for path in rows if path not in axes)]
        return ShardingTable({path: rows[path] for path in ordered}, {} if mesh is None else dict(mesh.shape))


def placed_like(params: Params, before: Params) -> Params:
    """Returns parameters where those of the same paths were, if these lie on a mesh."""
    if mesh_of(before) is None:
        return params
    where = flatten(before)
    return unflatten({path: spread_like(leaf, where[path]) for path, leaf in flatten(params).items()})


def spread_like(weight: Any, before: Any) -> Any:
    """Returns a weight where one of the same shape was, if that lies on a mesh; both may be quantised.

    Of an axis that does not divide in codes or scales each device holds all.
    """
    one = before.codes if isinstance(before, QuantizedWeight) else before
    if is_traced(one) or not isinstance(one, jax.Array):
        return weight
    sharding = one.sharding
    if not isinstance(weight, QuantizedWeight) and not isinstance(before, QuantizedWeight):
        return put(weight, sharding)
    if not isinstance(sharding, NamedSharding):
        return weight

    def placed(part: jax.Array) -> jax.Array:
        spec = [*sharding.spec, *([None] * weight.ndim)][: part.ndim]
        own = [
            over if over is not None and length % math.prod(sharding.mesh.shape[name] for name in _names(over)) == 0
            else None for over, length in zip(spec, part.shape, strict=True)
        ]  # fmt: skip
        return put(part, NamedSharding(sharding.mesh, PartitionSpec(*own)))

    if not isinstance(weight, QuantizedWeight):
        return placed(weight)
    return weight.with_parts({n: part if n == TABLE else placed(part) for n, part in weight.parts.items()})


def _names(over: Any) -> tuple[str, ...]:
    return (over,) if isinstance(over, str) else tuple(over)


def beside(params: Params, dictionaries: Mapping[str, Dictionary]) -> dict[str, Dictionary]:
    """Returns dictionaries on the mesh of the model that they are spliced into, their features over ``"model"``.

    One that lies on several devices already stays there, and so do all if the model is on one device.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return dict(dictionaries)
    rules = ShardingRules.tensor_parallel() if "model" in mesh.shape else ShardingRules({})
    return {
        name: one if mesh_of(one) is not None or is_traced(one) else _put_dictionary(one, mesh, rules)
        for name, one in dictionaries.items()
    }


def _put_dictionary(dictionary: Dictionary, mesh: Mesh, rules: ShardingRules) -> Dictionary:
    def placed_at(path: Any, leaf: jax.Array) -> jax.Array:
        spec = lay_out(_axes_of(_name(path), leaf.ndim), leaf.shape, rules, mesh.shape).spec
        return put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed_at, dictionary)


def _name(path: Any) -> str:
    """Returns the name of an array of a dictionary: ``"W_enc"``, ``"sparsity"``."""
    return str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1])))


def _axes_of(name: str, ndim: int) -> tuple[str, ...]:
    """Returns the axes of an array of a dictionary, of which only features have a rule."""
    place = {"W_enc": ndim - 1, "W_dec": ndim - 2, **dict.fromkeys(_BY_FEATURE, ndim - 1)}.get(name)
    return tuple(FEATURE if number == place else _OTHER for number in range(ndim))


def _where(leaf: Any, axes: tuple[str, ...], mesh: Mesh | None, rules: ShardingRules) -> Placement:
    """Returns where an array lies, and why it is not split where it is not."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Placement(axes, tuple(leaf.shape), PartitionSpec(), 0, "on the host until its block runs")
    if mesh is None or not isinstance(leaf, jax.Array) or is_traced(leaf):
        return Placement(axes, tuple(leaf.shape), PartitionSpec(), leaf.nbytes, "the model is on one device")
    said = lay_out(axes, leaf.shape, rules, mesh.shape, leaf.dtype)
    own = leaf.sharding.shard_shape(leaf.shape)
    if own == NamedSharding(mesh, said.spec).shard_shape(leaf.shape):
        return said
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
    size = math.prod(own) * leaf.dtype.itemsize
    return Placement(axes, tuple(leaf.shape), spec, size, f"placed otherwise; these rules say {show_spec(said.spec)}")
