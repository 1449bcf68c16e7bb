"""``HookedTransformer``: parameters, config, tokenizer and hooks as one immutable pytree."""

import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from tljax.cache.attribution import token_ids
from tljax.checkpoints import load_checkpoint, load_transformer_lens, save_hf, save_native
from tljax.checkpoints.parameters import check_parameters
from tljax.checks import take, typed
from tljax.config import HookedTransformerConfig
from tljax.devices import names_device, resolve_device
from tljax.elsewhere import MODEL, SaysWhatInstead
from tljax.errors import ConfigError, FrozenModelError, InputError, nearest
from tljax.generation.generating import GenerationMethods
from tljax.hooks.dictionary import Direction, HookDictionary, UnusedHooksWarning
from tljax.hooks.listing import HookPointList
from tljax.hooks.names import select
from tljax.hooks.points import point_table
from tljax.model.running import RunMethods
from tljax.model.views import ModuleView, block_view, end_view
from tljax.modules.parameters import stored_dtype
from tljax.modules.stages import init_params
from tljax.numerics import available_dtype
from tljax.text.methods import TextMethods
from tljax.text.tokenizer import Tokenizer, UnreadableTokenizer, wrap_tokenizer
from tljax.text.tokenizer_files import load_tokenizer, load_tokenizer_if_possible
from tljax.typing import HookList, PaddingSide, Params
from tljax.weights.properties import WeightProperties
from tljax.weights.steps import processing_report


def _wrap(tokenizer: Any, default_padding_side: PaddingSide | None) -> Tokenizer | None:
    if tokenizer is None:
        return None
    return wrap_tokenizer(tokenizer, default_padding_side)


def _fit_to_tokenizer(cfg: HookedTransformerConfig, tokenizer: Tokenizer | None) -> HookedTransformerConfig:
    if tokenizer is None or isinstance(tokenizer, UnreadableTokenizer):
        return cfg
    changes: dict[str, Any] = {"tokenizer_prepends_bos": tokenizer.prepends_bos}
    if cfg.d_vocab == -1:
        changes |= {
            "d_vocab": tokenizer.d_vocab,
            "d_vocab_out": tokenizer.d_vocab if cfg.d_vocab_out == -1 else cfg.d_vocab_out,
        }
    return cfg.replace(**changes)


class HookContext:
    """What :meth:`HookedTransformer.hooks` returns: a context whose value is the hooked model."""

    def __init__(self, hooked: "HookedTransformer") -> None:
        self._hooked: HookedTransformer | None = hooked
        self._kept = weakref.ref(hooked)

    def __enter__(self) -> "HookedTransformer":
        assert self._hooked is not None
        hooked, self._hooked = self._hooked, None
        return hooked

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._kept() is None:
            warnings.warn(
                "These hooks were never used: a tljax model does not change, so the block ran the model without them. "
                "Write `with model.hooks(...) as hooked:` and call hooked.",
                UnusedHooksWarning,
                stacklevel=2,
            )


