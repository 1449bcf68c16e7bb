"""Harvests: what cannot be stored, stores that are damaged or of something else, readers that ask for too much."""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax import Replace
from tljax.errors import ArgumentError, DictionaryError, HarvestError, InputError, TokenizerError, UnknownHookError
from tljax.harvest import ActivationBuffer, ActivationStore, CodeStore, estimate_harvest, harvest, harvest_codes

POINT = "blocks.1.hook_resid_post"
ROWS = np.random.default_rng(0).integers(1, 900, (8, 8)).astype(np.int32)


def new() -> Path:
    return Path(tempfile.mkdtemp()) / "store"


def run(w: World, prompts: Any = ROWS, points: Any = POINT, **options: Any) -> ActivationStore:
    return harvest(w.tiny, prompts, points, options.pop("directory", None) or new(), batch_size=4, **options)


@functools.cache
def stored(w: World) -> Path:
    return run(w, shard_bytes=1).directory


def changed(w: World, change: Callable[[Path], Any]) -> Path:
    """A copy of a store of two shards, after a change."""
    directory = new()
    shutil.copytree(stored(w), directory)
    change(directory)
    return directory


def cut(directory: Path) -> None:
    path = directory / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def halve(directory: Path) -> None:
    path = directory / "index.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def stop(directory: Path) -> None:
    path = directory / "index.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))


def mix(w: World) -> Callable[[Path], None]:
    """Puts a float16 shard, of the size that the index says, among bfloat16 ones."""

    def into(directory: Path) -> None:
        other = run(w, shard_bytes=1, dtype="float16").directory
        name = "shard-00001.safetensors"
        data = (other / name).read_bytes()
        size = (directory / name).stat().st_size
        index = directory / "index.json"
        index.write_text(index.read_text().replace(str(size), str(len(data))))
        (directory / name).write_bytes(data)

    return into


def file(text: str, name: str) -> Path:
    path = Path(tempfile.mkdtemp()) / name
    path.write_text(text)
    return path


def occupied() -> Path:
    return file("my thesis", "thesis.txt").parent


def nan_model(w: World, layer: int) -> Any:
    """A model whose block gives NaN."""
    return w.tiny.add_hook(f"blocks.{layer}.hook_mlp_out", Replace(jnp.full(64, jnp.nan), pos=3))


