"""Rows of mixtures of experts, and what their configs share."""

import dataclasses
from collections.abc import Iterable, Sequence

from tljax.checkpoints.families.llama import BLOCK
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

MLP = "blocks.{l}.mlp"


def one_by_one(key: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> list[Row]:
    """Returns the rows of experts that are stored one by one; ``key`` is the mixture's name.

    The same experts may also be stored as transformers 5 holds them: in one tensor, with gate and input side by side.
    """
    each = f"{key}.experts.{{e}}"
    together = f"{BLOCK}.mlp.experts"
    return [
        Row(f"{each}.{gate}.weight", "n_experts d_expert d_model", f"{MLP}.experts.W_gate"),
        Row(f"{each}.{up}.weight", "n_experts d_expert d_model", f"{MLP}.experts.W_in"),
        Row(f"{each}.{down}.weight", "n_experts d_model d_expert", f"{MLP}.experts.W_out"),
        *(dataclasses.replace(row, other=True) for row in in_one(f"{together}.gate_up_proj", f"{together}.down_proj")),
    ]


def in_one(gate_up: str, down: str) -> list[Row]:
    """Returns the rows of experts stored together: gate and input side by side in one tensor, and the output."""
    return [
        Row(gate_up, "n_experts (2 d_expert) d_model", f"{MLP}.experts.W_gate|W_in"),
        Row(down, "n_experts d_model d_expert", f"{MLP}.experts.W_out"),
    ]


def router(key: str, *, aka: str | None = None) -> Row:
    """Returns the row of a router's weight."""
    return Row(key, "n_experts d_model", f"{MLP}.W_router", aka=aka)


def shared(key: str) -> list[Row]:
    """Returns the rows of the expert that all tokens share."""
    return [
        Row(f"{key}.gate_proj.weight", "d_shared d_model", f"{MLP}.shared.W_gate"),
        Row(f"{key}.up_proj.weight", "d_shared d_model", f"{MLP}.shared.W_in"),
        Row(f"{key}.down_proj.weight", "d_model d_shared", f"{MLP}.shared.W_out"),
    ]


def known_as(row: Row, name: str) -> Row:
    """Returns ``row`` with another name for the same tensor."""
    return dataclasses.replace(row, aka=name)


def in_layers(rows: Iterable[Row], layers: Sequence[int]) -> list[Row]:
    """Returns ``rows`` for these layers only."""
    return [dataclasses.replace(row, layers=tuple(layers)) for row in rows]


def sparse_layers(hf: HFConfig) -> tuple[bool, ...]:
    """Returns which layers have experts, by ``decoder_sparse_step`` and ``mlp_only_layers``."""
    step, dense = hf("decoder_sparse_step", 1), hf("mlp_only_layers", [])
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(hf("num_hidden_layers")))


def by_layer(sparse: Sequence[bool], experts: Iterable[Row], dense: Iterable[Row]) -> list[Row]:
    """Returns the rows of experts in layers that have them, and those of an MLP in the others."""
    numbers = range(len(sparse))
    return [
        *in_layers(experts, [layer for layer in numbers if sparse[layer]]),
        *in_layers(dense, [layer for layer in numbers if not sparse[layer]]),
    ]


def unless_all(sparse: tuple[bool, ...]) -> tuple[bool, ...] | None:
    """Returns our ``moe_layers``: ``sparse``, or ``None`` if all layers have experts."""
    return None if all(sparse) else sparse


def dense_layers(cfg: HookedTransformerConfig) -> list[int]:
    """Returns the numbers of the layers without experts."""
    return [layer for layer, kind in enumerate(cfg.layer_kinds) if not kind.experts]
