"""One variant at a time: every test of it runs in a row, on one worker, and then its models go."""

import itertools
from collections.abc import Iterator

import jax
import pytest

pytest.importorskip("torch")

from family_case import ONE_A_LAYOUT, FamilyCase
from hf_models import VARIANTS

KEPT = 8
"""Variants after which programs are dropped: fewer would recompile what variants share."""
_count = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_variant_a_layout: run only for the variants of ONE_A_LAYOUT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item
        for item in items
        if item.get_closest_marker("one_variant_a_layout") is None or item.callspec.params["case"] in ONE_A_LAYOUT
    ]


@pytest.fixture(scope="module", autouse=True)
def _drop_programs() -> None:
    """Instead of dropping programs after each module, as elsewhere: tests here go by variant."""


@pytest.fixture(autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Has XLA skip most optimisations, a third of the time here, unless figures are recorded."""
    jax.config.update("jax_disable_most_optimizations", not request.config.getoption("--record-support"))
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(
    scope="session", params=[pytest.param(name, marks=pytest.mark.xdist_group(name), id=name) for name in VARIANTS]
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, support_figures: dict[str, dict]
) -> Iterator[FamilyCase]:
    """Each variant in turn."""
    made = FamilyCase(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    support_figures.setdefault(request.param, {}).update(made.figures)
    if next(_count) % KEPT == 0:
        jax.clear_caches()
