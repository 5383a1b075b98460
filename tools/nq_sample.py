"""Makes longlens/data/nq_sample.jsonl: real questions, each with the passage of Wikipedia that answers it.

    python tools/nq_sample.py nq-open-oracle.jsonl.gz

The file that it reads is published with "Lost in the Middle" (Liu et al., arXiv 2307.03172,
https://github.com/nelson-liu/lost-in-the-middle, qa_data/nq-open-oracle.jsonl.gz, MIT licence): 2,655 questions of NQ-Open, each with its
gold paragraph. From it are taken, in an order given by a digest of the question, the first 200 of which all of this is true:

- the question begins with who, where, when, what or which, and does not ask for what changes (last, next, current, new, most, old);
- there is one answer, a name or a date of one to four words, which stands in the passage and not in the question;
- the passage has 35 to 75 words and ends with a sentence;
- no passage that was taken before has the answer or the same title, and this passage has no answer of those.

So every answer can be found in one document only, whichever of the others stand beside it. Nothing in a line is changed, but what no
reader of longlens uses is left out.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from longlens.prompts.questions import normalize_answer, open_maybe_gzip

N = 200
OUT = Path(__file__).resolve().parent.parent / "longlens" / "data" / "nq_sample.jsonl"
NAMED = re.compile(r"[A-Z0-9].{3}")    # a name, or a date
ASKS = re.compile(r"(who|where|when|what|which)\b")
CHANGES = re.compile(r"\b(last|next|current|currently|now|new|newest|latest|most|old|recent|recently|today|season|ever|playing)\b")


def has(text: str, answer: str) -> bool: return f" {normalize_answer(answer)} " in f" {normalize_answer(text)} "


def fits(row: dict[str, Any]) -> bool:
    "Is it a question with one short answer, which stands in a short passage?"
    question, answers, passage = row["question"], row["answers"], row["ctxs"][0]["text"]
    return bool(
        ASKS.match(question) and not CHANGES.search(question)
        and len(answers) == 1 and NAMED.match(answers[0]) and 1 <= len(normalize_answer(answers[0]).split()) <= 4
        and has(passage, answers[0]) and not has(question, answers[0])
        and 35 <= len(passage.split()) <= 75 and passage.endswith((".", '."', "!", "?")))


def order(row: dict[str, Any]) -> str: return hashlib.sha256(row["question"].encode()).hexdigest()


def chosen(rows: list[dict[str, Any]], n: int = N) -> list[dict[str, Any]]:
    "The first that fit, and whose answers stand in no other passage"
    taken: list[dict[str, Any]] = []
    for row in sorted(filter(fits, rows), key=order):
        answer, passage = row["answers"][0], row["ctxs"][0]
        clash = any(has(t["ctxs"][0]["text"], answer) or has(passage["text"], t["answers"][0]) or t["ctxs"][0]["title"] == passage["title"]
                    for t in taken)
        if not clash: taken.append(row)
        if len(taken) == n: return taken
    raise ValueError(f"only {len(taken)} of {n} questions fit")


def line(row: dict[str, Any]) -> str:
    passage = row["ctxs"][0]
    kept = {"question": row["question"], "answers": row["answers"],
            "ctxs": [{"title": passage["title"], "text": passage["text"], "isgold": True}]}
    return json.dumps(kept, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="nq-open-oracle.jsonl.gz, as published")
    with open_maybe_gzip(parser.parse_args().file) as f: rows = [json.loads(text) for text in f]
    OUT.write_text("".join(map(line, chosen(rows))), encoding="utf-8")
    print(f"{OUT}: {N} questions, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__": main()
