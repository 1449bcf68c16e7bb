"""``HookedTransformer``: parameters, config, tokenizer and hooks as one immutable pytree."""

import functools
import os
from collections.abc import Sequence
from typing import Any, NoReturn, Self, TypedDict, Unpack

import jax
import jax.numpy as jnp

from tljax.cache.attribution import token_ids
from tljax.checkpoints import Loaded, load_checkpoint, load_transformer_lens, save_hf, save_in_parts, save_native
from tljax.checkpoints.layout import flatten, unflatten
from tljax.checkpoints.loading import LoadOptions, ReadOptions
from tljax.checkpoints.parameters import check_parameters
from tljax.checks import take, typed
from tljax.config import HookedTransformerConfig
from tljax.devices import names_device, resolve_device
from tljax.dictionary_params import dictionaries_in, with_dictionaries, without_dictionaries
from tljax.elsewhere import MODEL, SaysWhatInstead
from tljax.errors import ConfigError, DictionaryError, FrozenModelError, OffloadError
from tljax.generation.methods import GenerationMethods
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import point_table
from tljax.model.derivatives import DerivativeMethods
from tljax.model.hooking import HookMethods
from tljax.model.offloading import OffloadMethods
from tljax.model.quantization import QuantizationMethods
from tljax.model.sharding import ShardingMethods, placed_like
from tljax.model.splicing import SplicingMethods
from tljax.model.views import BlockViews, ModuleView, block_view, end_view
from tljax.modules.parameters import stored_dtype
from tljax.modules.stack import init_params
from tljax.numerics import available_dtype
from tljax.offload import on_host
from tljax.quantized_weight import refuse_quantized
from tljax.text.methods import TextMethods
from tljax.text.tokenizer import Tokenizer, UnreadableTokenizer, wrap_tokenizer
from tljax.text.tokenizer_files import load_tokenizer, load_tokenizer_if_possible
from tljax.typing import PaddingSide, Params
from tljax.weights.processing import process_weights
from tljax.weights.properties import WeightProperties
from tljax.weights.steps import STEPS, ProcessingOptions, processing_report
from tljax.weights.ungrouping import ungroup_heads


class Replaced(TypedDict, total=False):
    """Arguments of :meth:`HookedTransformer.replace`."""

    params: Params
    cfg: HookedTransformerConfig | dict[str, Any]
    tokenizer: Any


class PretrainedOptions(LoadOptions, total=False):
    """Options of :meth:`HookedTransformer.from_pretrained`, which documents them."""

    tokenizer: Any
    default_prepend_bos: bool | None
    default_padding_side: PaddingSide | None


def _with_tokenizer(
    cfg: HookedTransformerConfig, given: Any, default_padding_side: PaddingSide | None
) -> tuple[HookedTransformerConfig, Tokenizer | None]:
    """Returns the config adapted to a tokenizer, and the tokenizer wrapped for a model."""
    tokenizer = None if given is None else wrap_tokenizer(given, default_padding_side)
    if tokenizer is None or isinstance(tokenizer, UnreadableTokenizer):
        return cfg, tokenizer
    changes: dict[str, Any] = {"tokenizer_prepends_bos": tokenizer.prepends_bos}
    if cfg.d_vocab == -1:
        changes |= {
            "d_vocab": tokenizer.d_vocab,
            "d_vocab_out": tokenizer.d_vocab if cfg.d_vocab_out == -1 else cfg.d_vocab_out,
        }
    return cfg.replace(**changes), tokenizer


