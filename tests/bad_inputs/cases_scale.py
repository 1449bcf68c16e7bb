"""Many devices: meshes, rules and numbers of devices that do not fit each other or this machine."""

import jax
import numpy as np
from jax.sharding import Mesh
from table import Case, World

from tljax import HookedTransformer
from tljax.dictionaries.training import TrainingConfig, train_dictionary
from tljax.errors import InputError, ShardingError
from tljax.scale import ShardingRules, connect, lay_out, make_mesh


def mesh(*names: str) -> Mesh:
    """One device, with axes of these names."""
    return Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(names)), names)


def load(**options: object) -> HookedTransformer:
    return HookedTransformer.from_pretrained("tljax-tiny", **options)  # type: ignore[arg-type]


def train(**options: object) -> object:
    cfg = TrainingConfig(architecture="topk", d_in=4, d_sae=8, k=2)
    return train_dictionary(cfg, np.ones((8, 4), np.float32), steps=1, batch_size=4, **options)  # type: ignore[arg-type]


TENSOR, KV = ShardingRules.tensor_parallel(), ("d_model", "n_kv", "d_head")

CASES: tuple[Case, ...] = (
    Case("a mesh of another name", lambda w: w.small.shard(mesh("heads")), ShardingError, "'heads'", "rules="),
    Case("a misspelt name", lambda w: w.small.shard(mesh("modle")), ShardingError, "Did you mean 'model'"),
    Case("the same, at loading", lambda w: load(mesh=mesh("tp")), ShardingError, "'tp'", "'model' (tensor parallel)"),
    Case(
        "rules for another mesh", lambda w: w.small.shard(mesh("data"), ShardingRules.tensor_parallel()), ShardingError,
        "'model'", "the mesh has 'data'",
    ),
    Case(
        "a rule for a misspelt axis of the mesh", lambda w: w.small.shard(mesh("model"), {"n_heads": "modle"}),
        ShardingError, "n_heads", "'modle'", "Did you mean 'model'",
    ),
    Case(
        "a rule for an axis of another mesh, at loading",
        lambda w: load(mesh=mesh("data", "model"), rules={"d_mlp": "fsdp"}), ShardingError,
        "d_mlp", "'fsdp'", "the mesh has 'data', 'model'",
    ),
    Case("more devices than there are", lambda w: load(n_devices=4096), ShardingError, "4096", "device_count=4096"),
    Case("the same, of a model", lambda w: w.small.shard(n_devices=4096), ShardingError, "4096 devices", "XLA_FLAGS"),
    Case("no device", lambda w: load(n_devices=0), ShardingError, "positive"),
    Case("a mesh by name", lambda w: w.small.shard("model"), ShardingError, "mesh is a str", "make_mesh(4)"),
    Case("a number as a mesh", lambda w: load(mesh=4), ShardingError, "mesh is a int", "jax.make_mesh"),
    Case("no mesh", lambda w: w.small.shard(), ShardingError, "make_mesh(data=2, model=4)", "n_devices="),
    Case("mesh and devices", lambda w: w.small.shard(mesh("model"), n_devices=2), ShardingError, "one of them"),
    Case("mesh and device", lambda w: load(mesh=mesh("model"), device="cpu"), InputError, "device= and mesh="),
    Case("a process without a number", lambda w: connect("here:1", 2), ShardingError, "all three", "none where jax"),
    Case("processes counted from one", lambda w: connect("here:1", 2, 2), ShardingError, "process=2", "from 0"),
    Case("a coordinator without a port", lambda w: connect("here", 2, 1), ShardingError, "'here'", "10.0.0.1:1234"),
    Case("no time to wait", lambda w: connect("here:1", 2, 1, timeout=0), ShardingError, "timeout=0", "such as 120"),
    Case("training on a number", lambda w: train(mesh=4), ShardingError, "mesh is a int", "make_mesh(4)"),
    Case("training on a mesh of another name", lambda w: train(mesh=mesh("batch")), ShardingError, "'batch'"),
    Case(
        "parts in a flag", lambda w: w.small.save_pretrained("no", in_parts="yes"), InputError, "in_parts",
        "True or False",
    ),
    Case("rules alone", lambda w: load(rules={"n_heads": "model"}), InputError, "mesh= or n_devices="),
    Case("an axis no parameter has", lambda w: ShardingRules({"heads": "model"}), ShardingError, "'heads'", "n_heads"),
    Case("positions", lambda w: ShardingRules({"pos": "data"}), ShardingError, "called 'pos'"),
    Case("prompts over the model's axis", lambda w: ShardingRules({"batch": "model"}), ShardingError, "'data'"),
    Case("rules in a list", lambda w: w.small.shard(mesh("model"), ["n_heads"]), ShardingError, "list", "mapping"),
    Case("a rule that is a number", lambda w: ShardingRules({"n_heads": 0}), ShardingError, "'n_heads'", "tuple"),
    Case("two ways to make a mesh", lambda w: make_mesh(2, model=2), ShardingError, "make_mesh(4)"),
    Case("devices along an axis", lambda w: make_mesh(model=0), ShardingError, "model=0", "positive"),
    Case(
        "key and value heads that do not divide", lambda w: tuple(lay_out(KV, (8, 2, 4), TENSOR, {"model": 4}).spec),
        equals=(None, None, None),
    ),
    Case(
        "the same, told in the table", lambda w: lay_out(KV, (8, 2, 4), TENSOR, {"model": 4}).why,
        equals="n_kv=2 does not divide by model=4",
    ),
    Case(
        "a mesh of one device", lambda w: w.small.shard(mesh("model"))(np.array([[1, 2, 3]])),
        equals=lambda w: w.small(np.array([[1, 2, 3]])),
    ),
    Case("one device", lambda w: World.config().d_model and load(n_devices=1).mesh is None, equals=True),
)  # fmt: skip
