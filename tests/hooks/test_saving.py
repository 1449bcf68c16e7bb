"""Interventions on disk."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax import HookedTransformer, Intervention
from tljax.errors import CheckpointError, InterventionError

NAME = "blocks.1.attn.hook_z"
HOOKS = [
    (NAME, tljax.Replace(jnp.arange(8.0), pos=3, head=[0, 2])),
    (NAME, tljax.Chain(tljax.Zero(head=slice(1, 3)), tljax.Scale(2.0, mask=np.ones((4, 8), bool)))),
    ("blocks.0.hook_resid_post", tljax.Mean(over=("batch", "pos"), d_model=np.arange(16) < 4)),
    ("blocks.0.hook_resid_post", tljax.ProjectOut(np.ones((2, 16)) + np.eye(2, 16), pos=-1)),
    ("blocks.0.hook_mlp_out", tljax.Noise(0.5, seed=3)),
]


def test_saved_interventions_do_the_same(model: HookedTransformer, tokens: jax.Array, tmp_path: Path) -> None:
    path = tmp_path / "hooks.safetensors"
    tljax.save_interventions(HOOKS, path)
    loaded = tljax.load_interventions(path)
    assert [name for name, _ in loaded] == [name for name, _ in HOOKS]
    assert jax.tree.structure([hook for _, hook in loaded]) == jax.tree.structure([hook for _, hook in HOOKS])
    expected = model.run_with_hooks(tokens, fwd_hooks=HOOKS)
    np.testing.assert_array_equal(model.run_with_hooks(tokens, fwd_hooks=loaded), expected)


def test_mistakes(tmp_path: Path) -> None:
    class Own(Intervention):
        pass

    with pytest.raises(InterventionError, match="Own is not one of tljax's interventions"):
        tljax.save_interventions([(NAME, Own())], tmp_path / "x")
    with pytest.raises(InterventionError, match="Only hooks at a name"):
        tljax.save_interventions([(lambda name: True, tljax.Zero())], tmp_path / "x")  # type: ignore[list-item]
    with pytest.raises(CheckpointError, match="There is no file"):
        tljax.load_interventions(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="damaged"):
        tljax.load_interventions(tmp_path / "bad")
