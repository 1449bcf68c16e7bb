"""Errors that must name the fix."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from table import Case, World

import tljax
from tljax import HookedTransformer, patching
from tljax.checkpoints.files.hub import MODELS
from tljax.errors import (
    CheckpointError,
    InputError,
    InterventionError,
    MissingAttributeError,
    TokenizerError,
)
from tljax.viz import attention_patterns, colored_tokens


def load(change: Callable[[Path], Any]) -> Callable[[World], Any]:
    """Loads a copy of the bundled model after a change to its files."""

    def case(_: World) -> Any:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(shutil.copytree(MODELS / "tljax-tiny", Path(scratch) / "copy"))
            change(directory)
            return HookedTransformer.from_pretrained(directory)

    return case


def to_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def with_words(w: World, *words: str, **options: Any) -> HookedTransformer:
    """The small model with a tokenizer of whole words."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return w.small.set_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **options))


OPTIONS = (
    Case("an option of run_with_hooks", lambda w: w.tiny.run_with_hooks(w.S, prepend_boss=True), InputError,
         "run_with_hooks has no option 'prepend_boss'", "'prepend_bos'"),
    Case("an option of run_with_cache", lambda w: w.tiny.run_with_cache(w.S, names_filtr="z"), InputError,
         "run_with_cache has no option 'names_filtr'", "'names_filter'"),
    Case("an option of generate_stream", lambda w: list(w.tiny.generate_stream(w.S, 2, top_q=3)), InputError,
         "generate_stream has no option 'top_q'", "'top_k'"),
    Case("an option of generate_with_cache", lambda w: w.tiny.generate_with_cache(w.S, 2, seeds=3), InputError,
         "generate_with_cache has no option 'seeds'", "'seed'"),
    Case("logits asked of a stream", lambda w: list(w.tiny.generate_stream(w.S, 2, output_logits=True)), InputError,
         "generate_stream has no option 'output_logits'"),
    Case("an option of process_weights", lambda w: w.small.process_weights(fold_lnn=True), InputError,
         "process_weights has no option 'fold_lnn'", "'fold_ln'"),
    Case("an option of from_pretrained", lambda _: HookedTransformer.from_pretrained("tljax-tiny", prepend_bos=False),
         InputError, "from_pretrained has no option 'prepend_bos'", "'default_prepend_bos'"),
    Case("an option of generate", lambda w: w.tiny.generate(w.S, seeds=3), TypeError, "generate", "'seeds'"),
    Case("what replace does not take", lambda w: w.small.replace(param={}), InputError, "'param'", "'params'"),
)  # fmt: skip
INTERVENTIONS = (
    Case("Replace(None)", lambda _: tljax.Replace(None), InterventionError, "Replace", "NoneType", "tljax.Zero"),
    Case("a scale in quotes", lambda _: tljax.Scale("2"), InterventionError, "Scale", "str '2'", "Scale(2.0)"),
    Case("a list of None", lambda _: tljax.Add([1.0, None]), InterventionError, "Add", "a number or an array"),
    Case("rows of unequal length", lambda _: tljax.Add([[1.0], [2.0, 3.0]]), InterventionError, "unequal length"),
    Case("noise by name", lambda _: tljax.Noise("loud"), InterventionError, "Noise", "'loud'"),
    Case("directions that are a dict", lambda _: tljax.ProjectOut({"d": 1}), InterventionError, "ProjectOut", "dict"),
    Case("a reference by name", lambda _: tljax.Mean("batch"), InterventionError, "Mean", "'batch'"),
)
FILES = (
    Case("weights that are a directory", load(lambda d: to_directory(d / "model.safetensors")), CheckpointError,
         "model.safetensors is a directory"),
    Case("a config that is a directory", load(lambda d: to_directory(d / "config.json")), CheckpointError,
         "config.json is a directory"),
    Case("empty weights", load(lambda d: (d / "model.safetensors").write_bytes(b"")), CheckpointError,
         "is empty (0 bytes)", "fetch it again"),
    Case("damaged weights", load(lambda d: (d / "model.safetensors").write_bytes(b"abc" * 99)), CheckpointError,
         "damaged", "fetch it again"),
    Case("a config nested without end", load(lambda d: (d / "config.json").write_text("[" * 10**5)), CheckpointError,
         "config.json is not valid JSON"),
    Case("a tokenizer nested without end",
         lambda w: load(lambda d: (d / "tokenizer.json").write_text("[" * 10**5))(w).to_tokens("a"), TokenizerError,
         "tokenizer.json", "could not be loaded"),
)  # fmt: skip
NAMES = (
    Case("state_dict", lambda w: w.small.state_dict(), MissingAttributeError, "model.params"),
    Case("hook_dict", lambda w: w.small.hook_dict["hook_embed"], MissingAttributeError, "model.hook_points()"),
    Case("cuda", lambda w: w.small.cuda(), MissingAttributeError, 'model.to("gpu")'),
    Case("a device of the config", lambda w: w.small.cfg.device, MissingAttributeError, "model.to(device)"),
    Case("context of a hook",
         lambda w: w.small.run_with_hooks([[1]], fwd_hooks=[("hook_embed", lambda x, hook: hook.ctx)]),
         AttributeError, "closure"),
    Case("an encoder", lambda _: tljax.HookedEncoder, MissingAttributeError, "decoders only"),
    Case("hasattr", lambda w: [hasattr(w.small, name) for name in ("state_dict", "eval", "generate")],
         equals=[False, False, True]),
    Case("a factored matrix's mT", lambda w: (w.tiny.QK.mT.AB, w.tiny.QK.T.A.shape)[0],
         equals=lambda w: w.tiny.QK.AB.swapaxes(-1, -2)),
)  # fmt: skip
PROMPTS = (
    Case("a batch of nothing", lambda w: w.tiny.to_batch([]), InputError, "empty list", "at least one text"),
    Case("one layer as a number",
         lambda w: _sweep(w, layers=2), equals=lambda w: _sweep(w, layers=[2])),
    Case("text without BOS", lambda w: with_words(w, "the", "cat").to_tokens("the cat"), TokenizerError,
         "no BOS token", "from_pretrained(..., default_prepend_bos=False)"),
    Case("padding without PAD", lambda w: with_words(w, "the", "cat").to_tokens(["the cat", "the"], prepend_bos=False),
         TokenizerError, "no PAD token", "model.to_batch(texts)"),
    Case("what that fix gives",
         lambda w: with_words(w, "the", "cat").to_batch(["the cat", "the"], prepend_bos=False).lengths,
         equals=np.array([2, 1])),
    Case("ids as labels of a page", lambda _: ["17" in attention_patterns(ids, np.eye(3)[None]).html
                                               for ids in ([17, 4, 5], np.array([[17, 4, 5]]))], equals=[True, True]),
    Case("ids as coloured tokens", lambda _: "17" in colored_tokens([17, 4, 5], np.arange(3.0)).html, equals=True),
    Case("labels of neither kind", lambda _: attention_patterns(_mixed(), np.eye(3)[None]), InputError,
         "float 1.5", "strings, or token ids"),
    Case("a lens's table without a tokenizer", lambda w: "3" in _lens_table(w).html, equals=True),
)  # fmt: skip
CASES: tuple[Case, ...] = (*OPTIONS, *INTERVENTIONS, *FILES, *NAMES, *PROMPTS)


def _sweep(w: World, layers: Any) -> Any:
    metric = patching.LogitDiff(w.tiny.to_single_token(" Mary"), w.tiny.to_single_token(" John"))
    return patching.sweep(w.tiny, w.P, w.Q, metric, "resid_pre", layers=layers).values


def _lens_table(w: World) -> Any:
    from tljax.analysis.logit_lens import logit_lens

    return logit_lens(w.small, np.array([[1, 2, 3]]), top_k=2).table(w.small)


def _mixed() -> Any:
    return [1.5, 4, 5]
