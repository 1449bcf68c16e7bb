"""Loading onto a mesh holds the parameters and little else: peak memory of a child process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

WIDTH, NEURONS, LAYERS, VOCABULARY = 1024, 2816, 2, 8000

CHILD = """
import ctypes, gc, sys
from pathlib import Path
import jax
from tljax.checkpoints import load_checkpoint
from tljax.scale import make_mesh

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

def load(**options):
    return jax.tree.leaves(load_checkpoint(sys.argv[1], mesh=make_mesh(8), **steps, **options).params)

processed = sys.argv[2] == "processed"
steps = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), processed)
jax.block_until_ready(jax.numpy.ones(8))
if processed:  # the compiler's memory is not the load's: its programs are the same for one layer
    load(first_n_layers=1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
before = resident("VmRSS")
leaves = load()
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(resident("VmHWM") - before, held, max(leaf.nbytes for leaf in leaves))
"""


def write_checkpoint(directory: Path) -> None:
    """A Llama of 180 MB."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    shapes["model.norm.weight"] = (WIDTH,)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": (NEURONS, WIDTH) for name in ("gate", "up")}
        shapes[f"{start}.mlp.down_proj.weight"] = (WIDTH, NEURONS)
        shapes |= {f"{start}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    tensors = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
        "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "max_position_embeddings": 64, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    write_checkpoint(directory)
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
@pytest.mark.parametrize("weights", ["unprocessed", "processed"])
def test_a_load_holds_the_parameters_and_one_tensor(checkpoint: Path, weights: str) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # so that what is freed is not counted
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(checkpoint), weights],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    peak, held, largest = map(int, done.stdout.split())
    assert held > 150e6  # nothing but the norms is on all eight devices
    assert peak < 1.1 * held + largest