@jax.tree_util.register_pytree_with_keys_class
class HookedTransformer(
    DerivativeMethods,
    HookMethods,
    SplicingMethods,
    ShardingMethods,
    QuantizationMethods,
    OffloadMethods,
    GenerationMethods,
    TextMethods,
    WeightProperties,
    SaysWhatInstead,
):
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

    @typed
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
        config, wrapped = _with_tokenizer(config, tokenizer, default_padding_side)
        if config.d_vocab < 1:
            raise ConfigError("d_vocab is not set: give it in the config, or pass a tokenizer to take it from.")
        if params is None:
            if config.splices:
                raise ConfigError(
                    "The config has dictionaries spliced in, and no parameters were given that hold them. Make the "
                    "model of cfg.without_splices, then model.with_dictionaries(...)."
                )
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
        hooks = (f", dictionaries at {', '.join(s.writes for s in cfg.splices)}" if cfg.splices else "") + hooks
        return (
            f"HookedTransformer({cfg.model_name}: {cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads, "
            f"d_vocab {cfg.d_vocab}, n_ctx {cfg.n_ctx}, {cfg.dtype}{hooks})"
        )

    @typed
    def replace(self, **changes: Unpack[Replaced]) -> "HookedTransformer":
        """Returns a copy with another ``params``, ``cfg`` or ``tokenizer``.

        Raises:
            CheckpointError: parameters and config do not fit each other; names all that do not. Parameters may all be
                stacked along one new leading axis, which makes a model for ``jax.vmap``.
        """
        cfg, params = HookedTransformerConfig.unwrap(changes.get("cfg", self.cfg)), changes.get("params", self.params)
        if "params" in changes or "cfg" in changes:
            check_parameters(params, cfg)
        model = self._make(cfg, params, self._hooks, self._tokenizer)
        return model.set_tokenizer(changes["tokenizer"]) if "tokenizer" in changes else model

    @typed
    def set_ungroup_grouped_query_attention(self, ungroup: bool) -> "HookedTransformer":
        """Returns the model with a key/value head for every query head, so that ``hook_k`` has ``n_heads`` heads.

        The function is the same. ``False`` returns a model as it is; heads that were ungrouped stay so.
        """
        if not ungroup:
            return self
        if self.offloaded:
            raise OffloadError(
                "The blocks of this model stay on the host, and heads are ungrouped in all of them at once. Ungroup "
                "first: model.offload(None).set_ungroup_grouped_query_attention(True).offload('host')."
            )
        refuse_quantized(self.params, "Ungrouping repeats floats of keys' and values' heads")
        cfg, params = ungroup_heads(self.cfg, without_dictionaries(self.params))
        for splice in cfg.splices:
            if (
                splice.writes_every
                and point_table(self.cfg)[splice.writes].shape() != point_table(cfg)[splice.writes].shape()
            ):
                raise DictionaryError(
                    f"The dictionary at {splice.writes} reads grouped key/value heads, and ungrouping changes how many "
                    "there are: take it out first, model.without_dictionaries()."
                )
        return self.replace(cfg=cfg, params=with_dictionaries(params, dictionaries_in(self.params)))

    # Loading and saving

    @classmethod
    @functools.partial(typed, receiver=load_checkpoint)
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: PaddingSide | None = None,
        **options: Unpack[LoadOptions],
    ) -> "HookedTransformer":
        """Loads a model by alias (``"gpt2-small"``), hub id, or local directory (which never touches the network).

        Args:
            model_name: what to load; ``"tljax-tiny"`` is bundled.
            tokenizer: a tokenizer to use instead of the checkpoint's.
            default_prepend_bos: overrides the family's default.
            default_padding_side: overrides the tokenizer's.
            **options: weight processing, on by default as in TransformerLens: ``fold_ln``, ``center_writing_weights``,
                ``center_unembed``, ``fold_value_biases``; each is applied only where it leaves the model's function
                unchanged, and ``model.processing`` says which were. ``refactor_factored_attn_matrices``, off by
                default, is an error where it would change the function. ``dtype``, ``device``, ``n_devices``, ``mesh``,
                ``quantize``, ``offload``, ``revision``, ``n_ctx``, ``adapter`` and the others: see
                :func:`tljax.checkpoints.load_checkpoint`.

        Raises:
            CheckpointError: the checkpoint is incomplete or disagrees with its config.
            UnsupportedModelError: an architecture or attribute that tljax does not implement.

        A checkpoint whose tokenizer cannot be read still loads: the model takes token ids, and methods that need text
        raise a TokenizerError with the reason.
        """
        loaded = load_checkpoint(model_name, **options)
        return cls._of(loaded, tokenizer, default_prepend_bos, default_padding_side)

    @classmethod
    @typed
    def from_pretrained_no_processing(
        cls, model_name: str | os.PathLike[str], **options: Unpack[PretrainedOptions]
    ) -> "HookedTransformer":
        """Loads as :meth:`from_pretrained` does, without weight processing: all activations are Hugging Face's own."""
        unprocessed: PretrainedOptions = {**dict.fromkeys(STEPS, False), **options}  # type: ignore[typeddict-item]
        return cls.from_pretrained(model_name, **unprocessed)

    @classmethod
    @typed
    def from_transformer_lens(
        cls,
        state_dict: Any,
        cfg: Any,
        *,
        tokenizer: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: PaddingSide | None = None,
        **options: Unpack[ReadOptions],
    ) -> "HookedTransformer":
        """Loads a ``HookedTransformer`` of TransformerLens 3.9: its ``state_dict()`` and its ``cfg.to_dict()``.

        The weights are taken as they are: already folded where ``cfg`` says so (``normalization_type="LNPre"``).

        Args:
            state_dict: names to arrays (numpy, jax, torch), a safetensors file, or a file from ``torch.save`` (only
                this needs torch). Buffers (masks, rotary tables) are ignored.
            cfg: the dict, a JSON file that holds it, or the config itself. Every field of 3.9's is honoured, known to
                change nothing, or refused by name.
            tokenizer: the tokenizer. Without it the one in the directory ``cfg.tokenizer_name`` is used, if that is a
                directory: nothing is downloaded here.
            default_prepend_bos, default_padding_side: override the config's and the tokenizer's.
            **options: ``dtype`` (the config's by default), ``device``, ``mesh``, ``n_ctx`` and others; and the steps of
                weight processing, all off unless asked for: see
                :func:`tljax.checkpoints.loading.load_transformer_lens`.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape; lists them all.
            ConfigError, UnsupportedModelError: a field of ``cfg`` that does not fit, or is not implemented.
        """
        loaded = load_transformer_lens(state_dict, cfg, **options)
        return cls._of(loaded, tokenizer, default_prepend_bos, default_padding_side)

    @classmethod
    def _of(cls, loaded: Loaded, tokenizer: Any, prepend_bos: bool | None, side: PaddingSide | None) -> Self:
        if tokenizer is None and (files := loaded.tokenizer_files()) is not None:
            tokenizer = load_tokenizer_if_possible(files)
        cfg = loaded.cfg if prepend_bos is None else loaded.cfg.replace(default_prepend_bos=prepend_bos)
        return cls(cfg, tokenizer, loaded.params, side)

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises FrozenModelError, which says how a state dict becomes a model."""
        raise FrozenModelError(
            "A HookedTransformer cannot change in place, so nothing is loaded into it. For a state dict of "
            "TransformerLens: model = HookedTransformer.from_transformer_lens(state_dict, cfg), with cfg its "
            "cfg.to_dict(). For parameters of tljax: model = model.replace(params=params)."
        )

    @typed
    def save_pretrained(self, directory: str | os.PathLike[str], *, in_parts: bool = False) -> None:
        """Writes config, parameters and tokenizer so that ``from_pretrained_no_processing(directory)`` is bit-equal.

        An existing checkpoint is replaced as a whole, its tokenizer included. A process killed midway leaves the old
        checkpoint, the new one, or a directory that loading refuses. Of several processes all make this call, and the
        first of them writes.

        Args:
            directory: where; made if it does not exist. Several hosts share it.
            in_parts: write zarr arrays, of which each process writes what its devices hold, into a new directory. Needs
                ``pip install tensorstore``.
        """
        self._refuse_dictionaries("A checkpoint holds the model alone")
        params = on_host(self.params)
        if in_parts:
            return save_in_parts(params, self.cfg, self.tokenizer, directory)
        save_native(params, self.cfg, self.tokenizer, directory)

    def save_hf(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint that Hugging Face transformers loads; needs unprocessed weights of a known family.

        The tokenizer and the EOS tokens (the config's, or else the tokenizer's) are written too. An existing checkpoint
        is replaced as by :meth:`save_pretrained`.
        """
        self._refuse_dictionaries("A checkpoint holds the model alone")
        refuse_quantized(self.params, "save_hf writes floats")
        cfg, tokenizer = self.cfg, self._tokenizer
        if cfg.eos_token_ids is None and tokenizer is not None and tokenizer.eos_token_id is not None:
            cfg = cfg.replace(eos_token_ids=tokenizer.eos_token_id)
        save_hf(on_host(self.params), cfg, directory, self.tokenizer)

    @functools.partial(typed, receiver=process_weights)
    def process_weights(self, **steps: Unpack[ProcessingOptions]) -> "HookedTransformer":
        """Returns the model with processed weights; see :func:`tljax.weights.processing.process_weights`."""
        self._refuse_offloaded("Weights are processed block by block as they are read", "Name the steps there")
        self._refuse_dictionaries("Processing changes the activations that dictionaries were trained on")
        refuse_quantized(self.params, "Weight processing folds and centres floats")
        params, cfg = process_weights(self.params, self.cfg, **steps)
        return self.replace(params=placed_like(params, self.params), cfg=cfg)

    def _refuse_dictionaries(self, why: str) -> None:
        """Raises DictionaryError if dictionaries are spliced in."""
        if self.cfg.splices:
            raise DictionaryError(
                f"{why}, and a dictionary is spliced in at {self.cfg.splices[0].writes}. Take it out first, "
                "model.without_dictionaries(); it is in model.dictionaries."
            )

    def _refuse_offloaded(self, why: str, how: str) -> None:
        """Raises OffloadError if blocks stay on the host."""
        if self.offloaded:
            raise OffloadError(
                f"The blocks of this model stay on the host (offload='host'). {why}: {how}, HookedTransformer."
                "from_pretrained(..., offload='host'); or change the model before model.offload('host')."
            )

    @property
    def processing(self) -> dict[str, str]:
        """State of each weight processing step: ``"applied"``, ``"not applied"``, or why it would not be exact here."""
        return processing_report(self.cfg)

    def to(self, device_or_dtype: Any) -> "HookedTransformer":
        """Returns the model on another device (``"cpu"``, ``"gpu:0"``, a sharding) or in another dtype.

        Spliced dictionaries move along, and keep their dtype. Quantised weights keep their codes and scales: their
        floats have the new dtype.
        """
        if names_device(device_or_dtype):
            device = resolve_device(device_or_dtype)
            return self._moved(device) if self.offloaded else jax.device_put(self, device)
        self._refuse_offloaded("Their dtype is chosen as they are read", f"Pass dtype={device_or_dtype!r} there")
        dtype = available_dtype(device_or_dtype)
        own = flatten(without_dictionaries(self.params))
        params = unflatten(
            {path: leaf.astype(stored_dtype(path.rpartition(".")[2], jnp.dtype(dtype))) for path, leaf in own.items()}
        )
        params = with_dictionaries(params, dictionaries_in(self.params))
        return self.replace(params=params, cfg=self.cfg.replace(dtype=dtype))

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or ``None``."""
        return None if self._tokenizer is None else self._tokenizer.hf

    @typed
    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide | None = None) -> "HookedTransformer":
        """Returns the model with another tokenizer."""
        cfg, wrapped = _with_tokenizer(self.cfg, tokenizer, default_padding_side)
        return self._make(cfg, self.params, self._hooks, wrapped)

    # Parts

    @property
    def blocks(self) -> Sequence[ModuleView]:
        """One view a layer: ``model.blocks[3].attn.W_Q``, ``model.blocks[3].ln2(residual)``."""
        if self.offloaded:
            return BlockViews(self.cfg, self.params)
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
        """Returns the unembedding columns of tokens, ``[..., d_model]``.

        Args:
            tokens: a string that is one token, several of them, an id, or ids ``[...]``. (Under trace, an id outside
                the vocabulary gives NaN.)

        Raises:
            InputError: an id is outside the output vocabulary.
            TokenizerError: a string is not exactly one token.
        """
        ids, _ = token_ids(self, tokens, None)
        return jnp.moveaxis(take(self.W_U, ids, axis=1), 0, -1)
