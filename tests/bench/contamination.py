"""Time and memory of decontamination: `python -m tests.bench.contamination [train prompts] [eval prompts]`.

Made-up problems with the lengths and word frequencies of real ones (71 words on average), one in a hundred of them a copy of
an eval problem, half with an instruction at the end.
"""

import random
import resource
import sys
import time

import pyarrow as pa

from pipeline.contamination import contamination
from schemas.tables import ARROW

TOLD = " Let's think step by step and output the final answer within \\boxed{}."
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def problems(train: int, evals: int) -> pa.Table:
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(LETTERS, k=draw.randint(1, 9))) for _ in range(8000)]
    weights = [1 / (rank + 3) for rank in range(8000)]

    def text() -> str:
        words = draw.choices(vocabulary, weights, k=max(4, int(draw.lognormvariate(4.0, 0.6))))
        for _ in range(len(words) // 4):
            words[draw.randrange(len(words))] = str(draw.randint(0, 200))
        return " ".join(words)

    asked = [text() for _ in range(evals)]
    rows = [("eval", f"e{i}", t) for i, t in enumerate(asked)]
    rows += [("train", f"t{i}", text() if draw.random() > 0.01 else draw.choice(asked)) for i in range(train)]
    made = [
        {"prompt_id": key, "messages": [{"role": "user", "content": text + (TOLD if i % 2 else "")}], "answer": "1",
         "verifier": "v", "source": split, "split": split}
        for i, (split, key, text) in enumerate(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=ARROW["prompts"])


def main() -> None:
    train, evals = (int(n) for n in (*sys.argv[1:], "220000", "16000")[:2])
    prompts = problems(train, evals)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started = time.perf_counter()
    found = contamination(prompts, 13)
    took, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{train:,} x {evals:,} prompts: {took:.0f} s, peak {peak:.1f} GB (prompts alone {before:.1f}), {found.num_rows:,} pairs"
    )


if __name__ == "__main__":
    main()
