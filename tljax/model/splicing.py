"""Methods that splice dictionaries into a model, and SAELens's names for them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack, cast

from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.dictionaries import Dictionary
from tljax.dictionary_params import dictionaries_in, with_dictionaries
from tljax.errors import DictionaryError, HookError, nearest
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.names import resolve
from tljax.hooks.points import point_table
from tljax.model.hooking import HookContext
from tljax.model.running import typed_run
from tljax.model.sharding import beside
from tljax.model.splice_sites import SpliceOptions, excluded_tokens, given_pairs, splice_of, with_config
from tljax.splice import ErrorTerm, Gradient
from tljax.typing import HookList, InputOptions, NamesFilter, Params, ReturnType

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer


class SplicingMethods:
    """Methods for dictionaries inside a model; each returns a new model."""

    cfg: HookedTransformerConfig
    params: Params
    _hooks: HookDictionary

    @typed
    def with_dictionaries(
        self,
        dictionaries: Any,
        *,
        error: ErrorTerm = "keep",
        gradient: Gradient = "stop",
        exclude_tokens: Any = None,
        skip: bool = True,
    ) -> "HookedTransformer":
        """Returns the model with dictionaries in place of some of its activations.

        The points stay, with the values that the model computes, and each is followed by points of its dictionary:
        ``….hook_sae_input``, ``.hook_sae_acts_pre``, ``.hook_sae_acts_post`` (the features, axis ``feature``),
        ``.hook_sae_recons``, ``.hook_sae_error``, ``.hook_sae_output`` (what the model goes on with). They are cached,
        hooked, swept and differentiated like all others. The arrays are among the model's parameters, so
        :func:`jax.grad` reaches them.

        Args:
            dictionaries: hook name to dictionary; for a transcoder a pair of names ``(read, written)``, both in one
                block. Dictionaries that know their points (``dictionary.cfg.tap``) may come in a list, or alone.
            error: ``"keep"`` adds what the reconstruction lacks, the site's value minus that of the dictionary without
                interventions: the model computes what it did until a feature is changed. ``"drop"`` leaves it out.
            gradient: with the error kept, ``"stop"``: the error counts as a constant, so gradients reach what is
                encoded through the features alone (Marks et al. 2024, SAELens). ``"pass"``: it is differentiated, so
                that gradients reach earlier points as they do without the dictionary. At the features of a single
                dictionary both give the same gradients.
            exclude_tokens: ids of tokens at whose positions the model's own value stays; ``"special"`` means the
                tokenizer's special tokens.
            skip: whether a transcoder's skip connection is part of its output. ``False`` leaves it out, as SAELens
                does when it splices.

        Returns:
            The spliced model. Equal dictionaries in several layers share compiled programs, and new values compile
            nothing.

        Raises:
            DictionaryError: a dictionary does not fit its point, is there twice, is damaged, or cannot be spliced.
            UnknownHookError: the model has no such point; names the nearest ones.
        """
        model = cast("HookedTransformer", self)
        tokenizer = model.tokenizer
        special = None if tokenizer is None else tokenizer.all_special_ids
        options = SpliceOptions(
            error=error,
            gradient=gradient,
            skip=skip,
            exclude_tokens=excluded_tokens(exclude_tokens, self.cfg, special),
        )
        splices, arrays = list(self.cfg.splices), dictionaries_in(self.params)
        plain = self._with_spliced((), {}) if splices else model
        for where, dictionary in given_pairs(dictionaries):
            splice, computing = splice_of(plain, where, dictionary, options)
            if splice.writes in arrays:
                raise DictionaryError(
                    f"There is a dictionary at {splice.writes} already. To put another in its place: "
                    f"model.without_dictionaries({splice.writes!r}).with_dictionaries(...)."
                )
            splices.append(splice)
            arrays[splice.writes] = computing
        return self._with_spliced(tuple(splices), arrays)

    @typed
    def without_dictionaries(self, names: Any = None) -> "HookedTransformer":
        """Returns the model without the dictionaries at some points, or without any.

        Args:
            names: the point, or points, that they write; ``None`` means all.

        Raises:
            DictionaryError: there is no dictionary at a point.
            HookError: the model carries hooks at points of a dictionary.
        """
        arrays = dictionaries_in(self.params)
        gone = list(arrays) if names is None else self._spliced_names(names, list(arrays))
        for entry in self._hooks.entries:
            if any(entry.name.startswith(f"{name}.hook_sae_") for name in gone):
                raise HookError(
                    f"The model carries a hook at {entry.name}, a point of the dictionary that is taken out. Remove "
                    f"the hook first: model.remove_hook({entry.name!r})."
                )
        splices = tuple(splice for splice in self.cfg.splices if splice.writes not in gone)
        return self._with_spliced(splices, {name: one for name, one in arrays.items() if name not in gone})

    @property
    def dictionaries(self) -> dict[str, Dictionary]:
        """The spliced dictionaries, by the full name of the point that each writes; in firing order."""
        sources, arrays = {splice.writes: splice.source for splice in self.cfg.splices}, dictionaries_in(self.params)
        return {
            name: arrays[name] if sources[name] is None else with_config(arrays[name], sources[name])
            for name in point_table(self.cfg)
            if name in arrays
        }

    def _spliced_names(self, names: Any, there: list[str]) -> list[str]:
        several = names if isinstance(names, list | set | frozenset) else [names]
        table = point_table(self.cfg.without_splices)
        found = [resolve(name, table, self.cfg.n_layers) for name in several]
        if missing := [name for name in found if name not in there]:
            have = f" Dictionaries are at {', '.join(there)}." if there else " The model has none."
            raise DictionaryError(f"There is no dictionary at {missing[0]}.{nearest(missing[0], there)}{have}")
        return found

    def _with_spliced(self, splices: tuple[Any, ...], arrays: Mapping[str, Dictionary]) -> "HookedTransformer":
        model = cast("HookedTransformer", self)
        ordered = tuple(
            sorted(splices, key=lambda splice: (-1 if splice.layer is None else splice.layer, splice.writes))
        )
        cfg = self.cfg.replace(splices=ordered)
        placed = beside(self.params, arrays)
        return model._make(cfg, with_dictionaries(self.params, placed), self._hooks, model._tokenizer)

    # SAELens's names

    @typed
    def add_sae(self, sae: Any, use_error_term: bool | None = None) -> "HookedTransformer":
        """Returns a model with one more dictionary, at its own hook point; see :meth:`with_dictionaries`.

        Args:
            sae: the dictionary, or ``{hook name: dictionary}``.
            use_error_term: whether to add the error term. ``None`` means not, as in SAELens.
        """
        return self.with_dictionaries(sae, error="keep" if use_error_term else "drop")

    @typed
    def reset_saes(self, act_names: Any = None) -> "HookedTransformer":
        """Returns the model without its dictionaries; see :meth:`without_dictionaries`."""
        return self.without_dictionaries(act_names)

    @typed
    def saes(self, saes: Any = (), reset_saes_end: bool = True, use_error_term: bool | None = None) -> HookContext:
        """Returns a context manager: ``with model.saes([sae]) as spliced:``. ``model`` itself never changes.

        Args:
            saes: the dictionaries.
            reset_saes_end: accepted for SAELens's sake: a model never changes, so nothing is left to reset.
            use_error_term: as in :meth:`add_sae`.

        Warns:
            UnusedHooksWarning: the ``as spliced`` was forgotten, so that nothing ran with the dictionaries.
        """
        _refuse_persistent_dictionaries(reset_saes_end)
        return HookContext(self.add_sae(saes, use_error_term))

    @typed_run
    def run_with_saes(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        *,
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        **options: Unpack[InputOptions],
    ) -> Any:
        """Runs the model with dictionaries spliced in, for this call only.

        Args:
            input, return_type: as in :meth:`__call__`.
            saes, reset_saes_end, use_error_term: as in :meth:`saes`.
            loss_per_token, stop_at_layer, **options: as in :meth:`__call__`.

        Returns:
            As :meth:`__call__`.
        """
        _refuse_persistent_dictionaries(reset_saes_end)
        spliced = self.add_sae(saes, use_error_term)
        return spliced(input, return_type, loss_per_token, stop_at_layer=stop_at_layer, **options)

    @typed_run
    def run_with_cache_with_saes(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        *,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        stop_at_layer: int | None = None,
        **options: Unpack[InputOptions],
    ) -> tuple[Any, Any]:
        """Runs the model with dictionaries spliced in, and keeps activations, those of the dictionaries among them.

        Args:
            input, return_type: as in :meth:`__call__`.
            saes, reset_saes_end, use_error_term: as in :meth:`saes`.
            names_filter, return_cache_object, remove_batch_dim, incl_bwd, stop_at_layer, **options: as in
                :meth:`run_with_cache`.

        Returns:
            As :meth:`run_with_cache`.
        """
        _refuse_persistent_dictionaries(reset_saes_end)
        return self.add_sae(saes, use_error_term).run_with_cache(
            input,
            return_type,
            names_filter=names_filter,
            return_cache_object=return_cache_object,
            remove_batch_dim=remove_batch_dim,
            incl_bwd=incl_bwd,
            stop_at_layer=stop_at_layer,
            **options,
        )

    @typed_run
    def run_with_hooks_with_saes(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        saes: Any = (),
        reset_saes_end: bool = True,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        use_error_term: bool | None = None,
        *,
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        **options: Unpack[InputOptions],
    ) -> Any:
        """Runs the model with dictionaries spliced in and with hooks, for this call only.

        Args:
            input, return_type: as in :meth:`__call__`.
            saes, reset_saes_end, use_error_term: as in :meth:`saes`.
            fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts: as in :meth:`run_with_hooks`; their names may be
                those of the dictionaries' points.
            loss_per_token, stop_at_layer, **options: as in :meth:`__call__`.

        Returns:
            As :meth:`__call__`.
        """
        _refuse_persistent_dictionaries(reset_saes_end)
        return self.add_sae(saes, use_error_term).run_with_hooks(
            input,
            return_type,
            fwd_hooks,
            bwd_hooks,
            reset_hooks_end,
            clear_contexts,
            loss_per_token=loss_per_token,
            stop_at_layer=stop_at_layer,
            **options,
        )


def _refuse_persistent_dictionaries(reset_saes_end: bool) -> None:
    if not reset_saes_end:
        raise DictionaryError(
            "reset_saes_end=False cannot work: a tljax model never changes, so dictionaries cannot outlive the call. "
            "For a spliced model write model = model.with_dictionaries(saes)."
        )
