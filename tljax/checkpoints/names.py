"""Short names of checkpoints on the hub, and the training checkpoints they were published with."""

from collections.abc import Iterator

from tljax.errors import CheckpointError, InputError, nearest

_PYTHIA = {
    "14m": "", "31m": "", "70m": "19m", "160m": "125m", "410m": "350m", "1b": "800m", "1.4b": "1.3b",
    "2.8b": "2.7b", "6.9b": "6.7b", "12b": "13b",
}  # fmt: skip
_LLAMA = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2-7b-chat",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-2-13b-chat-hf": "llama-2-13b-chat",
    "meta-llama/Llama-2-70b-hf": "llama-2-70b",
    "meta-llama/Llama-2-70b-chat-hf": "llama-2-70b-chat meta-llama-2-70b-chat-hf",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b-instruct",
    "meta-llama/Meta-Llama-3-70B": "llama-3-70b",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama-3-70b-instruct",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b-instruct",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b-instruct",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b-instruct",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama-3.2-3b-instruct",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b-instruct",
    "codellama/CodeLlama-7b-hf": "codellama-7b codellamallama-2-7b",
    "codellama/CodeLlama-7b-Python-hf": "codellama-7b-python",
    "codellama/CodeLlama-7b-Instruct-hf": "codellama-7b-instruct",
    "01-ai/Yi-6B": "yi-6b",
    "01-ai/Yi-6B-Chat": "yi-6b-chat",
    "01-ai/Yi-34B": "yi-34b",
    "01-ai/Yi-34B-Chat": "yi-34b-chat",
}
_OTHERS = {
    "openai-community/gpt2": "gpt2 gpt2-small",
    "openai-community/gpt2-medium": "gpt2-medium",
    "openai-community/gpt2-large": "gpt2-large",
    "openai-community/gpt2-xl": "gpt2-xl",
    "distilbert/distilgpt2": "distilgpt2 distillgpt2 distill-gpt2 distil-gpt2 gpt2-xs",
    "ai-forever/mGPT": "mgpt",
    "EleutherAI/gpt-neox-20b": "gpt-neox-20b gpt-neox neox",
    "stabilityai/stablelm-base-alpha-3b": "stablelm-base-alpha-3b stablelm-base-3b",
    "stabilityai/stablelm-base-alpha-7b": "stablelm-base-alpha-7b stablelm-base-7b",
    "stabilityai/stablelm-tuned-alpha-3b": "stablelm-tuned-alpha-3b stablelm-tuned-3b",
    "stabilityai/stablelm-tuned-alpha-7b": "stablelm-tuned-alpha-7b stablelm-tuned-7b",
}
_STANFORD = {
    "small": ("alias", 21, "battlestar", 49, "caprica", 81, "darkmatter", 343, "expanse", 777),
    "medium": ("arwen", 21, "beren", 49, "celebrimbor", 81, "durin", 343, "eowyn", 777),
}


def _published() -> Iterator[tuple[str, str]]:
    """Yields hub ids with their short names, separated by spaces."""
    yield from (*_OTHERS.items(), *_LLAMA.items())
    for size, old in _PYTHIA.items():
        variants = ["", "-deduped", "-v0", "-deduped-v0"] if old else [""]
        seeds = ["-seed1", "-seed2", "-seed3"] if size == "160m" else []
        for variant in variants + seeds:
            former = f"EleutherAI/pythia-{old}{variant} pythia-{old}{variant}" if old else ""
            bare = f"pythia{variant}" if size == "70m" and variant in ("", "-v0") else ""
            yield f"EleutherAI/pythia-{size}{variant}", f"pythia-{size}{variant} {former} {bare}"
    for size, names in _STANFORD.items():
        for letter, name, seed in zip("abcde", names[::2], names[1::2], strict=True):
            short = f"stanford-gpt2-{size}-{letter} gpt2-stanford-{size}-{letter} gpt2-mistral-{size}-{letter}"
            yield f"stanford-crfm/{name}-gpt2-{size}-x{seed}", f"{name}-gpt2-{size}-x{seed} {short}"


ALIASES: dict[str, str] = {name.lower(): repo for repo, names in _published() for name in (repo, *names.split())}
"""Lower-case name or id → hub id."""


def hub_id(name: str) -> str:
    """Returns the hub id of a name: an alias in any case, or any ``owner/name``.

    >>> hub_id("gpt2-small"), hub_id("Pythia-70M"), hub_id("someone/some-model")
    ('openai-community/gpt2', 'EleutherAI/pythia-70m', 'someone/some-model')
    """
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        return name
    raise CheckpointError(
        f"{name!r} is neither a directory, nor a known model name, nor a hub id of the form 'owner/name'."
        f"{nearest(name.lower(), ALIASES)}"
    )


def checkpoint_labels(repo: str) -> tuple[tuple[int, ...], str]:
    """Returns the published training checkpoints of a hub id, and the prefix of their revisions.

    >>> checkpoint_labels("EleutherAI/pythia-70m")[0][:6]
    (0, 1, 2, 4, 8, 16)

    Raises:
        InputError: the model has no known training checkpoints.
    """
    owner, _, name = repo.partition("/")
    if owner == "EleutherAI" and name.startswith("pythia"):
        early = () if "-v0" in name else (0, *(2**i for i in range(10)))
        return (*early, *range(1000, 143001, 1000)), "step"
    if owner == "stanford-crfm":
        spans = ((0, 100, 10), (100, 2000, 50), (2000, 20000, 100), (20000, 400001, 1000))
        return tuple(step for span in spans for step in range(*span)), "checkpoint-"
    raise InputError(
        f"tljax knows no training checkpoints of {repo}. Pass revision= with a branch, tag or commit instead."
    )


def checkpoint_revision(repo: str, value: int | None, index: int | None) -> str:
    """Returns the revision of a training checkpoint, chosen by its step or by its place in the list."""
    labels, prefix = checkpoint_labels(repo)
    if value is None and index is not None:
        if not -len(labels) <= index < len(labels):
            raise InputError(f"checkpoint_index={index} is out of range: {repo} has {len(labels)} checkpoints.")
        value = labels[index]
    if value not in labels:
        close = sorted(labels, key=lambda label: abs(label - (value or 0)))[:2]
        raise InputError(f"{repo} has no checkpoint at step {value}: the nearest are {sorted(close)}.")
    return f"{prefix}{value}"
