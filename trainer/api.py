"""What the command calls, in one place. Importing this loads torch and transformers, so do it inside the function."""

from trainer.forward import load_model, reference_logprobs, sequence_logprobs
from trainer.job import RoundEnd, Sink, TrainJob
from trainer.probe import VarianceJob, probe_variance
from trainer.run import train_round

__all__ = [
    "RoundEnd",
    "Sink",
    "TrainJob",
    "VarianceJob",
    "load_model",
    "probe_variance",
    "reference_logprobs",
    "sequence_logprobs",
    "train_round",
]
