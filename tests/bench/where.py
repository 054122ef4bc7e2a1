"""Where our time goes: an update under torch's profiler, its operators in four bins.

One idea: an operator belongs to the vocabulary if one of its inputs has the vocabulary's size as an axis; no other axis of the
models here has that size. Then by name: attention, products of matrices, and the rest.
"""

from torch.profiler import ProfilerActivity, profile

from tests.bench.ours import Ours

VOCABULARY, ATTENTION, LINEAR, REST = "vocabulary head, log-softmax, embedding", "attention", "linear layers", "rest"


def breakdown(ours: Ours) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds of the operators themselves by bin, the same of the ten costliest operators of the bin `rest`)."""
    vocabulary = ours.model.lm.config.vocab_size
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        ours.gradient()
    bins = dict.fromkeys((LINEAR, ATTENTION, VOCABULARY, REST), 0.0)
    rest: dict[str, float] = {}
    for event in profiled.key_averages(group_by_input_shape=True):
        seconds = event.self_cpu_time_total / 1e6
        where = bin_of(event.key, event.input_shapes, vocabulary)
        bins[where] += seconds
        if where == REST:
            rest[event.key] = rest.get(event.key, 0.0) + seconds
    return bins, dict(sorted(rest.items(), key=lambda item: -item[1])[:10])


def bin_of(name: str, shapes: list[list[int]], vocabulary: int) -> str:
    """The bin of one operator, from its name and the shapes of its inputs."""
    if any(isinstance(shape, list) and vocabulary in shape for shape in shapes or []):
        return VOCABULARY
    if "attention" in name or name in ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data"):
        return ATTENTION
    return LINEAR if name in ("aten::mm", "aten::addmm") else REST
