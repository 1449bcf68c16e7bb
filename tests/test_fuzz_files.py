"""Mutated files of tljax's own: each loads equal to what was saved, or gives tljax's error; nothing else, and no hang.

Files are mutated as they are written (with checksums), and as they were before there were checksums. Of the latter a
change of one plausible number by another cannot be seen: there what is seen must be refused, and no error be foreign.
"""

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax import ActivationCache, HookedTransformer, HookedTransformerConfig
from tljax.analysis.jacobian_lens import JacobianLens
from tljax.analysis.lens_basis import LensBasis
from tljax.analysis.tuned_lens import TunedLens
from tljax.errors import TljaxError
from tljax.fingerprint import stored_config
from tljax.train.checkpoint import load_state, save_state

SEED, ROUNDS = 14, 110
D, L = 8, 3
TOKENS = jnp.asarray([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
RUN = {"learning_rate": 0.1, "steps": 4}
HISTORY = [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.0}]
HOOKS = [
    ("blocks.1.attn.hook_z", tljax.Replace(jnp.arange(4.0), pos=3, head=[0, 1])),
    ("blocks.1.attn.hook_z", tljax.Chain(tljax.Zero(head=slice(0, 1)), tljax.Scale(2.0, mask=np.ones((2, 4), bool)))),
    ("blocks.0.hook_resid_post", tljax.Mean(over=("batch", "pos"), d_model=np.arange(D) < 4)),
    ("blocks.0.hook_resid_post", tljax.ProjectOut(np.ones((2, D)) + np.eye(2, D), pos="prompt")),
    ("blocks.0.hook_mlp_out", tljax.Noise(0.5, seed=3)),
]

Header = dict[str, Any]
Content = tuple[Header, dict[str, tuple[str, list[int], bytes]]]
"""Metadata, and dtype, shape and bytes by name."""


@pytest.fixture(scope="module")
def small() -> HookedTransformer:
    cfg = HookedTransformerConfig(d_model=D, n_heads=2, n_layers=L, n_ctx=6, d_vocab=7, act_fn="gelu", d_mlp=10)
    return HookedTransformer(cfg)


class Kind:
    """One kind of file: how it is written, and read back as arrays and plain values."""

    def __init__(self, file: str, write: Callable[[Any, Path], None], read: Callable[[Any, Path], Any]) -> None:
        self.file, self.write, self.read = file, write, read


def _cache(model: Any) -> ActivationCache:
    _, cache = model.run_with_cache(TOKENS, names_filter=["hook_tokens", "z1", "resid_post0", "scale"])
    return ActivationCache(cache.cache_dict, model, token_mask=jnp.asarray([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]))


def _read_cache(_: Any, path: Path) -> Any:
    cache = ActivationCache.load(path)
    return dict(cache), list(cache), cache.has_batch_dim, cache.fingerprint, cache._padding


def _lens(kind: type, model: Any) -> Any:
    basis, values = LensBasis.of(model), np.random.default_rng(0).normal(size=(L, D, D)).astype(np.float32)
    if kind is TunedLens:
        losses = jnp.asarray(values[0, :5, :L])
        return TunedLens(weight=jnp.asarray(values), bias=jnp.asarray(values[:, 0]), losses=losses, basis=basis)
    return JacobianLens(
        matrices=jnp.asarray(values[:2]), layers=(1, 0), n_prompts=5, skip_first_positions=2, basis=basis
    )


def _read_lens(kind: type) -> Callable[[Any, Path], Any]:
    def read(_: Any, path: Path) -> Any:
        lens = kind.load(path)  # type: ignore[attr-defined]
        return jax.tree.leaves(lens), jax.tree.structure(lens)

    return read


def _read_hooks(_: Any, path: Path) -> Any:
    hooks = tljax.load_interventions(path)
    return [name for name, _ in hooks], jax.tree.leaves(hooks), jax.tree.structure([hook for _, hook in hooks])


def _read_model(_: Any, path: Path) -> Any:
    model = HookedTransformer.from_pretrained_no_processing(path.parent)
    return jax.tree.leaves(model.params), model.cfg.replace(model_name="", tokenizer_name=None)


KINDS = {
    "cache": Kind("a.safetensors", lambda model, path: _cache(model).save(path), _read_cache),
    "interventions": Kind(
        "a.safetensors", lambda model, path: tljax.save_interventions(HOOKS, path, model), _read_hooks
    ),
    "tuned lens": Kind("a.safetensors", lambda model, path: _lens(TunedLens, model).save(path), _read_lens(TunedLens)),
    "Jacobian lens": Kind(
        "a.safetensors", lambda model, path: _lens(JacobianLens, model).save(path), _read_lens(JacobianLens)
    ),
    "training state": Kind(
        "training_state.safetensors",
        lambda model, path: save_state(path.parent, model.params, 3, HISTORY, RUN, model.cfg),
        lambda model, path: load_state(path.parent, model.params, RUN, model.cfg),
    ),
    "checkpoint": Kind("model.safetensors", lambda model, path: model.save_pretrained(path.parent), _read_model),
    "checkpoint's config": Kind("config.json", lambda model, path: model.save_pretrained(path.parent), _read_model),
}


def unpack(raw: bytes) -> Content:
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: (one["dtype"], one["shape"], body[slice(*one["data_offsets"])]) for name, one in header.items()
    }


