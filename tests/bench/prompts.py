"""What the benchmarks of generation ask for: sums, k samples each."""

import json
from pathlib import Path

from pipeline.engines.base import Ask
from pipeline.policy import Renderer

ROOT = Path(__file__).resolve().parents[2]
TINY, SMOLLM2 = ROOT / "data" / "tiny_policy", ROOT / "models" / "SmolLM2-135M-Instruct"


def asks(folder: Path, prompts: int, k: int) -> list[Ask]:
    """`prompts` sums: the tiny world's own, or as a person would ask a language model."""
    lines = (ROOT / "data" / "tiny" / "train.jsonl").read_text().splitlines()[:prompts]
    texts = [json.loads(line)["prompt"] for line in lines]
    if folder != TINY:
        texts = [f"What is {' + '.join(term[::-1] for term in text.split('+'))}? Give the number alone." for text in texts]
    renderer = Renderer(folder)
    made = []
    for n, text in enumerate(texts):
        messages = [{"role": "user", "content": text}]
        made.append(Ask(f"p{n:04}", messages, tuple(range(k)), n, "", {}, renderer.prompt_tokens(messages)))
    return made
