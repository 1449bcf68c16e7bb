"""Shared fixtures: strict numerics, a compilation counter, tiny models, the bundled model."""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest
import quick_compiling  # noqa: F401
from support_record import pytest_addoption, pytest_configure, pytest_sessionfinish, support_figures  # noqa: F401
from variants import build

from tljax import HookedTransformer

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_COMPILED = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration: float, **_: object) -> None:
    global _count
    _count += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_listen)


class CompileCounter:
    """Counts XLA compilations since it was made."""

    def __init__(self) -> None:
        self._start = _count

    @property
    def count(self) -> int:
        return _count - self._start


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file on one worker, where they share fixtures and programs, unless they say otherwise."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_collection_finish() -> None:
    """Collects garbage rarely: tracing makes millions of small objects, and each time it would walk over torch's."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 6_000
"""Linux gives a process some 65,000; with this many it takes about 3 GB."""


@pytest.fixture(scope="module", autouse=True)
def _drop_programs() -> Iterator[None]:
    """Drops compiled programs before thousands of them use up the process's memory maps, and XLA crashes."""
    yield
    if not _MAPS.exists() or _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def compilations() -> CompileCounter:
    """A counter that starts at zero."""
    return CompileCounter()


@pytest.fixture(scope="session", params=["gpt2", "neox", "llama"])
def any_model(request: pytest.FixtureRequest) -> HookedTransformer:
    """A tiny three-layer model of each family."""
    return build(request.param, n_layers=3)


@pytest.fixture(scope="session")
def model() -> HookedTransformer:
    """A tiny three-layer GPT-2-like model."""
    return build("gpt2", n_layers=3)


@pytest.fixture(scope="session")
def tokens() -> jax.Array:
    """Two prompts of six tokens, ids below 13."""
    return jax.numpy.asarray(np.random.default_rng(1).integers(0, 13, (2, 6)), jax.numpy.int32)


@pytest.fixture(scope="session")
def tiny() -> HookedTransformer:
    """The bundled trained model."""
    return HookedTransformer.from_pretrained("tljax-tiny")