@jax.tree_util.register_pytree_with_keys_class
class HookedTransformer(RunMethods, GenerationMethods, TextMethods, WeightProperties, SaysWhatInstead):
    """A decoder-only transformer whose every activation can be named, read and changed.

    The object is immutable and a pytree: its leaves are the parameters and the arrays inside its hooks, so it goes
    through ``jax.jit``, ``jax.grad``, ``jax.vmap`` and ``jax.device_put`` as an argument. Methods that change something
    (``add_hook``, ``to``, ``replace``) return a new model.

    Args:
        cfg: a :class:`HookedTransformerConfig` or a dict of its fields.
        tokenizer: a Hugging Face tokenizer, or ``None``.
        params: parameters in the stored layout; ``None`` draws them by ``cfg.init_mode`` and ``cfg.seed``.
        default_padding_side: overrides the tokenizer's.

    Attributes:
        cfg: the config.
        params: nested parameters, stored layout (``W_Q`` is ``[d_model, n_heads, d_head]``); the ``W_*`` and ``b_*``
            properties and ``model.blocks[l].attn.W_Q`` give TransformerLens's shapes.

    Raises:
        ConfigError: the config is not one, or the vocabulary size is unknown.
        CheckpointError: ``params`` do not fit the config; names all that do not.

    >>> model = HookedTransformer(HookedTransformerConfig(d_model=8, n_heads=2, n_layers=2, n_ctx=6, d_vocab=5))
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 5)
    """

    cfg: HookedTransformerConfig
    params: Params
    _hooks: HookDictionary
    _tokenizer: Tokenizer | None
    _instead = MODEL

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        tokenizer: Any = None,
        params: Params | None = None,
        default_padding_side: PaddingSide | None = None,
    ) -> None:
        config = HookedTransformerConfig.unwrap(cfg)
        if tokenizer is None and config.tokenizer_name is not None:
            tokenizer = load_tokenizer(config.tokenizer_name)
        wrapped = _wrap(tokenizer, default_padding_side)
        config = _fit_to_tokenizer(config, wrapped)
        if config.d_vocab < 1:
            raise ConfigError("d_vocab is not set: give it in the config, or pass a tokenizer to take it from.")
        if params is None:
            params = init_params(config, config.seed or 0)
        else:
            check_parameters(params, config)
        self._assign(config, params, HookDictionary(), wrapped)

    def _assign(
        self, cfg: HookedTransformerConfig, params: Params, hooks: HookDictionary, tokenizer: Tokenizer | None
    ) -> None:
        self.__dict__.update(cfg=cfg, params=params, _hooks=hooks, _tokenizer=tokenizer)

    @classmethod
    def _make(
        cls, cfg: HookedTransformerConfig, params: Params, hooks: HookDictionary, tokenizer: Tokenizer | None
    ) -> "HookedTransformer":
        model = object.__new__(cls)
        model._assign(cfg, params, hooks, tokenizer)
        return model

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        key = jax.tree_util.GetAttrKey
        return [(key("params"), self.params), (key("hooks"), self._hooks)], (self.cfg, self._tokenizer)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Sequence[Any]) -> "HookedTransformer":
        return cls._make(aux[0], children[0], children[1], aux[1])

    def __setattr__(self, name: str, value: Any) -> None:
        changed = name if name in ("params", "cfg", "tokenizer") else "params"
        raise FrozenModelError(
            f"A HookedTransformer cannot change in place (setting {name!r}). Use model = model.replace({changed}=...), "
            "model.add_hook(...), model.to(...); each returns a new model."
        )

    def __delattr__(self, name: str) -> None:
        raise FrozenModelError(f"A HookedTransformer cannot change in place (deleting {name!r}).")

    def __repr__(self) -> str:
        cfg = self.cfg
        hooks = f", {len(self._hooks)} hooks" if len(self._hooks) else ""
        return (
            f"HookedTransformer({cfg.model_name}: {cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads, "
            f"d_vocab {cfg.d_vocab}, n_ctx {cfg.n_ctx}, {cfg.dtype}{hooks})"
        )

    def replace(self, **changes: Any) -> "HookedTransformer":
        """Returns a copy with another ``params``, ``cfg`` or ``tokenizer``.

        Raises:
            CheckpointError: parameters and config do not fit each other; names all that do not. Parameters that are
                stacked, all along one new leading axis, are taken: a model for ``jax.vmap``.
        """
        if unknown := set(changes) - {"params", "cfg", "tokenizer"}:
            close = nearest(min(unknown), ("params", "cfg", "tokenizer"))
            raise InputError(f"replace takes params, cfg and tokenizer, got {sorted(unknown)}.{close}")
        tokenizer = _wrap(changes["tokenizer"], None) if "tokenizer" in changes else self._tokenizer
        cfg, params = HookedTransformerConfig.unwrap(changes.get("cfg", self.cfg)), changes.get("params", self.params)
        if "params" in changes or "cfg" in changes:
            check_parameters(params, cfg)
        return self._make(cfg, params, self._hooks, tokenizer)

    # Loading and saving

    @classmethod
    @typed
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        *,
        refactor_factored_attn_matrices: bool = False,
        tokenizer: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: PaddingSide | None = None,
        **options: Any,
    ) -> "HookedTransformer":
        """Loads a model by alias (``"gpt2-small"``), hub id, or local directory (which never touches the network).

        Args:
            model_name: what to load; ``"tljax-tiny"`` is bundled.
            fold_ln, center_writing_weights, center_unembed, fold_value_biases: weight processing, on by default as in
                TransformerLens; each is applied only where it leaves the model's function unchanged, and
                ``model.processing`` says which were.
            refactor_factored_attn_matrices: as there; an error where it would change the function.
            tokenizer: a tokenizer to use instead of the checkpoint's.
            default_prepend_bos: overrides the family's default.
            default_padding_side: overrides the tokenizer's.
            **options: ``dtype``, ``device``, ``revision``, ``token``, ``n_ctx``, ``first_n_layers``,
                ``checkpoint_index``, ``checkpoint_value``, ``ignore_config``, ``adapter``, ``allow_nonfinite``, and
                ``hf_model``, a transformers model in memory to read instead of files: see
                :func:`tljax.checkpoints.load_checkpoint`.

        Raises:
            CheckpointError: the checkpoint is incomplete or disagrees with its config.
            UnsupportedModelError: an architecture or attribute that tljax does not implement.

        A checkpoint whose tokenizer cannot be read loads all the same: the model takes token ids, and what needs text
        raises a TokenizerError with the reason.
        """
        loaded = load_checkpoint(
            model_name, fold_ln=fold_ln, center_writing_weights=center_writing_weights, center_unembed=center_unembed,
            fold_value_biases=fold_value_biases, refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            **options,
        )  # fmt: skip
        if tokenizer is None and (files := loaded.tokenizer_files()) is not None:
            tokenizer = load_tokenizer_if_possible(files)
        if tokenizer is None and (files := loaded.tokenizer_files()) is not None:
            tokenizer = load_tokenizer(files)
        cfg = loaded.cfg
        if default_prepend_bos is not None:
            cfg = cfg.replace(default_prepend_bos=default_prepend_bos)
        return cls(cfg, tokenizer, loaded.params, default_padding_side)

    @classmethod
    def from_pretrained_no_processing(cls, model_name: str | os.PathLike[str], **options: Any) -> "HookedTransformer":
        """:meth:`from_pretrained` with every kind of weight processing off: Hugging Face's own numbers throughout."""
        off: dict[str, Any] = dict.fromkeys(
            ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
        )
        return cls.from_pretrained(model_name, **(off | options))

    @classmethod
    def from_transformer_lens(
        cls,
        state_dict: Any,
        cfg: Any,
        *,
        tokenizer: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: PaddingSide | None = None,
        **options: Any,
    ) -> "HookedTransformer":
        """Loads a ``HookedTransformer`` of TransformerLens 3.9: its ``state_dict()`` and its ``cfg.to_dict()``.

        The weights are taken as they are: already folded where ``cfg`` says so (``normalization_type="LNPre"``).

        Args:
            state_dict: names to arrays (numpy, jax, torch), a safetensors file, or what ``torch.save`` wrote, for which
                alone torch is needed. Buffers (masks, rotary tables) are passed over.
            cfg: the dict, a JSON file that holds it, or the config itself. Every field of 3.9's is honoured, known to
                change nothing, or refused by name.
            tokenizer: the tokenizer. Without it the one in the directory ``cfg.tokenizer_name`` is used, if that is a
                directory: nothing is downloaded here.
            default_prepend_bos, default_padding_side: override the config's and the tokenizer's.
            **options: ``dtype`` (the config's by default), ``device``, ``n_ctx``, ``first_n_layers``; and
                ``fold_ln=True``, ``center_writing_weights=True``, ``center_unembed=True``, ``fold_value_biases=True``,
                ``refactor_factored_attn_matrices=True``, all off unless asked for: see
                :func:`tljax.checkpoints.loading.load_transformer_lens`.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape; lists them all.
            ConfigError, UnsupportedModelError: a field of ``cfg`` that does not fit, or is not implemented.
        """
        loaded = load_transformer_lens(state_dict, cfg, **options)
        if tokenizer is None and loaded.tokenizer_source is not None:
            tokenizer = load_tokenizer_if_possible(loaded.tokenizer_source)
        config = loaded.cfg
        if default_prepend_bos is not None:
            config = config.replace(default_prepend_bos=default_prepend_bos)
        return cls(config, tokenizer, loaded.params, default_padding_side)

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises FrozenModelError, which says how a state dict becomes a model."""
        raise FrozenModelError(
            "A HookedTransformer cannot change in place, so nothing is loaded into it. For a state dict of "
            "TransformerLens: model = HookedTransformer.from_transformer_lens(state_dict, cfg), with cfg its "
            "cfg.to_dict(). For parameters of tljax: model = model.replace(params=params)."
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config, parameters and tokenizer so that ``from_pretrained_no_processing(directory)`` is bit-equal.

        A checkpoint that is there is replaced as a whole: a process that is killed meanwhile leaves the old one, the
        new one, or a directory that is refused; a tokenizer of the old one does not stay.
        """
        save_native(self.params, self.cfg, self.tokenizer, directory)

    def save_hf(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint that Hugging Face transformers loads; needs unprocessed weights of a known family.

        The tokenizer is written too, and the tokens that end a text: the config's, or else the tokenizer's. What is
        there is replaced as by :meth:`save_pretrained`.
        """
        cfg, tokenizer = self.cfg, self._tokenizer
        if cfg.eos_token_ids is None and tokenizer is not None and tokenizer.eos_token_id is not None:
            cfg = cfg.replace(eos_token_ids=tokenizer.eos_token_id)
        save_hf(self.params, cfg, directory, self.tokenizer)

    def process_weights(self, **steps: bool) -> "HookedTransformer":
        """Returns the model with processed weights; see :func:`tljax.weights.processing.process_weights`."""
        from tljax.weights.processing import process_weights

        params, cfg = process_weights(self.params, self.cfg, **steps)
        return self.replace(params=params, cfg=cfg)

    @property
    def processing(self) -> dict[str, str]:
        """Every step of weight processing: ``"applied"``, ``"not applied"``, or why it would not be exact here."""
        return processing_report(self.cfg)

    def to(self, device_or_dtype: Any) -> "HookedTransformer":
        """Returns the model on another device (``"cpu"``, ``"gpu:0"``, a sharding) or in another dtype."""
        if names_device(device_or_dtype):
            return jax.device_put(self, resolve_device(device_or_dtype))
        dtype = available_dtype(device_or_dtype)
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(stored_dtype(path[-1].key, jnp.dtype(dtype))), self.params
        )
        return self.replace(params=params, cfg=self.cfg.replace(dtype=dtype))

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or ``None``."""
        return None if self._tokenizer is None else self._tokenizer.hf

    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide | None = None) -> "HookedTransformer":
        """Returns the model with another tokenizer."""
        wrapped = _wrap(tokenizer, default_padding_side)
        return self._make(_fit_to_tokenizer(self.cfg, wrapped), self.params, self._hooks, wrapped)

    # Parts

    @property
    def blocks(self) -> list[ModuleView]:
        """One view a layer: ``model.blocks[3].attn.W_Q``, ``model.blocks[3].ln2(residual)``."""
        return [block_view(self.cfg, self.params, layer) for layer in range(self.cfg.n_layers)]

    @property
    def embed(self) -> ModuleView:
        """``model.embed(tokens)``: token embedding."""
        return end_view(self.cfg, self.params, "embed")

    @property
    def pos_embed(self) -> ModuleView:
        """``model.pos_embed(tokens)``: learned position embedding of unpadded tokens."""
        return end_view(self.cfg, self.params, "pos_embed")

    @property
    def ln_final(self) -> ModuleView:
        """``model.ln_final(residual)``: the norm before the unembedding."""
        return end_view(self.cfg, self.params, "ln_final")

    @property
    def unembed(self) -> ModuleView:
        """``model.unembed(normalized)``: logits before any soft cap."""
        return end_view(self.cfg, self.params, "unembed")

    def tokens_to_residual_directions(self, tokens: Any) -> jax.Array:
        """Unembedding columns of tokens, ``[..., d_model]``.

        Args:
            tokens: a string that is one token, several of them, an id, or ids ``[...]``. (An id under trace that does
                not exist gives NaN.)

        Raises:
            InputError: no id of the output vocabulary.
            TokenizerError: a string is not exactly one token.
        """
        ids, _ = token_ids(self, tokens, None)
        return jnp.moveaxis(take(self.W_U, ids, axis=1), 0, -1)

    # Hooks

    @typed
    def hook_points(self, batch: int | None = None, pos: int | None = None) -> HookPointList:
        """Lists every hook point in firing order: name, axes, shape, meaning. Runs nothing.

        Args:
            batch: batch size for the shapes shown; ``None`` shows the word.
            pos: sequence length for the shapes shown; ``None`` shows the word.
        """
        return HookPointList(point_table(self.cfg).values(), batch, pos)

    @typed
    def add_hook(
        self,
        name: Any,
        hook: Callable[..., Any],
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> "HookedTransformer":
        """Returns a model with one more hook, at a name, a list of names or a predicate on names.

        Args:
            name: where.
            hook: a function of ``(activation, hook)`` that returns a new activation or ``None``, or an intervention.
            dir: ``"bwd"`` gives the function the gradient instead, inside ``jax.grad``.
            is_permanent: survives ``reset_hooks()``.
            prepend: run before the hooks already there.
        """
        return self._with_hooks(self._add([(name, hook)], dir, is_permanent, prepend))

    def add_perma_hook(self, name: Any, hook: Callable[..., Any], dir: Direction = "fwd") -> "HookedTransformer":
        """Returns a model with a hook that ``reset_hooks()`` keeps."""
        return self.add_hook(name, hook, dir, is_permanent=True)

    @typed
    def remove_hook(self, name: Any, dir: str = "both", including_permanent: bool = True) -> "HookedTransformer":
        """Returns a model without the hooks at a name, a list of names or a predicate."""
        names = select(name, point_table(self.cfg), self.cfg.n_layers)
        return self._with_hooks(self._hooks.without(names, dir, including_permanent))

    @typed
    def reset_hooks(self, direction: str = "both", including_permanent: bool = False) -> "HookedTransformer":
        """Returns a model without hooks; permanent ones stay unless asked for."""
        return self._with_hooks(self._hooks.without(None, direction, including_permanent))

    def list_hooks(self) -> dict[str, list[Callable[..., Any]]]:
        """The hooks this model carries, by name."""
        return {name: [e.function for e in entries] for name, entries in self._hooks.by_name().items()}

    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = ()) -> "HookContext":
        """``with model.hooks(fwd_hooks=[...]) as hooked:`` gives a hooked model; ``model`` itself never changes.

        Warns:
            UnusedHooksWarning: the ``as hooked`` was forgotten, so that nothing in the block ran with the hooks.
        """
        return HookContext(self.with_hooks(fwd_hooks, bwd_hooks))

    def with_hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = ()) -> "HookedTransformer":
        """Returns a model with more hooks: ``[(name | names | predicate, callable), ...]`` each way."""
        model = self._with_hooks(self._add(fwd_hooks)) if fwd_hooks else self
        return model._with_hooks(model._add(bwd_hooks, "bwd")) if bwd_hooks else model

    def _add(
        self, hooks: HookList, direction: Direction = "fwd", permanent: bool = False, prepend: bool = False
    ) -> HookDictionary:
        table = point_table(self.cfg)
        return self._hooks.add(hooks, table, self.cfg.n_layers, direction, permanent, prepend)

    def _with_hooks(self, hooks: HookDictionary) -> "HookedTransformer":
        return self._make(self.cfg, self.params, hooks, self._tokenizer)

    def _set_flag(self, name: str, value: bool) -> "HookedTransformer":
        return self.replace(cfg=self.cfg.replace(**{name: value}))

    def set_use_attn_result(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``attn.hook_result`` (naming it in a filter needs no switch)."""
        return self._set_flag("use_attn_result", value)

    def set_use_split_qkv_input(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``hook_q_input``, ``hook_k_input`` and ``hook_v_input``."""
        return self._set_flag("use_split_qkv_input", value)

    def set_use_attn_in(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``hook_attn_in``."""
        return self._set_flag("use_attn_in", value)

    def set_use_hook_mlp_in(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``hook_mlp_in``."""
        return self._set_flag("use_hook_mlp_in", value)
