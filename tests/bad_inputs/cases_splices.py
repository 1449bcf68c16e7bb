"""Dictionaries spliced into a model: wrong points, widths, kinds, models, and what cannot be done with them."""

import functools
import tempfile
from typing import Any

import numpy as np
from table import Case, World

from tljax import HookedTransformer, HookedTransformerConfig, Zero
from tljax.circuits import ResidualGraph
from tljax.dictionaries import (
    Crosscoder,
    CrosscoderConfig,
    CrossLayerConfig,
    CrossLayerTranscoder,
    Dictionary,
    DictionaryConfig,
    Tap,
)
from tljax.errors import (
    CheckpointError,
    ConfigError,
    DictionaryError,
    HookError,
    InputError,
    InterventionError,
    UnknownHookError,
)
from tljax.patching import LogProb, path_patch

IDS = np.array([[1, 2, 3]])
SITE = "blocks.0.hook_resid_pre"
PAIR = ("blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out")


def one(d_in: int = 8, d_sae: int = 5, **fields: Any) -> Dictionary:
    """A dictionary of the width of the small model."""
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    params = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    return Dictionary(params, DictionaryConfig(d_in=d_in, d_sae=d_sae, **fields))


def transcoder(reads: str | None = None, writes: str | None = None) -> Dictionary:
    return one(transcoder=True, apply_b_dec_to_input=False, tap=Tap(reads=reads, writes=writes))


def damaged() -> Dictionary:
    params = dict(one().params) | {"b_enc": np.full(5, np.nan, np.float32)}
    return one().replace(params=params)


@functools.cache
def two() -> HookedTransformer:
    """A model of two layers."""
    return HookedTransformer(World.config(n_layers=2))


def put(w: World, dictionaries: Any, **options: Any) -> HookedTransformer:
    return w.small.with_dictionaries(dictionaries, **options)


def spliced(w: World, **options: Any) -> HookedTransformer:
    return put(w, {SITE: one()}, **options)


def crosscoder() -> Crosscoder:
    shapes = {"W_enc": (2, 8, 5), "b_enc": (5,), "W_dec": (5, 2, 8), "b_dec": (2, 8)}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return Crosscoder(params, CrosscoderConfig(n_sources=2, d_in=8, d_sae=5))


def cross_layer() -> CrossLayerTranscoder:
    shapes = {"W_enc": (8, 5), "b_enc": (5,), "b_dec": (8,), "W_dec": (5, 1, 8)}
    layer = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return CrossLayerTranscoder([layer], CrossLayerConfig(n_layers=1, d_in=8, d_sae=5))


def saved(model: HookedTransformer) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)


def of_stack() -> Dictionary:
    return Dictionary({name: np.stack([array] * 2) for name, array in one().params.items()}, one().cfg)


