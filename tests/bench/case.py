"""What both sides train on: the model, and stored groups of rollouts in four shapes.

One idea: every group of a shape has the same lengths, shuffled, so its token slots are known exactly and the arithmetic
limit is one number:  TRL computes k (P + longest) slots a group, group packing P + the sum of the lengths.
Token ids, rewards and weights are random: neither side's speed depends on them. Advantages follow TRL's rule (eps 1e-4), since
what is compared has to be the same update.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from schemas.tables import ARROW
from tests.trainer.tiny import shard_row
from trainer.losses import grpo_advantages

PAD, EOS, FIRST = 0, 1, 2  # ids; responses end in EOS, and PAD is in no row
TRL_EPS = 1e-4
TOLERANCE = 1e-4  # ||g - g'|| / ||g||
NEAR_EQUAL = (64, 64, 64, 64, 64, 64, 63, 62)
MEAN_25 = (64, 40, 30, 22, 17, 12, 9, 6)


@dataclass(frozen=True)
class Case:
    """One row of the table. floor: the least speed-up over TRL that is accepted, for the default model."""

    name: str
    prompt: int
    lengths: tuple[int, ...]
    floor: float

    @property
    def k(self) -> int:
        return len(self.lengths)

    @property
    def peer_slots(self) -> int:
        """Token slots of one group, padded: each response with a prompt of its own, all as long as the longest."""
        return self.k * (self.prompt + max(self.lengths))

    @property
    def our_slots(self) -> int:
        """Token slots of one group, packed."""
        return self.prompt + sum(self.lengths)

    @property
    def limit(self) -> float:
        """How much less there is to compute."""
        return self.peer_slots / self.our_slots


CASES = {
    case.name: case
    for case in (
        Case("32/64", 32, NEAR_EQUAL, 1.15),
        Case("32/25", 32, MEAN_25, 2.8),
        Case("256/64", 256, NEAR_EQUAL, 2.8),
        Case("256/25", 256, MEAN_25, 4.5),
    )
}


def make_model(folder: Path) -> Path:
    """Llama, hidden 256, 4 layers, 4 heads, vocabulary 512 (3.4M parameters), random, as a Hugging Face folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=None,  # as padding_idx it would drop a gradient
        bos_token_id=None,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_shards(case: Case, groups: int, model: Path) -> pa.Table:
    """`groups` Mid groups as rows of the table shards. Their old_logprobs are 0 until `with_old_logprobs`."""
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    ids = np.setdiff1d(np.arange(FIRST, config.vocab_size), config.pad_token_id or PAD)  # TRL drops the gradient of a pad id
    rng = np.random.default_rng(0)
    rows = []
    for g in range(groups):
        prompt = rng.choice(ids, case.prompt).tolist()
        rewards = rng.permutation([float(i <= g % (case.k - 1)) for i in range(case.k)])
        advantages = grpo_advantages(rewards.tolist(), eps=TRL_EPS).tolist()
        for s, length in enumerate(rng.permutation(case.lengths).tolist()):
            tokens = [*rng.choice(ids, length - 1).tolist(), EOS]
            more = {"reward": rewards[s], "correct": rewards[s] == 1, "advantage": advantages[s], "group_size": case.k}
            rows.append(shard_row("rl", f"g{g}", s, prompt, tokens, old_logprobs=[0.0] * length, **more))
    return pa.Table.from_pylist(rows, ARROW["shards"])


def with_old_logprobs(shards: pa.Table, logprobs: dict[str, list[float]]) -> pa.Table:
    """The same rows, sampled by a policy whose log-probs are these, by item id."""
    column = pa.array([logprobs[item] for item in shards["item_id"].to_pylist()], ARROW["shards"].field("old_logprobs").type)
    return shards.set_column(shards.schema.get_field_index("old_logprobs"), ARROW["shards"].field("old_logprobs"), column)


def same_update(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    """||g - g'|| / ||g||; AssertionError if the two are not one update, for then no time of theirs can be compared."""
    assert theirs.keys() == ours.keys(), f"gradients of other parameters: {sorted(theirs.keys() ^ ours.keys())}"
    square = sum(g.double().square().sum().item() for g in theirs.values())
    apart = sum((g - ours[name]).double().square().sum().item() for name, g in theirs.items())
    difference = (apart / square) ** 0.5
    assert difference <= TOLERANCE, f"gradients differ by {difference:.1e}, more than {TOLERANCE}: not the same update"
    return difference


def useful_flop(model: nn.Module, case: Case, groups: int) -> tuple[float, float]:
    """(TRL's, ours) floating-point operations of one update in the slots that each layout holds, forward and backward.

    Layers: 6 for a weight and a slot. Attention: 12 x width for a visible pair of query and key. Vocabulary head: 6 for a weight and
    a response slot. What a side recomputes, or computes and masks, is not counted: it is not useful.
    """
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) * config.num_hidden_layers
    head = config.hidden_size * config.vocab_size
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")
    )

    def pairs(prompt: int, lengths: tuple[int, ...]) -> float:
        return prompt * (prompt + 1) / 2 + sum(t * prompt + t * (t + 1) / 2 for t in lengths)

    longest = max(case.lengths)
    theirs = (
        6 * linear * case.peer_slots + 12 * width * case.k * pairs(case.prompt, (longest,)) + 6 * head * case.k * longest
    )
    ours = 6 * linear * case.our_slots + 12 * width * pairs(case.prompt, case.lengths) + 6 * head * sum(case.lengths)
    return groups * theirs, groups * ours
