"""Sweeps of a model that carries hooks: each site is a run of its own, because such a hook may look at anything."""

from collections.abc import Callable

import numpy as np

from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Replace
from tljax.hooks.points import HEAD, stage_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.edits import expand, picks
from tljax.patching.engine.engine import Reach, Spent
from tljax.patching.engine.packing import Rows
from tljax.patching.engine.report import blocks_flops
from tljax.patching.engine.sites import Sites
from tljax.processes import as_numpy


class SiteBySite:
    """Runs every site alone, with the hooks that the model carries; at the patched point they run before the patch.

    Args:
        model, base, reach, advance: as in :class:`~tljax.patching.engine.engine.Engine`.

    Raises:
        InputError: a hook sits at the final norm or the unembedding, which a sweep leaves out.
    """

    def __init__(
        self,
        model: HookedTransformer,
        base: BaseRun,
        reach: Reach,
        advance: Callable[[float], None] = lambda runs: None,
    ) -> None:
        self.model, self.base, self.reach, self.advance = model, base, reach, advance
        self.spent = Spent()
        refuse_late_hooks(model)

    def run(self, rows: Rows, sites: Sites, first: int, n_sites: int) -> np.ndarray:
        """See :meth:`tljax.patching.engine.engine.Engine.run`."""
        cfg, base = self.model.cfg, self.base
        finals = np.tile(self._kept(base.final)[None], (n_sites, 1, 1, 1))
        for site in np.unique(rows.site):
            hooks = HookDictionary((*self.model._hooks.entries, _patch(self.model, sites, int(site))))
            final, _ = run_forward(cfg, self.model.params, base.tokens, base.context, hooks=hooks, stop=cfg.n_layers)
            finals[site - first] = self._kept(final)
            self.spent.flops += blocks_flops(cfg, base.batch, base.padded_length)
            self.advance(float((rows.site == site).sum()))
        return finals

    def _kept(self, final: object) -> np.ndarray:
        whole, only = as_numpy(final), self.reach.only
        return whole if only is None else whole[:, only : only + 1]


def refuse_late_hooks(model: HookedTransformer) -> None:
    """Raises InputError if a hook sits at the final norm or the unembedding, which a sweep leaves out."""
    if late := [entry.name for entry in model._hooks.entries if stage_of(entry.name)[0] == HEAD]:
        raise InputError(
            f"The model carries a hook at {late[0]}, and a sweep unembeds only what its metric reads, without "
            "hooks. Remove it: put what it does into the metric."
        )


def _patch(model: HookedTransformer, sites: Sites, site: int) -> HookEntry:
    """Returns the hook that patches one site in a run of whole prompts."""
    layer = int(sites.layer[site])
    values = sites.values[layer][sites.variant[site]]
    mask, prompts = np.ones((1,) * values.ndim, bool), np.arange(values.shape[0])[:, None]
    for number, axis in enumerate(sites.row.axes):
        if axis in sites.chosen or axis in sites.allowed:
            entries = np.arange(values.shape[number])[None]
            picked = picks(sites, axis, np.asarray([[site]]), entries, prompts)
            mask = mask & expand(picked, (0, number), values.ndim)
    return HookEntry(sites.full_name(layer), Replace(values, mask=mask))
