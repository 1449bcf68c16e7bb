"""YAML files."""

from pathlib import Path
from typing import Any

import yaml

from tljax.errors import DictionaryError


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        DictionaryError: the file is missing, is not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DictionaryError(f"{file} cannot be read as YAML ({error}).") from error
    if not isinstance(content, dict):
        raise DictionaryError(f"{file} holds a {type(content).__name__}, expected a mapping.")
    return content
