"""Every accepted spelling of a hook name, and what is said of the others."""

from typing import Any

import numpy as np
import pytest
from variants import TOKENS, build

from tljax import HookPoint, Zero, get_act_name
from tljax.errors import UnknownHookError
from tljax.hooks.names import resolve, select
from tljax.hooks.points import point_table


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("embed",), "hook_embed"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("resid_post", 2), "blocks.2.hook_resid_post"),
        (("resid_pre11",), "blocks.11.hook_resid_pre"),
        (("attn", 3), "blocks.3.attn.hook_pattern"),
        (("attn_logits", 3), "blocks.3.attn.hook_attn_scores"),
        (("key", 1), "blocks.1.attn.hook_k"),
        (("query", 1), "blocks.1.attn.hook_q"),
        (("value", 1), "blocks.1.attn.hook_v"),
        (("mlp_pre", 1), "blocks.1.mlp.hook_pre"),
        (("mlp_post", 1), "blocks.1.mlp.hook_post"),
        (("pre_linear", 1), "blocks.1.mlp.hook_pre_linear"),
        (("rot_k", 1), "blocks.1.attn.hook_rot_k"),
        (("normalized",), "ln_final.hook_normalized"),
        (("scale",), "ln_final.hook_scale"),
        (("blocks.3.attn.hook_z",), "blocks.3.attn.hook_z"),
        (("hook_embed",), "hook_embed"),
        (("q", 0, "attn"), "blocks.0.attn.hook_q"),
    ],
)
def test_get_act_name(arguments: tuple, name: str) -> None:
    assert get_act_name(*arguments) == name


SPELLINGS: dict[Any, str] = {
    "q0": "blocks.0.attn.hook_q",
    ("pattern", 1): "blocks.1.attn.hook_pattern",
    ("pattern", -1): "blocks.1.attn.hook_pattern",
    ("resid_post", -2): "blocks.0.hook_resid_post",
    "blocks.-1.hook_resid_pre": "blocks.1.hook_resid_pre",
    ("scale", 1, "ln1"): "blocks.1.ln1.hook_scale",
    ("normalized", None): "ln_final.hook_normalized",
    "blocks.1.attn.hook_attn": "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_out": "blocks.1.hook_attn_out",
    "blocks.1.mlp.hook_out": "blocks.1.hook_mlp_out",
    "blocks.1.mlp.hook_in": "blocks.1.mlp.hook_in",
    "blocks.1.hook_in": "blocks.1.hook_resid_pre",
    "blocks.1.hook_out": "blocks.1.hook_resid_post",
    "blocks.-1.hook_out": "blocks.1.hook_resid_post",
    "blocks.1.attn.q.hook_out": "blocks.1.attn.hook_q",
    "blocks.1.attn.k.hook_out": "blocks.1.attn.hook_k",
    "blocks.1.attn.v.hook_out": "blocks.1.attn.hook_v",
    "blocks.1.attn.o.hook_in": "blocks.1.attn.hook_z",
    "blocks.1.ln2.hook_in": "blocks.1.hook_resid_mid",
    "blocks.1.mlp.in.hook_out": "blocks.1.mlp.hook_pre",
    "blocks.1.mlp.out.hook_in": "blocks.1.mlp.hook_post",
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_spellings(spelling: Any) -> None:
    model = build("gpt2")
    name = SPELLINGS[spelling]
    assert resolve(spelling, point_table(model.cfg), 2) == name
    assert list(model.run_with_cache(TOKENS, names_filter=spelling, return_type=None)[1]) == [name]
    assert list(model.add_hook(spelling, Zero()).list_hooks()) == [name]


def test_gated_mlp_spellings() -> None:
    table = point_table(build("llama").cfg)
    assert resolve("blocks.0.mlp.gate.hook_out", table, 2) == "blocks.0.mlp.hook_pre"
    assert resolve("blocks.0.mlp.in.hook_out", table, 2) == "blocks.0.mlp.hook_pre_linear"


def test_filters() -> None:
    table = point_table(build("gpt2").cfg)
    everything = select(None, table, 2)
    assert everything == tuple(name for name, spec in table.items() if not spec.optional)
    assert select(["z1", ("z", 0), "hook_embed"], table, 2) == (
        "hook_embed",
        "blocks.0.attn.hook_z",
        "blocks.1.attn.hook_z",
    )
    assert select(("hook_embed", "hook_pos_embed"), table, 2) == ("hook_embed", "hook_pos_embed")
    assert select(lambda name: name.endswith("resid_pre"), table, 2) == (
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_pre",
    )
    assert select(["z1", lambda name: name == "hook_embed"], table, 2) == ("hook_embed", "blocks.1.attn.hook_z")
    assert select(("z", np.int64(1)), table, 2) == ("blocks.1.attn.hook_z",)


def test_a_hook_point_names_itself() -> None:
    model = build("gpt2")
    point = model.hook_points()[5]
    assert list(model.add_hook(point, Zero()).list_hooks()) == [point.name]
    assert list(model.add_hook(HookPoint(point.name), Zero()).list_hooks()) == [point.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "blocks.0.hook_resid_pots",
            "'blocks.0.hook_resid_pots' is not a hook point of this model. Did you mean 'blocks.0.hook_resid_post'",
        ),
        ("blocks.0.mlp.hook_pre_linear", "Did you mean 'blocks.0.mlp.hook_pre'"),
        ("blocks.2.attn.hook_z", "The model has 2 layers, numbered 0 to 1"),
        (("z", 2), "The model has 2 layers"),
        (("z", -3), "The model has 2 layers"),
        ("blocks.0.attn.W_Q", "W_Q is a weight"),
        (5, "A hook name is a string"),
        (lambda name: False, "The filter matches no hook point"),
        (["hook_embed", "hook_embedd"], "Did you mean 'hook_embed'"),
    ],
)
def test_unknown_names(name: Any, message: str) -> None:
    with pytest.raises(UnknownHookError, match=message):
        select(name, point_table(build("gpt2").cfg), 2)


def test_a_filter_that_only_matches_optional_points_says_so() -> None:
    with pytest.raises(UnknownHookError, match="hook_result"):
        select(lambda name: name.endswith("hook_result"), point_table(build("gpt2").cfg), 2)
