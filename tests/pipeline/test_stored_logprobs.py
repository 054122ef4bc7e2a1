"""Log-probs rounded to float16: what is lost is bounded, and the stored type stays float32."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stages.generate import stored_logprobs

LOGPROBS = st.lists(st.floats(-30, 0, width=32), max_size=50)


@settings(max_examples=60, deadline=None)
@given(LOGPROBS)
def test_float32_keeps_every_bit(logprobs: list[float]) -> None:
    assert stored_logprobs(logprobs, "float32") is logprobs


@settings(max_examples=100, deadline=None)
@given(LOGPROBS)
def test_float16_moves_a_ratio_by_a_fifth_of_a_per_cent_at_most_where_p_is_above_e_to_minus_8(logprobs: list[float]) -> None:
    stored = stored_logprobs(logprobs, "float16")
    assert stored.dtype == np.float32
    for exact, kept in zip(logprobs, stored.tolist(), strict=True):
        ratio = math.exp(kept - exact)
        assert abs(ratio - 1) <= (0.002 if exact > -8 else 0.008)
    assert np.array_equal(stored_logprobs(stored, "float16"), stored)
