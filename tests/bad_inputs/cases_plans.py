"""Plans of models that are not there, of runs that a model cannot make, on meshes that do not fit."""

from table import Case, World

import tljax
from tljax.errors import ArgumentError, CheckpointError, ConfigError, InputError, ShardingError, UnknownHookError


def _plan(w: World, **options: object) -> object:
    return tljax.plan(w.config(), **{"pos": 4, "memory": 10**12} | options)  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    Case(
        "positions over devices",
        lambda w: _plan(w, mesh_shape={"pos": 4}),
        InputError,
        "do not count positions",
    ),
    Case("a model with a typing error", lambda w: tljax.plan("llama-3.1-80b"), CheckpointError, "llama-3.1-8"),
    Case("a model that is loaded", lambda w: tljax.plan(w.small), InputError, "model.cfg"),
    Case("a directory without a config", lambda w: tljax.plan("/"), CheckpointError, "config.json"),
    Case("a run that does not exist", lambda w: _plan(w, what="gradient"), InputError, "'gradient'", "gradients"),
    Case("a run that does not exist, backwards", lambda w: _plan(w, what="train"), InputError, "'train'", "forward"),
    Case("too many tokens", lambda w: _plan(w, pos=5), InputError, "pos=5", "n_ctx", "pos=4"),
    Case("no room for new tokens", lambda w: _plan(w, what="generate", max_new_tokens=2), InputError, "pos=2"),
    Case("no prompts", lambda w: _plan(w, batch=0), InputError, "batch=0", "at least 1"),
    Case("prompts over too many devices", lambda w: _plan(w, batch=3, mesh_shape=(2, 1)), InputError, "batch=4"),
    Case("a mesh that divides nothing", lambda w: _plan(w, mesh_shape=7), InputError, "divides no axis", "n_heads=2"),
    Case("a mesh with another name", lambda w: _plan(w, mesh_shape={"modle": 2}), ShardingError, "'modle'", "'model'"),
    Case("a mesh of no devices", lambda w: _plan(w, mesh_shape=0), InputError, "mesh_shape['model']=0"),
    Case("a mesh without names", lambda w: _plan(w, mesh_shape={2: 2}), InputError, "axis 2", "'model'"),
    Case("devices said twice", lambda w: _plan(w, mesh_shape=2, n_devices=2), InputError, "give one of them"),
    Case("no devices", lambda w: _plan(w, n_devices=0), InputError, "n_devices=0", "at least 1"),
    Case(
        "rules of another mesh",
        lambda w: _plan(w, mesh_shape={"model": 2}, rules={"n_heads": "heads"}),
        ShardingError,
        "'heads'",
        "'model'",
    ),
    Case("a negative length", lambda w: _plan(w, pos=-1), InputError, "pos=-1", "at least 1"),
    Case("a mesh of three axes", lambda w: _plan(w, mesh_shape=(1, 2, 2)), InputError, "(data, model)"),
    Case("remat of a forward pass", lambda w: _plan(w, remat=True), InputError, "gradients"),
    Case("points of a forward pass", lambda w: _plan(w, names_filter="z0"), InputError, 'what="cache"'),
    Case("a harvest that stops", lambda w: _plan(w, what="harvest", stop_at_layer=1), InputError, "last point"),
    Case("a point that does not exist", lambda w: _plan(w, what="cache", names_filter="z9"), UnknownHookError, "z9"),
    Case("an unknown dtype", lambda w: _plan(w, dtype="float17"), ConfigError, "float16"),
    Case("no memory", lambda w: _plan(w, memory=0), InputError, "memory=0"),
    Case("a misspelt option", lambda w: _plan(w, mesh=2), ArgumentError, "mesh_shape"),
)
