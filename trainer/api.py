"""What the command calls, in one place. Importing this loads torch and transformers, so do it inside the function."""

from trainer.environment import environment
from trainer.forward import load_model, reference_logprobs, sequence_logprobs
from trainer.job import RoundEnd, Sink, TrainJob
from trainer.replay import replay_step
from trainer.run import train_round

__all__ = [
    "RoundEnd",
    "Sink",
    "TrainJob",
    "environment",
    "load_model",
    "reference_logprobs",
    "replay_step",
    "sequence_logprobs",
    "train_round",
]
