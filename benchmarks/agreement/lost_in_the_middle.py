"""Scorers and prompts of nelson-liu/lost-in-the-middle (arXiv 2307.03172) on its own questions and on replies of SmolLM2.

python benchmarks/agreement/lost_in_the_middle.py --repo CHECKOUT
"""

from __future__ import annotations

import gzip
import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
from common import Comparison, arguments, commit_of, functions, smollm2

SRC, QA, KV = "src/lost_in_the_middle", "qa_data/nq-open-oracle.jsonl.gz", "kv_retrieval_data/kv-retrieval-75_keys.jsonl.gz"
ASKED, PROMPTS, DOCUMENTS = 6, 60, 5  # questions that the model answers; prompts of each kind; documents in one


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def replies(lm: Any, questions: list[dict[str, Any]]) -> list[str]:
    "What SmolLM2 says with the right document in its prompt, as a chat"
    import longlens as ll
    from longlens.prompts.multi_document import numbered_documents

    lm = lm if isinstance(lm, ll.LongModel) else ll.load(lm)
    return [lm.generate(numbered_documents(lm, q["question"], q["ctxs"][0], chat=True).tokens, 25) for q in questions]


def scores(c: Comparison, module: Any, questions: list[dict[str, Any]], answers: list[str]) -> None:
    "best_subspan_em, as evaluate_qa_responses.py calls it, on texts that hold an answer, on others, and on replies"
    from longlens.probes.answer_scores import best_subspan_em

    usable = [q for q in questions if all(module.normalize_answer(a) for a in q["answers"])]
    after = usable[1:] + usable[:1]
    kinds = {
        f"the right document, {len(usable):,} questions": [(q["ctxs"][0]["text"], q["answers"]) for q in usable],
        f"the document of another question, {len(usable):,} questions": [
            (o["ctxs"][0]["text"], q["answers"]) for q, o in zip(usable, after, strict=True)
        ],
        f"replies of SmolLM2 to {len(answers)} questions": [(r, q["answers"]) for r, q in zip(answers, questions, strict=False)],
    }
    for on, cases in kinds.items():
        theirs = [module.best_subspan_em(prediction=r.split("\n")[0].strip(), ground_truths=right) for r, right in cases]
        ours = [best_subspan_em(r, right) for r, right in cases]
        c.add(
            "best_subspan_em",
            on,
            f"{sum(theirs):,.0f} right",
            f"{sum(ours):,.0f} right",
            f"{sum(a != b for a, b in zip(theirs, ours, strict=True))} of {len(cases):,} differ",
        )
    empty = [a for q in questions for a in q["answers"] if not module.normalize_answer(a)]
    c.add(
        "best_subspan_em, answers of which nothing is left",
        f"{len(empty)} in the file, such as {empty[0]!r}",
        "1 for every reply",
        "an error",
        "by design",
        "an empty text is in every reply: `read_questions(drop_empty=True)` leaves such answers out",
    )


def prompts(c: Comparison, module: Any, lm: Any, questions: list[dict[str, Any]], lists: list[dict[str, Any]]) -> None:
    "The same text, character by character?"
    from longlens.prompts.key_value import kv_json
    from longlens.prompts.multi_document import numbered_documents

    for name, random, aware in (
        ("plain", False, False),
        ("order said to be random", True, False),
        ("question before, too", False, True),
    ):
        same = 0
        for i in range(PROMPTS):
            group = questions[i : i + DOCUMENTS]
            documents = [module.Document(q["ctxs"][0]["title"], q["ctxs"][0]["text"]) for q in group]
            want = module.get_qa_prompt(group[0]["question"], documents, random, aware)
            ctx = numbered_documents(
                lm,
                group[0]["question"],
                group[0]["ctxs"][0],
                [q["ctxs"][0] for q in group[1:]],
                query_aware=aware,
                random_order=random,
                seed=0,
            )
            mine = ctx.text
            if random:
                want, mine = (want.split("Document [1]")[0], mine.split("Document [1]")[0])  # the order is drawn otherwise
            same += want == mine
        c.add(
            f"prompt of {DOCUMENTS} documents, {name}",
            f"{PROMPTS} questions",
            f"{PROMPTS} prompts",
            f"{PROMPTS} prompts",
            f"{PROMPTS - same} differ",
            "compared up to the first document: the order is random" if random else "",
        )
    for aware in (False, True):
        same = 0
        for e in lists[: PROMPTS // 3]:
            records = [tuple(r) for r in e["ordered_kv_records"]]
            want = module.get_kv_retrieval_prompt(records, e["key"], aware)
            same += want == kv_json(lm, records=records, key=e["key"], query_aware=aware).text
        n = PROMPTS // 3
        c.add(f"prompt of 75 keys{', key before, too' * aware}", f"{n} lists", f"{n} prompts", f"{n} prompts", f"{n - same} differ")


def main() -> None:
    from longlens.probes.answer_scores import kv_match

    a = arguments(__doc__, "nelson-liu/lost-in-the-middle")
    lm, questions, lists = smollm2(a), lines(a.repo / QA), lines(a.repo / KV)
    metrics = functions(a.repo / SRC / "metrics.py", "normalize_answer", "best_subspan_em", regex=regex, string=string)
    prompting = functions(
        a.repo / SRC / "prompting.py",
        "T",
        "Document",
        "get_qa_prompt",
        "get_kv_retrieval_prompt",
        dataclass=dataclass,
        PROMPTS_ROOT=a.repo / SRC / "prompts",
    )
    c = Comparison(
        "lost_in_the_middle",
        "lost-in-the-middle",
        f"nelson-liu/lost-in-the-middle at {commit_of(a.repo)}, `{SRC}`",
        "`best_subspan_em`, `get_qa_prompt` and `get_kv_retrieval_prompt`, on the files of the repository; the key-value score "
        "is a line of `scripts/evaluate_kv_responses.py`, written again.",
    )
    scores(c, metrics, questions, replies(lm, questions[:ASKED]))
    pairs = [(f"The value is {(e['value'] if i % 2 else lists[i - 1]['value']).upper()}.", e["value"]) for i, e in enumerate(lists)]
    theirs, ours = [float(v.lower() in r.lower()) for r, v in pairs], [kv_match(r, v) for r, v in pairs]
    c.add(
        "key-value accuracy",
        f"{len(pairs)} made replies, half of them wrong",
        f"{sum(theirs):.0f} right",
        f"{sum(ours):.0f} right",
        f"{sum(x != y for x, y in zip(theirs, ours, strict=True))} differ",
    )
    prompts(c, prompting, lm, questions, lists)
    c.write()


if __name__ == "__main__":
    main()
