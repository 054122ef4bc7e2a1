"""Train prompts that share text with eval prompts, so that evaluation would measure what was trained on.

One idea: problems become words in one normal form, and runs of them are compared in SQL (sql/contamination.sql). A problem's
words are its letters, numbers and signs of arithmetic, so that x + 1 and x - 1 differ while $\\dfrac{1}{2}$ and \\frac12 do
not; layout, punctuation and case are no words. An instruction that opens or ends all prompts of a source is no part of the
problem, which may be short. Left out: paraphrases and translations, which share no run of words.
"""

import re
import tempfile
import unicodedata
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.interrupts import database
from pipeline.store import ask, sql
from schemas.tables import ARROW

SHORTEST = 8  # words of a problem that is looked for inside another one; shorter ones must be the same
COMMON = 10  # prompts: what stands in more of them is a set phrase (GPT-3's rule)
MEMORY = "1500MB"  # of the query, which spills to disk past it

_SIGNS = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "*", "\N{MIDDLE DOT}": "*", "\N{DIVISION SIGN}": "/"}
)
_LATEX = {
    re.compile(r"\\[dtc]?frac\s*(?:(\d)\s*(\d))?"): r" frac \1 \2 ",
    re.compile(r"\\(?:times|cdot)(?![a-z])"): "*",
    re.compile(r"\\(?:left|right|displaystyle|text|mathrm|mathbf|operatorname|quad|qquad)(?![a-z])"): " ",
}
_WORD = re.compile(r"[^\W\d_]+|\d+|[-+*/^=<>!%|]")


def normal_words(text: str) -> str:
    """A problem's words in normal form, apart by one space."""
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).lower()
    for latex, plain in _LATEX.items():
        text = latex.sub(plain, text)
    return " ".join(_WORD.findall(text))


def contamination(prompts: pa.Table, ngram: int) -> pa.Table:
    """Rows of table `contamination`. `prompts` have prompt_id, messages, source and split."""
    with tempfile.TemporaryDirectory() as spill:
        con = database(memory_limit=MEMORY, temp_directory=spill)
        con.register("problems", _problems(prompts))
        found = ask(con, sql("contamination"), ngram=ngram, shortest=min(SHORTEST, ngram), common=COMMON)
        con.close()
    return found.cast(ARROW["contamination"])


def _problems(prompts: pa.Table) -> pa.Table:
    """Each prompt's words, without the instruction of its source."""
    out: list[pa.Table] = []
    for source in prompts.column("source").unique().to_pylist():
        rows = prompts.filter(pc.field("source") == source).select(["prompt_id", "source", "split", "messages"])
        texts = [_words(messages) for messages in rows.column("messages").to_pylist()]
        texts = _without_opening(texts)
        texts = [text[::-1] for text in _without_opening([text[::-1] for text in texts])]
        out.append(rows.drop_columns(["messages"]).append_column("words", pa.array(texts, pa.string())))
    return pa.concat_tables(out)


def _words(messages: Sequence[dict[str, Any]]) -> str:
    return " ".join(normal_words(m["content"]) for m in messages if m["role"] != "system").strip()


def _without_opening(texts: list[str]) -> list[str]:
    """The texts without the words that all of them begin with, if those are an instruction's: many prompts, many words."""
    least, greatest = min(texts), max(texts)  # what these two begin with, all do
    same = next((i for i, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b), len(least))
    shared = least[: least[:same].rfind(" ") + 1]
    if len(texts) <= COMMON or shared.count(" ") < SHORTEST:
        return texts
    return [text[len(shared) :] for text in texts]
