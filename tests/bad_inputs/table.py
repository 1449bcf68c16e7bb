"""The form of the table of bad inputs: one line is a call, and the error or the right value it must give.

A new public function joins the table with one line in the module of its kind::

    Case("a head that does not exist", lambda w: w.tiny(w.P, ...), InterventionError, "head=99", "4 heads")
    Case("the last position", lambda w: w.tiny(w.P)[0, -1], equals=lambda w: w.tiny(w.P)[0, w.n - 1])
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.patching import LogitDiff

PROMPT = "When John and Mary went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, Mary gave a drink to"
SHORT = "When John and Mary"


class World:
    """What the cases are about, made when first asked for and shared by all of them."""

    P, Q, S = PROMPT, OTHER, SHORT

    @functools.cached_property
    def tiny(self) -> HookedTransformer:
        """The bundled trained model: 4 layers, 4 heads, d_model 64."""
        return HookedTransformer.from_pretrained("tljax-tiny")

    @functools.cached_property
    def m(self) -> LogitDiff:
        """The metric of " Mary" over " John"."""
        return LogitDiff(self.tiny.to_single_token(" Mary"), self.tiny.to_single_token(" John"))

    @functools.cached_property
    def small(self) -> HookedTransformer:
        """A random model of one layer, two heads, four positions."""
        return HookedTransformer(self.config())

    @staticmethod
    def config(**fields: Any) -> HookedTransformerConfig:
        """The config of :attr:`small`, with other fields."""
        base = {"d_model": 8, "n_heads": 2, "n_layers": 1, "n_ctx": 4, "act_fn": "relu", "normalization_type": None}
        return HookedTransformerConfig(**(base | {"d_vocab": 12} | fields))


class Case:
    """One line of the table.

    Args:
        name: what a tired researcher did, in a few words; the test's id.
        call: does it, given the world.
        error: the class it must raise, or ``None`` where ``equals`` gives the right value.
        *says: parts of the message, all of which must be there.
        equals: the right value, or a function of the world that computes it another way.
        tolerance: absolute, between ``call``'s value and the right one.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[World], Any],
        error: type[Exception] | None = None,
        *says: str,
        equals: Any = None,
        tolerance: float = 1e-5,
    ) -> None:
        if (error is None) == (equals is None):
            raise ValueError(f"{name}: give an error or a right value.")
        self.name, self.call, self.error, self.says = name, call, error, says
        self.equals, self.tolerance = equals, tolerance

    def check(self, world: World) -> None:
        """Fails unless the call does what the line says."""
        if self.error is not None:
            with pytest.raises(self.error) as caught:
                jax.block_until_ready(self.call(world))
            message = str(caught.value)
            missing = [part for part in self.says if part not in message]
            assert not missing, f"{missing} not in: {message}"
            return
        got, right = self.call(world), self.equals(world) if callable(self.equals) else self.equals
        if isinstance(right, str | bool | list | tuple | dict):
            assert got == right
        else:
            np.testing.assert_allclose(np.asarray(got), np.asarray(right), rtol=0, atol=self.tolerance)
