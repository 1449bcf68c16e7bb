"""Tests of a file run on one worker, where they share fixtures and programs (conftest.py)."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_a_file_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist divides tests by what stands after the @; without it every test goes where there is time."""
    assert request.node.nodeid.endswith("test_workers.py")
    assert "@" in request.node.nodeid
