"""One variant at a time: every test of it runs in a row, on one worker, and then its models go."""

import itertools
from collections.abc import Iterator

import jax
import pytest

pytest.importorskip("torch")

from family_case import FEW_VARIANTS, FamilyCase
from hf_models import VARIANTS

KEPT = 8
"""Variants after which programs are dropped: fewer would recompile what variants share."""
_count = itertools.count(1)
ONLY = {
    "few_variants": frozenset(FEW_VARIANTS),
    "one_variant_a_family": frozenset(
        {kind: name for name, (kind, attributes) in sorted(VARIANTS.items(), key=lambda item: len(item[1][1]))}.values()
    ),
}
"""Marker of costly tests → the variants they run for."""


def pytest_configure(config: pytest.Config) -> None:
    for name in ONLY:
        config.addinivalue_line("markers", f"{name}: run only for these variants")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name, variants in ONLY.items():
        items[:] = [
            item for item in items if not item.get_closest_marker(name) or item.callspec.params["case"] in variants
        ]


@pytest.fixture(scope="module", autouse=True)
def _drop_programs() -> None:
    """Instead of dropping programs after each module, as elsewhere: tests here go by variant."""


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
