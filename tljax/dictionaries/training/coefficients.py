"""The numbers of a training run as data: what may differ within a stack, and how it changes with the step."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tljax.dictionaries.training.config import DEFAULTS, TrainingConfig
from tljax.errors import ConfigError

Numbers = dict[str, jax.Array]
"""Scalars by name, float32; in a stack ``[member]``."""

VARYING = (
    "k", "l1_coefficient", "l0_coefficient", "l0_target", "pre_act_loss_coefficient", "aux_loss_coefficient",
    "topk_threshold_lr", "jumprelu_bandwidth", "jumprelu_init_threshold", "jumprelu_tanh_scale", "lr", "lr_end", "clip",
    "l1_warm_up_steps", "l0_warm_up_steps", "lr_warm_up_steps", "lr_decay_steps", "dead_feature_window",
    "feature_sampling_window", "adam_beta1", "adam_beta2", "adam_eps", "seed", "decoder_init_norm",
)  # fmt: skip
"""Fields that the members of a stack may differ in: they are data, and compile nothing."""

_START_ONLY = ("seed", "decoder_init_norm", "jumprelu_init_threshold", "b_dec_init", "n_batches_for_norm_estimate")
"""Fields that only the start of a run reads."""


_SWITCHES = ("l0_target", "pre_act_loss_coefficient", "clip")
"""Numbers whose absence makes another program."""


def numbers_of(cfg: TrainingConfig, steps: int) -> Numbers:
    """Returns the numbers of a run of ``steps`` steps."""
    values = {name: getattr(cfg, name) for name in VARYING if name not in _START_ONLY}
    values |= {name: default for name, default in DEFAULTS.items() if values[name] is None}
    values["lr_end"] = cfg.lr / 10 if cfg.lr_end is None else cfg.lr_end
    values["steps"] = steps
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items() if value is not None}


def structure_of(cfg: TrainingConfig, k: int | None) -> TrainingConfig:
    """Returns the config that programs are compiled for: the same whatever the numbers are.

    Args:
        cfg: the config.
        k: the largest number of features that a member of the stack keeps; only ``topk`` and ``abstopk`` compile it.
    """
    arbitrary = (*VARYING, *_START_ONLY, "tap", "taps")
    changes = {field.name: field.default for field in dataclasses.fields(cfg) if field.name in arbitrary}
    changes["k"] = None if cfg.k is None else 1 if cfg.architecture == "batchtopk" else k
    for name in _SWITCHES:
        changes[name] = None if getattr(cfg, name) is None else 1.0
    return cfg.replace(**changes)


def check_stack(cfgs: Sequence[TrainingConfig]) -> None:
    """Checks that dictionaries can be trained as one stack.

    Raises:
        ConfigError: they differ in a field that shapes the program, which it names.
    """
    first = cfgs[0]
    for number, cfg in enumerate(cfgs):
        for field in dataclasses.fields(cfg):
            ours, theirs = getattr(first, field.name), getattr(cfg, field.name)
            if field.name in _SWITCHES:
                same = (ours is None) == (theirs is None)
            else:
                same = field.name in VARYING or ours == theirs
            if not same:
                raise ConfigError(
                    f"cfgs[{number}] has {field.name}={theirs!r}, cfgs[0] has {ours!r}. A stack shares one program: "
                    f"its members may differ in {', '.join(VARYING)}. Train the others by another call."
                )


def coefficients_at(numbers: Numbers, step: jax.Array) -> Numbers:
    """Returns the weights of the losses at a step (0, 1, ...): linear warm-up from zero, as in SAELens."""
    done = step.astype(jnp.float32)

    def warmed(name: str, steps: str) -> jax.Array:
        share = jnp.where(numbers[steps] > 0, done / jnp.maximum(numbers[steps], 1), 1)
        return numbers[name] * jnp.minimum(share, 1)

    return numbers | {
        "l1_coefficient": warmed("l1_coefficient", "l1_warm_up_steps"),
        "l0_coefficient": warmed("l0_coefficient", "l0_warm_up_steps"),
    }


def learning_rate_at(numbers: Numbers, step: jax.Array, schedule: str) -> jax.Array:
    """Returns the learning rate of a step (0, 1, ...), as SAELens's schedulers give it.

    The first of ``w`` steps of warm-up has ``lr / w``, the last one ``lr``; the first of ``d`` steps of decay has the
    full rate, which then falls by ``1 / d`` of it a step.
    """
    done, lr, end = step.astype(jnp.float32), numbers["lr"], numbers["lr_end"]
    warm, decay = numbers["lr_warm_up_steps"], numbers["lr_decay_steps"]
    main = jnp.maximum(numbers["steps"] - warm - decay, 1)
    place = jnp.clip((done - warm) / main, 0, 1)
    if schedule == "cosine":
        rate = end + (lr - end) * (1 + jnp.cos(math.pi * place)) / 2
        last = end
    elif schedule == "linear":
        rate, last = lr * (1 - place), jnp.zeros_like(lr)
    else:
        rate, last = lr, lr
    left = numbers["steps"] - done
    rate = jnp.where(left <= decay, last * left / jnp.maximum(decay, 1), rate)
    return jnp.where(done < warm, lr * (done + 1) / jnp.maximum(warm, 1), rate)
