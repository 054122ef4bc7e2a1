"""The mean of the trained weights with the base policy's, when a run ends (WiSE-FT, arXiv 2109.01903, section 3).

    theta <- (1 - w) theta + w theta_base,  w = train.base_weight

One idea: the mean is the run's last policy: what its last checkpoint holds and what is evaluated, so nothing else knows of it. Rounds before
it are as without it. With LoRA it is B <- (1 - w) B, which is the same for the merged weights. Left out: means with other policies of the run.
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer import adapter
from trainer.job import TrainJob
from trainer.model import PolicyLM, read_lm


@torch.no_grad()
def with_base(job: TrainJob, model: PolicyLM) -> None:
    """If the job's round is the run's last: moves the weights to the mean, in place.

    At the end of the round; every rank of a team calls it. Reads the base policy once more, into host memory.
    """
    w = job.train.base_weight
    if w == 0 or job.round + 1 < job.rounds:
        return
    trained = {name: p for name, p in model.lm.named_parameters() if p.requires_grad}
    if adapter.of(model.lm):
        for name, parameter in trained.items():
            if ".lora_B." in name:
                parameter.mul_(1 - w)
        return
    base = dict(read_lm(job.policy.model, job.policy).named_parameters())
    for name, parameter in trained.items():
        value = base[name].detach().to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.lerp_(value, w)
