"""The tokens that end, start and pad a text, as a Hugging Face checkpoint declares them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tljax.checkpoints.files.reader import CONFIG, read_json
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError

GENERATION_CONFIG = "generation_config.json"
_FIELDS = {"eos_token_id": "eos_token_ids", "bos_token_id": "bos_token_id", "pad_token_id": "pad_token_id"}
_NESTED = ("decoder", "generator", "text_config")
"""Attributes in which transformers looks for the text model's config within a larger one."""


def read_stop_tokens(directory: Path, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config fields ``eos_token_ids``, ``bos_token_id`` and ``pad_token_id`` of a checkpoint.

    As in transformers' ``generate``, only generation_config.json is read if there is one, and config.json otherwise.
    Defaults of a config class for absent keys do not count. The file's sampling settings (``temperature``, ``top_k`` …)
    are not read.

    Args:
        directory: the checkpoint's directory.
        attributes: the contents of its config.json.

    Raises:
        CheckpointError: generation_config.json is damaged, or an id is no whole number.
    """
    file = directory / GENERATION_CONFIG
    if file.is_file():
        return declared_tokens(read_json(file), str(file))
    return declared_tokens(attributes, str(directory / CONFIG))


def declared_tokens(attributes: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns the same fields from a config or generation config that was already read."""
    nested = next((attributes[key] for key in _NESTED if isinstance(attributes.get(key), Mapping)), {})
    found = {}
    for key, field in _FIELDS.items():
        value = attributes.get(key) if attributes.get(key) is not None else nested.get(key)
        ids = list(value) if isinstance(value, list | tuple) and key == "eos_token_id" else [value]
        if value is None or not ids:
            continue
        if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            raise CheckpointError(
                f"{origin} has {key}={value!r}; expected a token id, a whole number"
                f"{' or a list of them' if key == 'eos_token_id' else ''}. Correct it or take the key out."
            )
        found[field] = tuple(ids) if key == "eos_token_id" else value
    return found


def stop_token_attributes(cfg: HookedTransformerConfig) -> dict[str, Any]:
    """Returns the attributes of a config.json or generation_config.json that declare the tokens in ``cfg``."""
    attributes: dict[str, Any] = {"bos_token_id": cfg.bos_token_id, "pad_token_id": cfg.pad_token_id}
    if cfg.eos_token_ids is not None:
        attributes["eos_token_id"] = cfg.eos_token_ids[0] if len(cfg.eos_token_ids) == 1 else list(cfg.eos_token_ids)
    return {key: value for key, value in attributes.items() if value is not None}
