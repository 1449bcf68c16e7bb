"""Eight fake CPU devices: a model split along heads and a batch split along prompts give the same logits."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from variants import build, TOKENS
import tljax

assert jax.device_count() == 8
model = build("gpt2")
tokens = np.tile(TOKENS, (2, 1))
plain = np.asarray(model(tokens))
mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def place(path, leaf):
    name = path[-1].key
    spec = {"W_Q": P(None, "heads"), "W_K": P(None, "heads"), "W_V": P(None, "heads"), "W_O": P("heads"),
            "b_Q": P("heads"), "b_K": P("heads"), "b_V": P("heads"), "W_in": P(None, "heads"), "b_in": P("heads"),
            "W_out": P("heads")}.get(name, P())
    return jax.device_put(leaf, NamedSharding(mesh, spec))

sharded = model.replace(params=jax.tree_util.tree_map_with_path(place, model.params))
spread = jax.device_put(tokens, NamedSharding(mesh, P("data")))
logits, cache = sharded.run_with_cache(spread)
assert len(logits.sharding.device_set) == 8
assert not cache["z", 0].sharding.is_fully_replicated
np.testing.assert_allclose(logits, plain, atol=2e-5)
np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(sharded, spread), plain, atol=2e-5)
hook = ("z0", tljax.Zero(head=3, pos=2))
expected = model.run_with_hooks(tokens, fwd_hooks=[hook])
np.testing.assert_allclose(sharded.run_with_hooks(spread, fwd_hooks=[hook]), expected, atol=2e-5)
closure = ("z0", lambda x, hook: x.at[:, 2, 3].set(0))
np.testing.assert_allclose(sharded.run_with_hooks(spread, fwd_hooks=[closure]), expected, atol=2e-5)
replicated = model.to(NamedSharding(mesh, P()))
np.testing.assert_allclose(replicated(spread), plain, atol=2e-5)
fifth = model.to("cpu:5")
assert fifth.W_E.devices() == {jax.devices("cpu")[5]}
np.testing.assert_allclose(fifth(tokens), plain, atol=2e-5)
_, cache = fifth.run_with_cache(tokens, device="cpu:2", names_filter="z0")
assert cache["z0"].devices() == {jax.devices("cpu")[2]}
"""


def test_sharded_model_equals_plain_model() -> None:
    root = Path(__file__).parent
    paths = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": paths,
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
