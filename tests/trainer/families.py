"""Tiny random models of many families, as transformers makes them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

PACKED = {
    "llama": {},
    "llama, tied embeddings (SmolLM2)": {"tie_word_embeddings": True},
    "smollm3": {},
    "qwen2": {},
    "qwen2, sliding": {"use_sliding_window": True, **SLIDING},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma": {},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "gpt_neox": {},
    "gpt2": {},
    "phi3": {},
    "olmo2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}
NOT_PACKED = {
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8},  # soft caps on attention and logits
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "expand": 2, "chunk_size": 8},
    "granite": {"logits_scaling": 3.0},  # scales its logits after the head
    "falcon_mamba": {},
}


def tiny(name: str, settings: dict) -> PreTrainedModel:
    """The family is the name's first word."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0].strip(","), **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
