"""Models whose tokenizers the tasks are tried with."""

from pathlib import Path

import pytest
from task_models import untrained, word_tokenizer

from tljax import HookedTransformer
from tljax.text import load_tokenizer

GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2-tokenizer"


@pytest.fixture(scope="session")
def gpt2() -> HookedTransformer:
    """A model with GPT-2's tokenizer, where that lies beside the checkout."""
    if not GPT2.exists():
        pytest.skip(f"no tokenizer in {GPT2}")
    return untrained(load_tokenizer(GPT2), 50257)


@pytest.fixture(scope="session")
def words() -> HookedTransformer:
    """A model whose vocabulary is whole words: those of the tasks, each one token, with a leading space and without."""
    tokenizer = word_tokenizer()
    return untrained(tokenizer, len(tokenizer))
