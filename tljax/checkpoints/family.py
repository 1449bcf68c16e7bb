"""What tljax knows about one architecture, in both directions."""

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
    """Everything tljax knows about one architecture, in both directions.

    Attributes:
        architecture: class name in config.json's ``architectures``.
        aka: another name for it in checkpoints that were published with code of their own.
        model_type: ``model_type`` in config.json.
        read_config: HF config → ours; it must read every attribute that changes the function.
        write_config: our config, and which biases are not all zero (such as ``"attn.b_Q"``) → HF config.
        rows: HF config → the table.
        prefix: may be missing from a checkpoint's keys (checkpoints of the bare model without its head).
        ignored: patterns of stored buffers that are not parameters.
        renamed: patterns of starts of stored names, and what the table has instead.
        tower: for a multimodal architecture, where its config holds that of the text model, which the rest describes.
        computed: our config → by path, what makes a parameter that follows from a formula and is not stored.
        defaults: what transformers' class takes for an attribute that config.json lacks: all sizes, and what differs
            from the default of a reader that families share. These are the attributes no caller can have ignored.
        aliases: other name → name, as in the class's ``attribute_map``.
        inert: why some attributes do not change this family's logits → their names, separated by spaces.
        own_code: pattern of the modules in which the publishers' own code was, before transformers took it over.
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
        """Returns config.json's ``attributes`` as this family reads them.

        Raises:
            UnsupportedModelError: the checkpoint brings code of its own that transformers does not have.
        """
        inert = [name for names in self.inert.values() for name in names.split()]
        hf = HFConfig(attributes, origin, defaults=self.defaults, aliases=self.aliases, inert=inert)
        hf.check_own_code(self.own_code)
        return hf if self.tower is None else self.tower.text_config(hf)


def sizes(*, d_model: int, n_layers: int, n_heads: int, d_mlp: int, n_ctx: int, d_vocab: int) -> dict[str, Any]:
    """Returns ``Family.defaults`` of the sizes that most classes have, under the names that most give them."""
    return {
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "intermediate_size": d_mlp,
        "max_position_embeddings": n_ctx,
        "vocab_size": d_vocab,
    }
