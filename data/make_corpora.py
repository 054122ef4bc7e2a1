"""Writes data/corpora: small samples in the schemas of public corpora and logs, with problems and traces of our own.

    python data/make_corpora.py

No row comes from a corpus: only column names and types do. The same bytes come out each time for the same pyarrow.
openr1_math_220k.parquet and trl_completions/ are sums of the tiny world (pipeline/tiny.py), so that the tiny policy can be
trained on them; the others are short problems in words and LaTeX.
"""

import json
import random
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipeline import tiny  # noqa: E402

HERE = ROOT / "data" / "corpora"
S, I64, F64, B = pa.string(), pa.int64(), pa.float64(), pa.bool_()
CHAT = pa.list_(pa.struct([("content", S), ("role", S)]))
VERL = {
    "data_source": S, "prompt": CHAT, "ability": S, "reward_model": pa.struct([("ground_truth", S), ("style", S)]),
    "extra_info": pa.struct([("index", I64), ("split", S)]),
}  # fmt: skip
OPENR1 = {
    "problem": S, "solution": S, "answer": S, "problem_type": S, "question_type": S, "source": S, "uuid": S,
    "is_reasoning_complete": pa.list_(B), "generations": pa.list_(S), "correctness_math_verify": pa.list_(B),
    "correctness_llama": pa.list_(B), "finish_reasons": pa.list_(S), "correctness_count": I64, "messages": CHAT,
}  # fmt: skip
LUFFY = {**VERL, "target": CHAT}
TRL = {"step": I64, "prompt": S, "completion": S, "accuracy_reward": F64, "format_reward": F64, "advantage": F64}

TOLD = "Let's think step by step and output the final answer within \\boxed{}."
SYSTEM = "Your task is to follow a systematic, thorough reasoning process before providing the final solution."
WORDS = [  # (problem, thought, answer)
    ("What is $17 + 25$?", "17 + 25 = 17 + 20 + 5 = 42.", "42"),
    ("Find $x$ if $3x - 5 = 16$.", "3x = 21, so x = 7.", "7"),
    ("What is $\\frac{1}{2} + \\frac{1}{3}$?", "The common denominator is 6: 3/6 + 2/6 = 5/6.", "\\frac{5}{6}"),
    ("How many diagonals does a convex heptagon have?", "7 * (7 - 3) / 2 = 14.", "14"),
    ("What is the greatest common divisor of 84 and 126?", "84 = 2 * 42 and 126 = 3 * 42.", "42"),
    ("Evaluate $\\sqrt{50} \\cdot \\sqrt{2}$.", "The product is the square root of 100.", "10"),
]


def chat(role: str, content: str) -> dict[str, str]:
    return {"content": content, "role": role}


def openr1(rng: random.Random) -> list[dict[str, Any]]:
    """Two or three generations a problem: some wrong, some cut off, as the corpus has them."""
    rows = []
    for problem in tiny.distinct(tiny.sum_problem, 24, rng, set()):
        texts = [tiny.left(problem, rng), tiny.noisy(problem, rng), tiny.right(problem, rng)[: rng.choice([None, 4])]]
        texts = texts[: rng.choice([2, 3])]
        whole = [tiny.is_right(problem, t) or ">" in t for t in texts]
        right = [tiny.is_right(problem, t) for t in texts]
        rows.append(
            {
                "problem": problem, "solution": tiny.left(problem, rng), "answer": tiny.gold(problem), "problem_type": "Algebra",
                "question_type": "math-word-problem", "source": "olympiads",
                "uuid": str(uuid.UUID(int=rng.getrandbits(128), version=4)), "is_reasoning_complete": whole,
                "generations": texts, "correctness_math_verify": right,
                "correctness_llama": None if rng.random() < 0.7 else right,
                "finish_reasons": None if rng.random() < 0.5 else ["stop" if w else "length" for w in whole],
                "correctness_count": sum(right),
                "messages": [chat("user", problem), chat("assistant", texts[right.index(True)] if any(right) else texts[0])],
            }
        )  # fmt: skip
    return rows


def verl(problem: str, answer: str, i: int) -> dict[str, Any]:
    return {
        "data_source": "ours/math", "prompt": [chat("user", f"{problem} {TOLD}")], "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"}, "extra_info": {"index": i, "split": "train"},
    }  # fmt: skip


def luffy(problem: str, thought: str, answer: str, i: int) -> dict[str, Any]:
    target = f"<think>\n{thought}\n</think>\n\n{thought} So the answer is $\\boxed{{{answer}}}$."
    return {
        **verl(problem, answer, i), "data_source": "Openr1-Math-46k", "extra_info": {"index": -1, "split": "default"},
        "prompt": [chat("system", SYSTEM), chat("user", problem)], "target": [chat("assistant", target)],
    }  # fmt: skip


def dumped(problem: str, thought: str, answer: str, n: int) -> list[dict[str, Any]]:
    """verl's trainer.rollout_data_dir: the rendered prompt without special tokens, and each rollout with its score."""
    said = [f"{thought} \\boxed{{{answer if k % 2 == 0 else k}}}" for k in range(n)]
    prompt = f"system\nYou are a helpful assistant.\nuser\n{problem} {TOLD}\nassistant\n"
    return [{"input": prompt, "output": s, "gts": answer, "score": float(k % 2 == 0), "step": 1} for k, s in enumerate(said)]


def completions(rng: random.Random, problems: list[str], step: int, k: int = 4) -> list[dict[str, Any]]:
    rows = []
    for problem in problems:
        texts = [tiny.noisy(problem, rng) for _ in range(k)]
        rewards = [float(tiny.is_right(problem, t)) for t in texts]
        mean = sum(rewards) / k
        std = (sum((r - mean) ** 2 for r in rewards) / (k - 1)) ** 0.5
        rows += [
            {"step": step, "prompt": problem, "completion": t, "accuracy_reward": r, "format_reward": float(">" in t),
             "advantage": (r - mean) / (std + 1e-4)}
            for t, r in zip(texts, rewards, strict=True)
        ]  # fmt: skip
    return rows


def write(name: str, columns: dict[str, pa.DataType], rows: list[dict[str, Any]]) -> None:
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items()))), path, compression="zstd")


def main() -> None:
    rng = random.Random(0)
    made = openr1(rng)
    write("openr1_math_220k.parquet", OPENR1, made)
    write("luffy_46k.parquet", LUFFY, [luffy(*row, i) for i, row in enumerate(WORDS)])
    write("verl_math.parquet", VERL, [verl(problem, answer, i) for i, (problem, _, answer) in enumerate(WORDS)])
    lines = [json.dumps(row) for problem in WORDS for row in dumped(*problem, 4)]
    (HERE / "verl_rollouts").mkdir(parents=True, exist_ok=True)
    (HERE / "verl_rollouts" / "1.jsonl").write_text("\n".join(lines) + "\n")
    problems = [row["problem"] for row in made]
    for step, some in ((10, problems[:12]), (20, problems[6:18])):
        write(f"trl_completions/completions_{step:05d}.parquet", TRL, completions(rng, some, step))


if __name__ == "__main__":
    main()
