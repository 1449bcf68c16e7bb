"""A small trainer on optax."""

from tljax.train.trainer import TrainConfig, TrainingError, TrainResult, next_token_loss, train

__all__ = ["TrainConfig", "TrainResult", "TrainingError", "next_token_loss", "train"]
