"""A small trainer on optax, and the script that trains the bundled model with it."""

from tljax.train.trainer import TrainConfig, TrainingError, TrainResult, next_token_loss, train

__all__ = ["TrainConfig", "TrainResult", "TrainingError", "next_token_loss", "train"]