def pack(content: Content) -> bytes:
    metadata, tensors = content
    header: Header = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def unsealed(raw: bytes) -> bytes:
    """The file as it was before there were checksums and fingerprints."""
    metadata, tensors = unpack(raw)
    return pack(({k: v for k, v in metadata.items() if k not in ("seal", "checksums", "weights", "model")}, tensors))


# Mutations of bytes: what a bad disk, a cut download, a text editor leave.


def flip(raw: bytes, rng: random.Random) -> bytes:
    return flip_below(raw, rng, len(raw))


def flip_in_header(raw: bytes, rng: random.Random) -> bytes:
    return flip_below(raw, rng, min(len(raw), 8 + int.from_bytes(raw[:8], "little")))


def flip_below(raw: bytes, rng: random.Random, end: int) -> bytes:
    place = rng.randrange(end)
    return raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :]


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def lie_about_length(raw: bytes, rng: random.Random) -> bytes:
    return rng.choice([0, 1, 7, len(raw), 2**31, 2**62, 2**64 - 1]).to_bytes(8, "little") + raw[8:]


BYTES = (flip, flip_in_header, cut, lie_about_length)

# Mutations of the content: what a script that rewrites a file does. All can be seen.

_WRONG = [
    "NaN",
    "[" * 3000 + "]" * 3000,
    "null",
    "2147483648",
    "1e999",
    '"x"',
    "[]",
    "{}",
    "-1",
    "true",
    "9" * 5000,
    "",
]


def drop_array(content: Content, rng: random.Random) -> None:
    del content[1][rng.choice([name for name in content[1] if not name.startswith("padding")])]  # which may be absent


def rename_array(content: Content, rng: random.Random) -> None:
    name = rng.choice(list(content[1]))
    content[1][name + rng.choice(["x", ".0", "é"])] = content[1].pop(name)


def add_array(content: Content, rng: random.Random) -> None:
    content[1]["more"] = ("F32", [1], b"\0\0\0\0")


def turn_array(content: Content, rng: random.Random) -> None:
    turned = [name for name, (_, shape, _) in content[1].items() if shape and (len(shape) > 1 or shape[0] > 1)]
    name = rng.choice(turned)
    dtype, shape, data = content[1][name]
    content[1][name] = (dtype, [*shape, 1] if shape == shape[::-1] else shape[::-1], data)


def retype_array(content: Content, rng: random.Random) -> None:
    name = rng.choice([name for name, (dtype, _, _) in content[1].items() if dtype == "F32"])
    _, shape, data = content[1][name]
    content[1][name] = ("I32", shape, data)


def wrong_entry(content: Content, rng: random.Random) -> None:
    content[0][rng.choice(list(content[0]))] = rng.choice(_WRONG)


def drop_entry(content: Content, rng: random.Random) -> None:
    del content[0][rng.choice([key for key in content[0] if key != "checksums"])]


def wrong_within(content: Content, rng: random.Random) -> None:
    """Somewhere deep in an entry, a value of another type."""
    entry = rng.choice([key for key, value in content[0].items() if value[:1] in "[{" and value not in ("[]", "{}")])
    value = json.loads(content[0][entry])
    node, key = rng.choice(list(_places(value)))
    before = node[key]
    node[key] = rng.choice(
        [v for v in (None, "x", -7, True, 1e30, [], {}, 2**70, [[1]]) if type(v) is not type(before)]
    )
    content[0][entry] = json.dumps(value)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(child, dict | list):
            yield from _places(child)


