"""Checkpoints shared by the tests of this directory, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hf_models import make_hf_model

pytest.importorskip("torch")


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of a variant of ``hf_models.VARIANTS``."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            make_hf_model(variant, made[variant])
        return made[variant]

    return get


@pytest.fixture
def gpt2(hf_checkpoint: Callable[[str], Path]) -> Path:
    """A tiny GPT-2 checkpoint."""
    return hf_checkpoint("gpt2")