CASES: tuple[Case, ...] = (
    Case("a point that does not exist", lambda w: put(w, {"blocks.3.hook_resid_pre": one()}), UnknownHookError, "1 la"),
    Case("a misspelt point", lambda w: put(w, {"blocks.0.hook_resid_pro": one()}), UnknownHookError, "hook_resid_pre"),
    Case("no point at all", lambda w: put(w, [one()]), DictionaryError, "does not know its hook point", "{"),
    Case("another width", lambda w: put(w, {SITE: one(32)}), DictionaryError, "width 32", "has 8", "mlp.hook_pre"),
    Case("no layer has the width", lambda w: put(w, {SITE: one(7)}), DictionaryError, "No point of this layer"),
    Case("heads of another width", lambda w: put(w, {"blocks.0.attn.hook_z": one(7)}), DictionaryError, "2 heads of 4"),
    Case("two at one point", lambda w: spliced(w).with_dictionaries({SITE: one()}), DictionaryError, "already", SITE),
    Case("two at one point, in a list", lambda w: put(w, [one(tap=Tap(reads=SITE))] * 2), DictionaryError, "already"),
    Case("not a number", lambda w: put(w, {SITE: damaged()}), DictionaryError, "b_enc", "not finite"),
    Case("arrays", lambda w: put(w, {SITE: one().params}), DictionaryError, "got dict", "Dictionary.from_pretrained"),
    Case("a name", lambda w: put(w, SITE), DictionaryError, "got str", "{name of a hook point"),
    Case("a crosscoder", lambda w: put(w, {SITE: crosscoder()}), DictionaryError, "crosscoder.encode"),
    Case("a cross-layer transcoder", lambda w: put(w, cross_layer()), DictionaryError, "hook_mlp_out"),
    Case("a stack", lambda w: put(w, {SITE: of_stack()}), DictionaryError, "is a stack", "jax.vmap"),
    Case(
        "a selection over the batch", lambda w: put(w, {SITE: one(architecture="batchtopk", k=2)}), DictionaryError,
        "threshold", "jumprelu",
    ),
    Case("attention patterns", lambda w: put(w, {"pattern0": one()}), DictionaryError, "axes ('batch', 'head'"),
    Case("the final norm", lambda w: put(w, {"ln_final.hook_normalized": one()}), UnknownHookError, "hook point"),
    Case("the unembedding", lambda w: put(w, {"unembed.hook_in": one()}), DictionaryError, "blocks.0.hook_resid_post"),
    Case(
        "a transcoder with one name", lambda w: put(w, {PAIR[1]: transcoder()}), DictionaryError, "Give both", "ln2",
    ),
    Case("two names without a transcoder", lambda w: put(w, {PAIR: one()}), DictionaryError, "transcoder=True"),
    Case("a transcoder backwards", lambda w: put(w, {PAIR[::-1]: transcoder()}), DictionaryError, "computed after"),
    Case(
        "a transcoder across blocks",
        lambda w: two().with_dictionaries({("blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out"): transcoder()}),
        DictionaryError, "in one block", "hook_resid_pre of the next",
    ),
    Case(
        "a head that does not exist",
        lambda w: put(w, [one(4, tap=Tap(reads="blocks.0.attn.hook_z", head=5))]), DictionaryError, "head 5", "2 heads",
    ),
    Case(
        "of another model",
        lambda w: w.small.replace(cfg=World.config(model_name="pythia-70m")).with_dictionaries(
            [one(tap=Tap(reads=SITE, model_name="gpt2-small"))]
        ),
        DictionaryError, "gpt2-small", "pythia-70m", "any_model=True",
    ),
    Case("a token that does not exist", lambda w: spliced(w, exclude_tokens=[12]), DictionaryError, "0 to 11"),
    Case("special tokens of no tokenizer", lambda w: spliced(w, exclude_tokens="special"), DictionaryError, "give ids"),
    Case(
        "excluded tokens of an unknown text",
        lambda w: spliced(w, exclude_tokens=[1])(np.zeros((1, 3, 8), np.float32), start_at_layer=0),
        InputError, "exclude_tokens", "Pass tokens=",
    ),
    Case(
        "excluded tokens of a stream with its tokens",
        lambda w: spliced(w, exclude_tokens=[1])(w.small(IDS, stop_at_layer=0), start_at_layer=0, tokens=IDS),
        equals=lambda w: spliced(w, exclude_tokens=[1])(IDS),
    ),
    Case("a misspelt option", lambda w: spliced(w, error="none"), InputError, "'keep', 'drop'"),
    Case("none to take out", lambda w: w.small.without_dictionaries(SITE), DictionaryError, "The model has none"),
    Case("another to take out", lambda w: spliced(w).without_dictionaries("resid_post0"), DictionaryError, SITE),
    Case(
        "a hook at a dictionary that is taken out",
        lambda w: spliced(w).add_hook(f"{SITE}.hook_sae_acts_post", Zero(feature=1)).without_dictionaries(),
        HookError, "remove_hook",
    ),
    Case(
        "a feature that does not exist",
        lambda w: spliced(w).run_with_hooks(IDS, fwd_hooks=[(f"{SITE}.hook_sae_acts_post", Zero(feature=5))]),
        InterventionError, "feature=5",
    ),
    Case("its points without it", lambda w: w.small.run_with_hooks(
        IDS, fwd_hooks=[(f"{SITE}.hook_sae_acts_post", Zero(feature=1))]), UnknownHookError, "hook_resid_pre"),
    Case("a checkpoint", lambda w: saved(spliced(w)), DictionaryError, "without_dictionaries"),
    Case("processing", lambda w: spliced(w).process_weights(fold_ln=True), DictionaryError, "without_dictionaries"),
    Case("a residual graph", lambda w: ResidualGraph.of(spliced(w)), InputError, "without_dictionaries"),
    Case(
        "path patching", lambda w: path_patch(spliced(w), IDS, IDS[:, ::-1], LogProb(1), "logits"), InputError,
        "spliced in at", "sweep",
    ),
    Case(
        "the stream as a sum", lambda w: spliced(w).run_with_cache(IDS)[1].decompose_resid(), InputError,
        "spliced in at", "W_dec",
    ),
    Case(
        "parameters of the unspliced model", lambda w: spliced(w).replace(params=w.small.params), CheckpointError, SITE,
        "absent",
    ),
    Case("a config without parameters", lambda w: HookedTransformer(spliced(w).cfg), ConfigError, "without_splices"),
    Case(
        "a config is kept without them",
        lambda w: HookedTransformerConfig.from_dict(spliced(w).cfg.to_dict()) == w.small.cfg, equals=True,
    ),
    Case("SAEs that outlive the call", lambda w: w.small.run_with_saes(IDS, saes=[one()], reset_saes_end=False),
         DictionaryError, "with_dictionaries"),
)  # fmt: skip
