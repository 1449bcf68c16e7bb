"""Names of TransformerLens and torch that are not here: an AttributeError that says what is."""

import copy
import pickle
from typing import Any

import jax
import pytest

import tljax
from tljax import FactoredMatrix, HookedTransformer, HookPoint, elsewhere, utils
from tljax.errors import MissingAttributeError


@pytest.fixture(scope="module")
def owners() -> dict[str, Any]:
    model = HookedTransformer.from_pretrained("tljax-tiny")
    _, cache = model.run_with_cache([[1, 2]], names_filter="hook_embed")
    return {
        "model": model, "cache": cache, "f": model.QK, "cfg": model.cfg, "hook": HookPoint("hook_embed"),
        "tljax": tljax, "utils": utils,
    }  # fmt: skip


@pytest.mark.parametrize("owner", elsewhere.ALL)
def test_every_name_says_what_instead(owner: str, owners: dict[str, Any]) -> None:
    for name, instead in elsewhere.ALL[owner].items():
        assert not hasattr(owners[owner], name)
        assert getattr(owners[owner], name, 3) == 3
        with pytest.raises(MissingAttributeError) as caught:
            getattr(owners[owner], name)
        assert str(caught.value).endswith(f" has no {name}: {instead}.")
        assert caught.value.name == name


@pytest.mark.parametrize(
    ("owner", "name", "near"),
    [("model", "run_with_cahe", "run_with_cache"), ("cache", "stack_heads", "stack_head_results"),
     ("f", "eigenvalue", "eigenvalues"), ("cfg", "n_layer", "n_layers"), ("hook", "layers", "layer"),
     ("tljax", "HookedTransfomer", "HookedTransformer"),
     ("utils", "get_act_nam", "get_act_name")],
)  # fmt: skip
def test_a_misspelt_name_has_its_nearest(owner: str, name: str, near: str, owners: dict[str, Any]) -> None:
    with pytest.raises(MissingAttributeError, match=f"has no attribute '{name}'. Did you mean .*{near}"):
        getattr(owners[owner], name)


def test_a_property_that_fails_says_its_own_reason() -> None:
    class Broken(FactoredMatrix):
        @property
        def inner(self) -> int:
            raise AttributeError("the real reason")

    with pytest.raises(AttributeError, match="the real reason"):
        _ = Broken([[1.0]], [[1.0]]).inner


def test_copies_pickles_and_pytrees_are_as_before(owners: dict[str, Any]) -> None:
    cfg, matrix = owners["cfg"], owners["f"]
    assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == cfg
    assert jax.jit(lambda f: f)(matrix).shape == copy.copy(matrix).shape
    assert matrix.mT.shape == matrix.T.shape


def test_rooms_are_reached_through_the_package() -> None:
    assert tljax.patching.sweep is not None
    assert tljax.analysis.__name__ == "tljax.analysis"
    assert {"patching", "HookedTransformer"} <= set(dir(tljax))


def test_points_are_not_parts_of_a_view(owners: dict[str, Any]) -> None:
    with pytest.raises(MissingAttributeError, match=r"add_hook\('blocks.1.attn.hook_z', hook\)"):
        _ = owners["model"].blocks[1].attn.hook_z
