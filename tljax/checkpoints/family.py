"""Conversion between one Hugging Face architecture and tljax, in both directions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.formats.tower import Tower
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face architecture: how to convert its config and tensors to tljax's, and back.

    Attributes:
        architecture: class name in config.json's ``architectures``.
        aka: another class name, used by checkpoints that were published with their own code.
        model_type: ``model_type`` in config.json.
        read_config: HF config → ours; it must read every attribute that changes the model's outputs.
        write_config: our config, and which biases are not all zero (such as ``"attn.b_Q"``) → HF config.
        rows: HF config → the table.
        prefix: start of the table's keys that a checkpoint may lack (one of the bare model without its head).
        ignored: patterns of stored buffers that are not parameters.
        renamed: pairs of a pattern for the start of a stored name, and the start that the table has instead.
        tower: for a multimodal architecture, how to find the text model's config; all other fields describe that model.
        computed: our config → path → function that computes a parameter that is not stored.
        defaults: values that transformers' config class assumes for attributes that config.json lacks: all sizes, and
            those that differ from the default of a shared reader. Callers cannot ignore these attributes.
        aliases: other name → name, as in the class's ``attribute_map``.
        inert: reason → names, separated by spaces, of attributes that do not change this family's logits.
        own_code: pattern of the module names of the publishers' own code, from before transformers had the class.
    """

    architecture: str
    model_type: str
    read_config: Callable[[HFConfig], HookedTransformerConfig]
    write_config: Callable[[HookedTransformerConfig, frozenset[str]], dict[str, Any]]
    rows: Callable[[HFConfig], Sequence[Row]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    computed: Callable[[HookedTransformerConfig], Mapping[str, Callable[[], np.ndarray]]] = lambda cfg: {}
    aka: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    tower: Tower | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inert: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_code: str = ""

    def config(self, attributes: Mapping[str, Any], origin: str = "config.json") -> HFConfig:
        """Wraps config.json's ``attributes`` with this family's defaults, aliases and inert names.

        Raises:
            UnsupportedModelError: the checkpoint brings code of its own that transformers does not have.
        """
        inert = [name for names in self.inert.values() for name in names.split()]
        hf = HFConfig(attributes, origin, defaults=self.defaults, aliases=self.aliases, inert=inert)
        hf.check_own_code(self.own_code)
        return hf if self.tower is None else self.tower.text_config(hf)


def sizes(*, d_model: int, n_layers: int, n_heads: int, d_mlp: int, n_ctx: int, d_vocab: int) -> dict[str, Any]:
    """Returns ``Family.defaults`` for the sizes that most classes have, under their usual names."""
    return {
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "intermediate_size": d_mlp,
        "max_position_embeddings": n_ctx,
        "vocab_size": d_vocab,
    }
