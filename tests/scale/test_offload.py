"""A model whose blocks stay on the host equals the resident one, and its device never holds more than two of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sharded_child import CHECKS, METRIC, MODEL, TOKENS, farthest

import tljax.forward.stages as stages
from tljax import Add, HookedTransformer
from tljax.errors import CheckpointError
from tljax.fingerprint import fingerprint_of
from tljax.harvest import harvest
from tljax.offload import HostBlocks

LOSS_AFTER = ("resid_pre", 1)


@pytest.fixture(scope="module")
def offloaded() -> HookedTransformer:
    return MODEL.offload("host")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint with a file for each block, and one for the rest."""
    MODEL.save_hf(tmp_path)
    whole, weight_map = load_file(tmp_path / "model.safetensors"), {}
    for name in whole:
        part = name.split(".")[2] if ".layers." in name else "rest"
        weight_map[name] = f"{part}.safetensors"
    for file in set(weight_map.values()):
        save_file({name: whole[name] for name, own in weight_map.items() if own == file}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of -inf in masked scores, subtracted
@pytest.mark.parametrize("name", ["everything", "python_hooks", "a_sweep", "dictionaries", "a_harvest", "a_lens"])
def test_blocks_on_the_host_compute_the_same_bits(name: str, offloaded: HookedTransformer) -> None:
    assert farthest(CHECKS[name](MODEL), CHECKS[name](offloaded)) == 0


def test_generation_chooses_the_same_tokens(offloaded: HookedTransformer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "stop_at_eos": False}
    np.testing.assert_array_equal(offloaded.generate(TOKENS, **options), MODEL.generate(TOKENS, **options))


def test_gradients_place_blocks_again(offloaded: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = METRIC
    theirs = MODEL.run_with_grads(TOKENS, metric, ["z0", "resid_pre1"])
    placed = placements(monkeypatch)
    ours = offloaded.run_with_grads(TOKENS, metric, ["z0", "resid_pre1"])
    assert placed == [0, 1, 1, 0]
    assert farthest(dict(theirs.grads.items()), dict(ours.grads.items())) <= 1e-6
    assert farthest(theirs.value, ours.value) <= 1e-6

    def loss(model: HookedTransformer, vector: jax.Array) -> jax.Array:
        return model.run_with_hooks(TOKENS, "loss", fwd_hooks=[(LOSS_AFTER, Add(vector))])

    vectors = jnp.ones((2, 16), jnp.float32)
    each = [
        jax.vmap(jax.grad(lambda vector, model=model: loss(model, vector)))(vectors) for model in (MODEL, offloaded)
    ]
    assert farthest(*each) <= 1e-6
    moves = {LOSS_AFTER: np.ones(16, np.float32)}
    assert farthest(MODEL.run_with_jvp(TOKENS, moves).tangent, offloaded.run_with_jvp(TOKENS, moves).tangent) <= 1e-6
    backward = [
        model.run_with_cache(TOKENS, incl_bwd=True, names_filter="z0", return_type="loss")[1]
        for model in (MODEL, offloaded)
    ]
    assert farthest(*(dict(cache.items()) for cache in backward)) <= 1e-6


def placements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the layers that are placed from now on."""
    seen, place = [], HostBlocks.place

    def recorded(self: HostBlocks, layer: int, alone: bool = False) -> Any:
        seen.append(layer)
        return place(self, layer, alone)

    monkeypatch.setattr(HostBlocks, "place", recorded)
    return seen


def test_the_next_block_is_placed_while_this_one_runs(
    offloaded: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Program i is started, the stream that entered it awaited, block i + 1 placed, and only then i's result needed."""
    events: list[tuple[str, Any]] = []
    place, run, wait = HostBlocks.place, stages._apply_compiled, jax.block_until_ready

    def placed(self: HostBlocks, layer: int, alone: bool = False) -> Any:
        events.append(("place", layer))
        return place(self, layer, alone)

    def ran(*arguments: Any) -> Any:
        result = run(*arguments)
        events.append(("run", (id(arguments[4][0]), id(result[0]))))
        return result

    def waited(value: Any) -> Any:
        events.append(("wait", id(value)))
        return wait(value)

    monkeypatch.setattr(HostBlocks, "place", placed)
    monkeypatch.setattr(stages, "_apply_compiled", ran)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    _, cache = offloaded.run_with_cache(TOKENS, stop_at_layer=2)  # the cache keeps every stream, so ids stay apart
    assert [kind for kind, _ in events] == ["run", "place", "run", "wait", "place", "run"]
    (_, embedded), (entered, left) = events[0][1], events[2][1]
    assert entered == embedded == events[3][1] != left
    assert [number for kind, number in events if kind == "place"] == [0, 1]
    assert len(cache) > 0


def test_a_run_reads_no_block_that_it_does_not_reach(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    resident = HookedTransformer.from_pretrained(directory)
    model = HookedTransformer.from_pretrained(directory, offload="host")
    assert model.offloaded == "host"
    assert farthest(model(TOKENS), resident(TOKENS)) == 0
    assert farthest(model.run_with_hooks(TOKENS, fwd_hooks=[("z1", Add(1.0))])[0], resident.W_U) > 0
    (directory / "1.safetensors").rename(directory / "elsewhere")
    assert farthest(model(TOKENS, stop_at_layer=1), resident(TOKENS, stop_at_layer=1)) == 0
    store = harvest(model, TOKENS, ["resid_pre1"], tmp_path_factory.mktemp("store"), dtype="float32", progress=False)
    stream = resident(TOKENS, stop_at_layer=1)
    np.testing.assert_array_equal(np.asarray(store["blocks.1.hook_resid_pre"][:]), np.asarray(stream).reshape(-1, 16))
    with pytest.raises(CheckpointError, match=r"1\.safetensors.*Block 1 stays in the checkpoint"):
        model(TOKENS)
    (directory / "elsewhere").rename(directory / "1.safetensors")
    assert farthest(model(TOKENS), resident(TOKENS)) == 0
    changed = {name: array * 2 for name, array in load_file(directory / "1.safetensors").items()}
    save_file(changed, directory / "1.safetensors")
    os.utime(directory / "1.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="has changed since the model was loaded"):
        model(TOKENS)


def test_a_fingerprint_reads_the_first_block_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = HookedTransformer.from_pretrained(directory)
    model = HookedTransformer.from_pretrained(directory, offload="host")
    read = []
    original = model.params["blocks"].read
    monkeypatch.setattr(model.params["blocks"], "read", lambda layer: read.append(layer) or original(layer))
    own = fingerprint_of(model)
    assert fingerprint_of(model) == own
    assert read == [0]
    assert not own.differences(fingerprint_of(resident))
    assert not fingerprint_of(resident).differences(own)
    assert not own.differences_of_stream(fingerprint_of(resident))
    assert not own.differences(type(own).from_dict(json.loads(json.dumps(own.to_dict()))))
    for layer, same in ((0, False), (1, True)):  # the second was not read, so nothing is known of it
        block = jax.tree.map(lambda leaf: leaf * 1.5, resident.params["blocks"][layer])
        blocks = tuple(block if n == layer else one for n, one in enumerate(resident.params["blocks"]))
        tuned = resident.replace(params={**resident.params, "blocks": blocks})
        assert bool(own.differences(fingerprint_of(tuned))) is not same
        assert fingerprint_of(resident).differences(fingerprint_of(tuned))
        assert bool(fingerprint_of(resident.offload("host")).differences(fingerprint_of(tuned)))


def test_weights_and_parts_are_read_by_name(offloaded: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    np.testing.assert_array_equal(offloaded.W_Q, MODEL.W_Q)
    assert offloaded.n_params_total == MODEL.n_params_total
    assert offloaded.sharding_table()["blocks.1.mlp.W_in"].why == "on the host until its block runs"
    seen = placements(monkeypatch)
    np.testing.assert_array_equal(offloaded.blocks[1].mlp.W_in, MODEL.blocks[1].mlp.W_in)
    assert seen == [1]
    assert len(offloaded.blocks) == 2
    assert farthest(offloaded.offload(None).params, MODEL.params) == 0


CHILD = """
import gc, sys
import quick_compiling
import jax, numpy as np
from tljax import HookedTransformer, HookedTransformerConfig
from tljax.offload import HostBlocks
from tljax.patching import LogitDiff, sweep

assert jax.device_count() == 2
drawn = HookedTransformer(HookedTransformerConfig(d_model=16, n_heads=2, n_layers=5, n_ctx=8, d_vocab=16))
drawn.save_pretrained(sys.argv[1])
model = HookedTransformer.from_pretrained(sys.argv[1], offload="host", device="cpu:0")
held = drawn.to("cpu:1").offload("host").to("cpu:0")
shape, most = drawn.params["blocks"][0]["mlp"]["W_in"].shape, 0
tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
other = tokens[:, ::-1].copy()
del drawn
gc.collect()

def count():
    global most
    here = [a for a in jax.live_arrays() if a.shape == shape and a.devices() == {jax.devices()[0]}]
    most = max(most, len(here))

place = HostBlocks.place
def counted(self, layer, alone=False):
    placed = place(self, layer, alone)
    assert placed["mlp"]["W_in"].devices() == {jax.devices()[0]}
    count()
    return placed
HostBlocks.place = counted

hooks = [(lambda name: name.endswith("hook_resid_mid"), lambda x, hook: count())]
metric = LogitDiff(np.array([1, 2]), np.array([3, 4]))
runs = {
    "hooks": lambda m: m.run_with_hooks(tokens, fwd_hooks=hooks),
    "sweep": lambda m: sweep(m, tokens, other, metric, "resid_pre", progress=False),
    "generate": lambda m: m.generate(tokens, max_new_tokens=2, do_sample=False, verbose=False, stop_at_eos=False),
    "gradients": lambda m: m.run_with_grads(tokens, metric, ["z0"]),
}
for name, run in runs.items():
    for one in (model, held) if name == "hooks" else (model,):
        most = 0
        run(one)
        print(name, most)
"""


def test_the_device_holds_two_blocks_at_most(tmp_path: Path) -> None:
    """Blocks come from files, or from the memory of another (fake) device, to the one that runs."""
    here = Path(__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = [line.split() for line in done.stdout.splitlines()]
    assert len(counts) == 5
    assert all(1 <= int(most) <= 2 for _, most in counts), counts
