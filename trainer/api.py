"""What the command calls, in one place. Importing this loads torch and transformers, so do it inside the function."""

from trainer.environment import environment
from trainer.forward import reference_logprobs, sequence_logprobs
from trainer.job import RoundEnd, Sink, TrainJob
from trainer.launch import launch
from trainer.model import load_model
from trainer.probe import VarianceJob, probe_variance
from trainer.replay import replay_step
from trainer.run import train_round
from trainer.team import assemble, end_with_launcher, in_team

__all__ = [
    "RoundEnd",
    "Sink",
    "TrainJob",
    "VarianceJob",
    "assemble",
    "end_with_launcher",
    "environment",
    "in_team",
    "launch",
    "load_model",
    "probe_variance",
    "reference_logprobs",
    "replay_step",
    "sequence_logprobs",
    "train_round",
]
