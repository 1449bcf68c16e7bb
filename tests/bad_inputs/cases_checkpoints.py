"""Checkpoints, adapters and configs that cannot be loaded as they are."""

import json
import tempfile
from pathlib import Path
from typing import Any

from table import Case

from tljax import HookedTransformer
from tljax.errors import CheckpointError, InputError, UnsupportedModelError

CASES: tuple[Case, ...] = ()


def _config(name: str, change: dict[str, Any], error: type[Exception], *says: str, **options: Any) -> Case:
    """A config.json of a Llama with these changes, and no weights beside it."""

    def load(_: Any) -> HookedTransformer:
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(_LLAMA | change))
            return HookedTransformer.from_pretrained(directory, **options)

    return Case(name, load, error, *says)


_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CASES += (
    _config("an unknown key", {"odd": 1}, UnsupportedModelError, "odd=1", 'ignore_config=["odd"]'),
    _config("an unknown key, ignored", {"odd": 1}, CheckpointError, "has no weights", ignore_config="odd"),
    _config("ignoring a key that is not there", {"odd": 1}, InputError, "'od'", "'odd'", ignore_config=["od"]),
    _config("ignoring a size", {"hidden_size": 64}, InputError, "cannot be ignored", ignore_config=["hidden_size"]),
    _config("ten million layers", {"num_hidden_layers": 10**7}, CheckpointError, "num_hidden_layers=", "10,000"),
    _config("a vocabulary of 10**12", {"vocab_size": 10**12}, CheckpointError, "vocab_size=1000000000000"),
    _config("a size that is true", {"hidden_size": True}, CheckpointError, "hidden_size=True", "an integer"),
    _config("a switch in words", {"attention_bias": "false"}, CheckpointError, "'false'", "true or false"),
    _config("a reward model", {"architectures": ["LlamaForReward"]}, UnsupportedModelError, "another head"),
    _config("two families", {"model_type": "gpt2"}, CheckpointError, "contradicts itself", "GPT2LMHeadModel"),
    _config("attention that sees what comes", {"is_causal": False}, UnsupportedModelError, "is_causal=False"),
)
