"""placeholder until the chunked one lands"""

import torch
from torch import Tensor


def token_logps(
    hidden_UH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, position_N: Tensor, target_N: Tensor, temperature_U: Tensor
) -> tuple[Tensor, Tensor]:
    logits_UV = torch.nn.functional.linear(hidden_UH, weight_VH, bias_V)
    logits_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32))
    logps_UV = (logits_UV / temperature_U.to(logits_UV.dtype).unsqueeze(-1)).log_softmax(-1)
    with torch.no_grad():
        entropy_U = -(logps_UV.exp() * logps_UV).sum(-1)
    return logps_UV[position_N, target_N], entropy_U[position_N]
