"""RelP: what the rules of layer-wise relevance propagation change in the backward pass.

Jafari et al. 2025 (RelP, arXiv 2508.21258); the rules are those of Achtibat et al. 2024 (AttnLRP).
"""

from tljax.attribution.backward import Activation, BlockRule
from tljax.attribution.options import RelP
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.hooks.points import block_points

_CONSTANT = ("mlp.hook_expert_weights", "mlp.hook_shared_gate")


def relevance_rules(cfg: HookedTransformerConfig, rule: RelP) -> dict[int, BlockRule]:
    """Returns what RelP changes in each block.

    Raises:
        InputError: a gate is clipped, for which there is no rule.
    """
    if cfg.swiglu_limit is not None:
        raise InputError(
            f"RelP has no rule for gates that are clipped (swiglu_limit={cfg.swiglu_limit}): leave rule='relp' out, or "
            "use rule='atp*'."
        )
    frozen = ("attn.hook_pattern",) if rule.freeze_pattern else ()
    rules = {}
    for layer, kind in enumerate(cfg.layer_kinds):
        names = [point.name for point in block_points(cfg, kind)]
        constants = [name for name in names if name.endswith(".hook_scale") or name in (*_CONSTANT, *frozen)]
        rules[layer] = BlockRule(tuple(constants), tuple(_activations(cfg, names)))
    return rules


def _activations(cfg: HookedTransformerConfig, names: list[str]) -> list[Activation]:
    assert cfg.attn_only or cfg.act_fn is not None
    found = []
    for pre in names:
        owner, _, last = pre.rpartition(".")
        if last == "hook_pre":
            linear = f"{owner}.hook_pre_linear"
            post = f"{owner}.hook_mid" if f"{owner}.hook_mid" in names else f"{owner}.hook_post"
            found.append(Activation(pre, post, cfg.act_fn or "", linear if linear in names else None))
    return found
