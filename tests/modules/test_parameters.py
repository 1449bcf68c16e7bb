"""Every parameter's axes are declared once, where it is made; shapes, counts and FLOPs follow from that."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from hf_models import VARIANTS as FAMILIES
from hf_models import hf_config
from variants import BASE, VARIANTS

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.checkpoints.families import family_of
from tljax.checkpoints.layout import flatten, parameter_axes, parameter_shapes
from tljax.checkpoints.rows import bind
from tljax.modules.parameters import axis_sizes
from tljax.modules.stack import init_params
from tljax.patching.engine.report import block_flops, block_flops_per_token

KEYS_AND_VALUES = {"W_K", "W_V", "W_KV_down", "W_K_rot", "W_K_up", "W_V_up"}


def check_one_declaration(cfg: HookedTransformerConfig) -> None:
    """Holds axes, shapes, counts and FLOPs of a config to the tree of its parameters."""
    tree = {path: leaf.shape for path, leaf in flatten(jax.eval_shape(lambda: init_params(cfg))).items()}
    axes, sizes = parameter_axes(cfg), axis_sizes(cfg)
    assert axes.keys() == tree.keys()
    assert {path: tuple(sizes[axis] for axis in names) for path, names in axes.items()} == tree
    assert parameter_shapes(cfg) == tree

    matrices = {path: math.prod(shape) for path, shape in tree.items() if path.startswith("blocks.") and ".W_" in path}
    assert cfg.n_params == sum(matrices.values())
    read_later = sum(size for path, size in matrices.items() if path.rpartition(".")[2] in KEYS_AND_VALUES)
    share = (cfg.experts_per_token or 0) / (cfg.num_experts or 1)
    met = sum(size * share if ".experts." in path else size for path, size in matrices.items())
    layers = max(cfg.n_layers, 1)
    assert block_flops_per_token(cfg) == pytest.approx(2 * met / layers, abs=2)
    assert block_flops(cfg, 1, 0, 0, 0, 0) == pytest.approx(2 * read_later / layers, abs=1)


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_kind_of_model_is_described_once(kind: str) -> None:
    check_one_declaration(HookedTransformerConfig(**(BASE | VARIANTS[kind])))


MORE: dict[str, dict[str, Any]] = {
    "shortformer": {"positional_embedding_type": "shortformer"},
    "narrow_embedding": {"d_embed": 6, "normalization_type": None},
    "norms_of_heads": {**VARIANTS["qk_norm"], "qk_norm_span": "per_head", "use_attention_sinks": True},
    "biased_experts": VARIANTS["moe"] | {"expert_biases": True, "router": "sigmoid", "moe_layers": None},
    "no_layers": {"n_layers": 0},
}


@pytest.mark.parametrize("kind", MORE)
def test_what_else_adds_parameters(kind: str) -> None:
    check_one_declaration(HookedTransformerConfig(**(BASE | MORE[kind])))


def test_every_family_is_described_once() -> None:
    """One checkpoint of each set of parameters that families fill."""
    seen = set()
    for variant in FAMILIES:
        attributes = hf_config(variant).to_dict()
        family = family_of(attributes)
        hf = family.config(attributes)
        cfg = family.read_config(hf)
        filled = frozenset(path for entry in bind(family.rows(hf), 1) for path in entry.targets)
        if filled not in seen:
            seen.add(filled)
            check_one_declaration(cfg)


def test_axes_are_known_before_the_vocabulary() -> None:
    unknown = HookedTransformerConfig(**(BASE | {"d_vocab": -1, "dtype": "float64"}))
    assert parameter_axes(unknown) == parameter_axes(HookedTransformerConfig(**BASE))


def test_a_mesh_of_the_user_s_does_not_take_axis_names_for_its_own() -> None:
    cfg = HookedTransformerConfig(**(BASE | {"n_layers": 1}))
    expected = HookedTransformer(cfg).params
    enter = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # the older name, in jax 0.7
    with enter(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))):
        drawn = HookedTransformer(cfg.replace(seed=0)).params
        logits = HookedTransformer(cfg, params=drawn)(np.array([[1, 2]]))
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)
    assert np.isfinite(logits).all()