CASES: tuple[Case, ...] = (
    Case("a store cut short", lambda w: ActivationStore.open(changed(w, cut)), HarvestError, "shard-00001",
         "cut short"),
    Case("a shard that is missing",
         lambda w: ActivationStore.open(changed(w, lambda at: (at / "shard-00000.safetensors").unlink())), HarvestError,
         "shard-00000.safetensors is missing", "lists 2 shards"),
    Case("half an index", lambda w: ActivationStore.open(changed(w, halve)), HarvestError, "index.json is damaged"),
    Case("a harvest that was stopped", lambda w: ActivationStore.open(changed(w, stop)), HarvestError,
         "stopped after 2 shards", "make the same call again", "partial=True"),
    Case("shards of two dtypes", lambda w: ActivationStore.open(changed(w, mix(w))), HarvestError, "float16",
         "the index says bfloat16", "two harvests were mixed"),
    Case("another model's store", lambda w: ActivationStore.open(stored(w)).check(w.small), HarvestError,
         "another model", "d_model=64 there, 8 here"),
    Case("going on with another model",
         lambda w: harvest(w.small, [[1] * 4] * 8, "hook_embed", stored(w), prepend_bos=False), HarvestError,
         "another harvest", "the model: ", "d_model=64 there, 8 here"),
    Case("activations opened as codes", lambda w: CodeStore.open(stored(w)), HarvestError, "ActivationStore.open"),
    Case("no store", lambda _: ActivationStore.open("/nowhere"), HarvestError, "no such directory"),
    Case("a directory that holds something else", lambda w: run(w, directory=occupied()), HarvestError,
         "holds something else (thesis.txt)", "empty or a new directory"),
    Case("a directory of another program's shards",
         lambda w: run(w, directory=file("x", "shard-00000.safetensors").parent), HarvestError, "holds something else"),
    Case("a store in place of a directory", lambda w: run(w, directory=file("", "a.txt")), HarvestError, "is a file"),
    Case("no prompts", lambda w: run(w, []), InputError, "too few tokens for one window", "context_size=128"),
    Case("empty texts", lambda w: run(w, ["", ""], packed=False), InputError, "holds no tokens"),
    Case("a text shorter than a window", lambda w: run(w, w.P), InputError, "too few tokens", "packed=False"),
    Case("a context longer than the model's", lambda w: run(w, [w.P], context_size=129), InputError,
         "context_size=129", "n_ctx=128"),
    Case("rows longer than the model's context", lambda w: run(w, np.ones((2, 200), int)), InputError, "n_ctx=128"),
    Case("rows of another length", lambda w: run(w, context_size=4), InputError, "rows have 8 tokens"),
    Case("rows that are not numbers of tokens", lambda w: run(w, ROWS + 0.5), InputError, "whole numbers"),
    Case("ids outside the vocabulary", lambda w: run(w, ROWS + 900), InputError, "outside the vocabulary"),
    Case("one row of tokens", lambda w: run(w, ROWS[0]), InputError, "[row, pos]", "(8,)"),
    Case("a number for a text", lambda w: run(w, [w.P, 7]), InputError, "prompts[1]", "neither a text"),
    Case("a file that is not there", lambda w: run(w, ["texts.txt"]), InputError, "no file texts.txt"),
    Case("a file of another kind", lambda w: run(w, Path("texts.csv")), InputError, "neither a .txt nor a .jsonl"),
    Case("a line without the text", lambda w: run(w, file('{"txt": "a"}', "a.jsonl")), InputError, "line 1",
         "'txt'", "field="),
    Case("half a line", lambda w: run(w, file('{"text": "a"}\n{"te', "a.jsonl")), InputError, "line 2", "half written"),
    Case("activations that are NaN", lambda w: harvest(nan_model(w, 1), ROWS, [POINT, "hook_embed"], new()),
         HarvestError, f"{POINT} (layer 1) is NaN at position 3 of window 0", "nothing of this shard is written"),
    Case("activations beyond float16",
         lambda w: harvest(w.tiny.add_hook(POINT, Replace(jnp.full(64, 1e6))), ROWS, POINT, new(), dtype="float16"),
         HarvestError, "infinite", "bfloat16"),
    Case("a point that does not exist", lambda w: run(w, points="blocks.1.hook_resid_pots"), UnknownHookError,
         "Did you mean 'blocks.1.hook_resid_post'"),
    Case("no point", lambda w: run(w, points=None), UnknownHookError, "points= is None"),
    Case("a point without positions", lambda w: run(w, points="blocks.0.attn.hook_pattern"), HarvestError,
         "query_pos, key_pos", "second axis is pos"),
    Case("token ids as activations", lambda w: run(w, points="hook_tokens"), HarvestError, "whole numbers"),
    Case("a dtype that is not offered", lambda w: run(w, dtype="float8"), InputError, "dtype='float8'", "'bfloat16'"),
    Case("an option that is misspelt", lambda w: run(w, max_norm_ration=10), ArgumentError,
         "Did you mean 'max_norm_ratio'"),
    Case("a ratio of nothing", lambda w: run(w, max_norm_ratio=0), InputError, "max_norm_ratio=0", "positive"),
    Case("a limit of nothing", lambda w: run(w, limit=0), InputError, "limit=0", "at least 1"),
    Case("everything left out", lambda w: run(w, skip_special=np.unique(ROWS)), HarvestError, "holds no tokens"),
    Case("special tokens of a model without",
         lambda w: harvest(w.small, ROWS[:, :4] % 12, "hook_embed", new(), skip_special=True), InputError,
         "no special tokens"),
    Case("BOS of a model without", lambda w: harvest(w.small, [[1] * 9], "hook_embed", new()), TokenizerError, "BOS"),
    Case("a separator of documents cut alone", lambda w: run(w, [w.P], packed=False, separator="eos"), InputError,
         "joins none"),
    Case("a point that is not stored", lambda w: ActivationStore.open(stored(w))["blocks.1.hook_resid_pre"],
         HarvestError, "not stored", f"Did you mean '{POINT}'"),
    Case("a covariance that was not asked for", lambda w: ActivationStore.open(stored(w)).statistics().covariance,
         HarvestError, "covariance=True"),
    Case("a token beyond the last", lambda w: ActivationStore.open(stored(w)).example(64), HarvestError,
         "token=64", "64 stored"),
    Case("a batch of nothing", lambda w: ActivationStore.open(stored(w)).reader(0), HarvestError, "batch_size=0"),
    Case("a negative step", lambda w: ActivationStore.open(stored(w)).reader(8).batch(-1), HarvestError, "step=-1"),
    Case("a batch larger than the store", lambda w: ActivationStore.open(stored(w)).reader(100)(0).shape,
         equals=(100, 64)),
    Case("a buffer of one batch", lambda w: ActivationBuffer(w.tiny, ROWS, POINT, 64, buffer_tokens=100), HarvestError,
         "less than two batches"),
    Case("another buffer's state",
         lambda w: ActivationBuffer(w.tiny, ROWS, POINT, 4, buffer_tokens=16).restore({"seed": 0}), HarvestError,
         "not the state of a buffer"),
    Case("an estimate of no tokens", lambda w: estimate_harvest(w.tiny, 0, POINT), InputError, "n_tokens=0"),
    Case("codes of a dictionary that names no point", lambda w: harvest_codes(w.tiny, dictionary(), ROWS, new()),
         DictionaryError, "which hook point it reads", "point="),
    Case("codes of another width", lambda w: harvest_codes(w.tiny, dictionary(), ROWS, new(), point=POINT),
         DictionaryError, "does not fit", "64 wide", "4 wide"),
)  # fmt: skip


def dictionary() -> Any:
    from tljax.dictionaries import Dictionary, DictionaryConfig

    params = {"W_enc": jnp.ones((4, 6)), "b_enc": jnp.ones(6), "W_dec": jnp.ones((6, 4)), "b_dec": jnp.ones(4)}
    return Dictionary(params, DictionaryConfig(d_in=4, d_sae=6))