CONTENT = (
    drop_array, rename_array, add_array, turn_array, retype_array, wrong_entry, drop_entry, wrong_within,
)  # fmt: skip


def same(one: Any, two: Any) -> bool:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(two)
    if jax.tree.structure(one) != jax.tree.structure(two):
        return False
    return all(_equal(a, b) for a, b in zip(leaves, others, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, jax.Array | np.ndarray):
        return type(a) is type(b) and a == b
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Stops a reader that would never end."""

    def stop(*_: object) -> None:
        raise TimeoutError("a mutated file was read for a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, model: Any, path: Path, expected: Any) -> str:
    """What reading gives; only the first two are right for a file with checksums."""
    try:
        found = kind.read(model, path)
    except TljaxError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "equal" if same(found, expected) else "different"


@pytest.mark.parametrize("age", ["sealed", "old"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "checkpoint's config"])
def test_mutated_files(name: str, age: str, small: HookedTransformer, tmp_path: Path) -> None:
    kind, rng = KINDS[name], random.Random(f"{SEED} {name} {age}")
    path = tmp_path / kind.file
    kind.write(small, path)
    raw = path.read_bytes()
    if age == "old":
        raw = unsealed(raw)
        _unseal_config(tmp_path)
        path.write_bytes(raw)
    expected = kind.read(small, path)
    wrong, refused = [], 0
    for number in range(ROUNDS):
        mutate = (BYTES + CONTENT)[number % len(BYTES + CONTENT)]
        if mutate in BYTES:
            mutated = mutate(raw, rng)  # type: ignore[arg-type]
        else:
            content = unpack(raw)
            if mutate is wrong_within and set(content[0]) <= {"format", "seal"}:
                continue
            mutate(content, rng)  # type: ignore[arg-type]
            mutated = pack(content)
        path.write_bytes(mutated)
        found = outcome(kind, small, path, expected)
        refused += found == "refused"
        unseen = age == "old" and (mutate in BYTES or _is_plausible(mutate, name))
        if found not in ("refused", "equal") and not (found == "different" and unseen):
            wrong.append(f"{mutate.__name__}: {found}")
    assert not wrong, "\n".join(wrong)
    assert refused > ROUNDS // 2


def _is_plausible(mutate: Callable[..., Any], name: str) -> bool:
    """Changes that no reader can see where there are no checksums: a name for a model, another number of layers …"""
    return (
        mutate in (wrong_within, wrong_entry)
        or (mutate in (turn_array, rename_array) and name == "cache")
        or (mutate is turn_array and name == "interventions")
    )


def _unseal_config(directory: Path) -> None:
    if (config := directory / "config.json").is_file():
        fields = json.loads(config.read_text())
        config.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("tljax_checksum", "tljax_weights")}))


@pytest.mark.parametrize("age", ["sealed", "old"])
def test_mutated_configs(age: str, small: HookedTransformer, tmp_path: Path) -> None:
    kind, rng = KINDS["checkpoint's config"], random.Random(f"{SEED} {age}")
    path = tmp_path / kind.file
    kind.write(small, path)
    if age == "old":
        shutil.copy(path, tmp_path / "kept")
        (tmp_path / "model.safetensors").write_bytes(unsealed((tmp_path / "model.safetensors").read_bytes()))
        _unseal_config(tmp_path)
    raw = path.read_bytes()
    expected = kind.read(small, path)
    wrong = []
    for number in range(ROUNDS):
        if number % 3 == 0:
            mutated = (flip, cut)[number % 2](raw, rng)
        else:
            fields = json.loads(raw)
            fields[rng.choice(list(fields))] = "@"
            mutated = json.dumps(fields).replace('"@"', rng.choice(_WRONG)).encode()
        path.write_bytes(mutated)
        found = outcome(kind, small, path, expected)
        if found not in ("refused", "equal") and not (found == "different" and age == "old"):
            wrong.append(f"{number}: {found}")
    assert not wrong, "\n".join(wrong)


def test_a_config_of_no_model_is_refused_at_once() -> None:
    fields = HookedTransformerConfig(d_model=D, n_heads=2, n_layers=L, n_ctx=6, d_vocab=7).to_dict()
    assert stored_config(fields).to_dict() == fields
    for change in ({"n_layers": 10**7}, {"act_fn": {}}, {"eps": "small"}, {"model_name": [[1]]}, {"n_heads": None}):
        with pytest.raises(ValueError, match=r"\S"):
            stored_config(fields | change)
