"""The methods that a recipe can name in `train.method.type`, each with its source, needs and published defaults (docs/methods/)."""

from typing import Annotated, Union

from pydantic import Field

from schemas.methods.base import ALL, Grade, Loss, Method, Queues, Role, Routing, Stage, Weights
from schemas.methods.bridge import BRIDGEMethod
from schemas.methods.chord import CHORDMethod
from schemas.methods.cispo import CISPOMethod
from schemas.methods.dapo import DAPOMethod
from schemas.methods.dr_grpo import DrGRPOMethod
from schemas.methods.dypo import DypoMethod
from schemas.methods.grpo import GRPOMethod
from schemas.methods.grpo_flat import GRPOFlatMethod
from schemas.methods.gspo import GSPOMethod
from schemas.methods.hpt import HPTMethod
from schemas.methods.luffy import LUFFYMethod
from schemas.methods.opd import OPDMethod
from schemas.methods.prism import PRISMMethod
from schemas.methods.relift import ReLIFTMethod
from schemas.methods.sft import SFTMethod
from schemas.methods.sft_then_rl import SFTThenRLMethod
from schemas.methods.srft import SRFTMethod
from schemas.methods.superrl import SuperRLMethod
from schemas.methods.terms import GAL, GRPO
from schemas.methods.uniform_mix import UniformMixMethod

AnyMethod = Annotated[
    Union[
        SFTMethod,
        GRPOMethod,
        DrGRPOMethod,
        DAPOMethod,
        GSPOMethod,
        CISPOMethod,
        SFTThenRLMethod,
        UniformMixMethod,
        SuperRLMethod,
        HPTMethod,
        ReLIFTMethod,
        LUFFYMethod,
        SRFTMethod,
        CHORDMethod,
        BRIDGEMethod,
        OPDMethod,
        PRISMMethod,
        DypoMethod,
        GRPOFlatMethod,
    ],
    Field(discriminator="type"),
]

__all__ = [
    "ALL",
    "GAL",
    "GRPO",
    "AnyMethod",
    "DypoMethod",
    "Grade",
    "Loss",
    "Method",
    "Queues",
    "Role",
    "Routing",
    "Stage",
    "Weights",
]
