"""Blocks on the host: options that are not, and what needs all blocks at once."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from table import Case, World

from tljax import Add, HookedTransformer
from tljax.circuits import Circuit, ResidualGraph, faithfulness
from tljax.errors import InputError, OffloadError
from tljax.scale import make_mesh


def load(**options: object) -> HookedTransformer:
    return HookedTransformer.from_pretrained("tljax-tiny", **options)  # type: ignore[arg-type]


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("model",))


def held(world: World) -> HookedTransformer:
    return world.small.offload("host")


def loss(model: HookedTransformer, vector: object) -> jax.Array:
    return model.run_with_hooks(T, "loss", fwd_hooks=[("blocks.0.hook_resid_pre", Add(vector))])


def whole(world: World) -> object:
    """The faithfulness of the whole model as a circuit."""
    graph = ResidualGraph.of(world.small)
    return faithfulness(held(world), Circuit(graph.edges, graph), T, T[:, ::-1].copy(), lambda logits: logits[:, -1, 3])


T = np.array([[1, 2, 3]], np.int32)
V = np.ones(8, np.float32)

CASES: tuple[Case, ...] = (
    Case("the disk", lambda w: load(offload="disk"), InputError, "offload='disk'", "'host'"),
    Case("a misspelt host", lambda w: load(offload="hots"), InputError, "offload='hots'", "'host'"),
    Case("a flag", lambda w: load(offload=True), InputError, "offload=True", "'host'"),
    Case("a misspelt option", lambda w: load(ofload="host"), InputError, "'ofload'", "'offload'"),
    Case("a model to the disk", lambda w: w.small.offload("disk"), InputError, "offload='disk'", "'host'"),
    Case("a mesh", lambda w: load(offload="host", mesh=mesh()), OffloadError, "mesh=", "one of the two"),
    Case(
        "a place for each parameter", lambda w: load(offload="host", device=lambda path, shape: None), OffloadError,
        "device=", "go to one device",
    ),
    Case("sharding it", lambda w: held(w).shard(make_mesh(1)), OffloadError, "not spread over a mesh", "offload(None)"),
    Case("processing it", lambda w: held(w).process_weights(fold_ln=True), OffloadError, "from_pretrained(..., off"),
    Case("another dtype", lambda w: held(w).to("bfloat16"), OffloadError, "dtype='bfloat16'", "offload='host'"),
    Case("a jit of the model", lambda w: jax.jit(lambda m: m(T))(held(w)), OffloadError, "jax.jit", "offload(None)"),
    Case("a jit around it", lambda w: jax.jit(held(w).__call__)(T), OffloadError, "Leave that jit out"),
    Case("a loop around it", lambda w: jax.lax.map(held(w).__call__, T[None]), OffloadError, "jax.lax loop"),
    Case(
        "gradients of its parameters", lambda w: jax.grad(lambda m: m(T, "loss"))(held(w)), OffloadError, "jax.grad",
        "run_with_grads",
    ),
    Case("a tree map over it", lambda w: jax.tree.map(jnp.zeros_like, held(w)), OffloadError, "jax.tree.map"),
    Case("a device_put of it", lambda w: jax.device_put(held(w)), OffloadError, "model.to(device)"),
    Case(
        "forward mode", lambda w: jax.jvp(lambda v: loss(held(w), v), (V,), (V,)), OffloadError, "run_with_jvp",
        "offload(None)",
    ),
    Case("offloading under jit", lambda w: jax.jit(lambda m: m.offload("host")(T))(w.small), OffloadError, "outside"),
    Case("offloading within jit", lambda w: jax.jit(lambda t: held(w)(t))(T), OffloadError, "outside jax.jit"),
    Case("a copy", lambda w: copy.deepcopy(held(w)), OffloadError, "neither copied nor pickled"),
    Case("a circuit", whole, OffloadError, "all of them at once", "offload(None)"),
    Case("ungrouped heads", lambda w: held(w).set_ungroup_grouped_query_attention(True), OffloadError, "first: model"),
    Case("the same numbers", lambda w: load(offload="host")(w.P), equals=lambda w: w.tiny(w.P)),
    Case(
        "gradients in it", lambda w: jax.grad(lambda v: loss(held(w), v))(jnp.asarray(V)),
        equals=lambda w: jax.grad(lambda v: loss(w.small, v))(jnp.asarray(V)),
    ),
    Case("twice", lambda w: held(w).offload("host").offload(None)(T), equals=lambda w: w.small(T)),
)  # fmt: skip
