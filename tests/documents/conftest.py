"""The examples of the documents on TransformerLens that users were given: what a block takes from those before it."""

from collections.abc import Iterator

import jax
import pytest

from tljax import HookedTransformer


@pytest.fixture(scope="module", autouse=True)
def _rank_promotion_as_users_have_it() -> Iterator[None]:
    """The documents add a ``[d_model]`` vector to ``[batch, pos, d_model]``: jax allows it unless told not to."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _drop_programs() -> None:
    """Keeps compiled programs from file to file: they run prompts of the same lengths, on one worker."""


@pytest.fixture(scope="session")
def model(tiny: HookedTransformer) -> HookedTransformer:
    """The bundled trained model, where the documents load GPT-2."""
    return tiny


@pytest.fixture(scope="session")
def tokens(model: HookedTransformer) -> jax.Array:
    """The prompt of the tutorials, where a block does not say which."""
    return model.to_tokens("The capital of France is")


@pytest.fixture(scope="session")
def device() -> str:
    """``"cuda"``, as the documents have it, or what this machine has."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"
