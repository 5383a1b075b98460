"""The metrics of published sets beside their authors' scorers: on predictions that they publish, and on made ones.

python benchmarks/agreement/task_scorers.py --repos FOLDER

FOLDER has checkouts of THUDM/LongBench, OpenLMLab/LEval, infinigence/LVEval, snap-research/locomo (branch code),
open-compass/Ada-LEval, Graph-COM/HaystackCraft, princeton-pli/LongProc, NVIDIA/RULER and bigai-nlco/LooGLE, each under the name
of the repository. LongBench's scorers need `rouge`, `fuzzywuzzy`, `python-Levenshtein` and `jieba`, which longlens does not.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import json
import random
import re
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Comparison, apart, commit_of, functions

MADE = 100
ZH = "红房子在河边，阿达住在罗马。博喜欢喝茶！火车晚点了，谁也没有等它。第三段说的是另一件事。"


def made(right: list[str], seed: int = 0, zh: bool = False) -> list[tuple[str, str]]:
    "Replies out of the words of answers and others: parts, other orders, repetitions, punctuation, nothing at all"
    rng, sep = random.Random(seed), "" if zh else " "
    words = list(ZH) if zh else "the a red house, river. Rome; it is and of Paragraph 3 12 (B) unanswerable yes no # code // x".split(" ")
    out = []
    for i in range(MADE):
        answer = right[i % len(right)]
        own = list(answer) if zh else answer.split()
        parts = rng.sample(own, rng.randint(0, len(own))) + rng.choices(words, k=rng.randint(0, 8))
        if rng.random() < 0.5:
            rng.shuffle(parts)
        reply = sep.join(parts) if rng.random() > 0.1 else rng.choice([answer, "", answer.upper(), f"{answer}\n{answer}"])
        out.append((reply, answer))
    return out


RIGHT = [
    "the red house by the river",
    "Rome",
    "yes",
    "It is 12 km. It is far from the sea.",
    "Ada and Bo",
    "Clara Winslow, a retired captain",
]


def ours(metric: str, pairs: list[tuple[str, str]], **more: Any) -> list[float]:
    "Scores by longlens"
    from longlens.task_data.metrics import score_reply
    from longlens.task_data.question import TaskQuestion

    return [score_reply(TaskQuestion("x", "?", (a,), "text", metric=metric, **more), r) for r, a in pairs]


def row(c: Comparison, what: str, on: str, theirs: list[float], mine: list[float], note: str = "") -> None:
    "A row: means, and the largest difference"
    c.add(what, on, f"mean {np.mean(theirs):.6f}", f"mean {np.mean(mine):.6f}", apart(theirs, mine), note)


def longbench(c: Comparison, repos: Path) -> None:
    "Every metric of LongBench; jieba and rouge are those that its requirements name"
    import jieba
    from fuzzywuzzy import fuzz
    from rouge import Rouge

    names = (
        "normalize_answer normalize_zh_answer count_score retrieval_score retrieval_zh_score code_sim_score classification_score "
        "rouge_score rouge_zh_score f1_score qa_f1_score qa_f1_zh_score"
    ).split()
    m = functions(
        repos / "LongBench/LongBench/metrics.py",
        *names,
        re=re,
        string=string,
        jieba=jieba,
        fuzz=fuzz,
        difflib=difflib,
        Counter=collections.Counter,
        Rouge=Rouge,
    )
    pairs, zh = made(RIGHT), made(["红房子在河边", "罗马", "火车晚点了，谁也没有等它"], zh=True)
    numbers = made(["Paragraph 3", "Paragraph 12"], 1)
    code = [
        ("\n".join(random.Random(i).sample(["return x + 1", "# a", "x = y", "if x: // b", "`z`", "return x+1"], 3)), "return x + 1")
        for i in range(MADE)
    ]
    labels = ("Food", "Food or drink", "Drink", "House")
    named = [(" ".join(random.Random(i).sample([*labels, "and", "no"], 3)), random.Random(i + 999).choice(labels)) for i in range(MADE)]
    for what, theirs, metric, on, more in (
        ("F1 of words", m.qa_f1_score, "qa_f1", pairs, {}),
        ("ROUGE-L", m.rouge_score, "rouge_l", pairs, {}),
        ("F1 of words, Chinese", m.qa_f1_zh_score, "qa_f1_zh", zh, {"language": "zh"}),
        ("ROUGE-L, Chinese", m.rouge_zh_score, "rouge_l_zh", zh, {"language": "zh"}),
        ("number of a paragraph", m.retrieval_score, "passage_number", numbers, {}),
        ("count", m.count_score, "count", made(["12", "3"], 2), {}),
        ("edit similarity", m.code_sim_score, "code_similarity", code, {}),
    ):
        row(c, f"LongBench: {what}", f"{len(on)} made replies", [float(theirs(r, a)) for r, a in on], ours(metric, on, **more))
    theirs = [float(m.classification_score(r, a, all_classes=list(labels))) for r, a in named]
    row(c, "LongBench: classification", f"{MADE} made replies", theirs, ours("classification", named, choices=labels))


def _cleaned(part: str, e: Any) -> Callable[[str, str], tuple[str, str]]:
    "How L-Eval cleans a reply and what is right, before they are compared"
    if part == "gsm100":
        return lambda r, g: (e.process_math(r), e.process_math(g))
    if part == "codeU":
        return lambda r, g: (e.process_output_code(r, g), e.process_gt_code(g))
    return lambda r, g: (e.process_output_mc(r), e.process_gt_mc(g))


def leval(c: Comparison, repos: Path) -> None:
    "L-Eval's examinations on the predictions that it publishes"
    import types

    names = "process_output_mc process_gt_mc process_math process_output_code process_gt_code".split()
    em = functions(repos / "LEval/Evaluation/em.py", "normalize_answer", "exact_match_score", re=re, string=string, print=lambda *a: None)
    f1 = functions(repos / "LEval/Evaluation/f1.py", "normalize_answer", "f1_score", re=re, string=string, Counter=collections.Counter)
    for model in sorted(p.name for p in (repos / "LEval/Predictions/exam_eval").iterdir()):
        for part in ("quality", "tpo", "coursera", "gsm100", "codeU"):
            file = repos / f"LEval/Predictions/exam_eval/{model}/{part}.pred.jsonl"
            if not file.exists() or file.stat().st_size == 0:
                c.not_run.append(f"{model}, {part}: its predictions are not in this checkout.")
                continue
            args = types.SimpleNamespace(pred_file=str(file))
            e = functions(repos / "LEval/Evaluation/auto_eval.py", *names, re=re, args=args)
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            key = next(k for k in rows[0] if "_pred" in k)
            pairs = [(r[key], r["gt"]) for r in rows]
            how = _cleaned(part, e)
            theirs = [float(em.exact_match_score(*how(r, g))) for r, g in pairs]
            row(c, f"L-Eval: {part}", f"{len(pairs)} published replies of {model}", theirs, ours("leval_exam", pairs, meta={"exam": part}))
    pairs = made(RIGHT, 3)
    row(c, "L-Eval: F1", f"{MADE} made replies", [float(f1.f1_score(r, a)) for r, a in pairs], ours("qa_f1", pairs))


def lveval(c: Comparison, repos: Path) -> None:
    import jieba

    names = (
        "ABANDON_WORDS_EN ABANDON_WORDS_ZH normalize_answer normalize_zh_answer f1_score qa_f1_score_with_gold_ans "
        "qa_f1_zh_score_with_gold_ans"
    ).split()
    m = functions(repos / "LVEval/metrics.py", *names, re=re, string=string, jieba=jieba, Counter=collections.Counter)
    for what, theirs, pairs, key, language in (
        ("", m.qa_f1_score_with_gold_ans, made(RIGHT, 4), "red house Rome 12 of the", "en"),
        (", Chinese", m.qa_f1_zh_score_with_gold_ans, made(["红房子在河边", "罗马"], 5, True), "罗马 房子", "zh"),
    ):
        row(
            c,
            f"LV-Eval: F1 behind keywords{what}",
            f"{MADE} made replies",
            [float(theirs(r, a, key)) for r, a in pairs],
            ours("keyword_f1", pairs, language=language, meta={"keywords": key}),
        )


def others(c: Comparison, repos: Path) -> None:
    "LoCoMo, HaystackCraft, RULER, LongProc, LooGLE, Ada-LEval"
    import regex
    from nltk.stem import PorterStemmer

    pairs = made([*RIGHT, "tea, coffee, a red house"], 6)
    loc = functions(
        repos / "locomo/task_eval/evaluation.py",
        "normalize_answer",
        "f1_score",
        "f1",
        regex=regex,
        re=re,
        string=string,
        ps=PorterStemmer(),
        Counter=collections.Counter,
        np=np,
        unicodedata=unicodedata,
    )
    for kind, theirs in ((1, loc.f1), (2, loc.f1_score)):
        row(
            c,
            f"LoCoMo: F1 of stems, category {kind}",
            f"{MADE} made replies",
            [float(theirs(r, a)) for r, a in pairs],
            ours("locomo_f1", pairs, meta={"category": kind}),
        )
    h = functions(
        repos / "HaystackCraft/eval.py", "normalize_answer", "get_tokens", "compute_f1", re=re, string=string, collections=collections
    )
    row(
        c,
        "HaystackCraft: F1",
        f"{MADE} made replies",
        [float(h.compute_f1(h.normalize_answer(a), h.normalize_answer(r))) for r, a in pairs],
        ours("qa_f1_squad2", pairs),
    )
    ruler = functions(repos / "RULER/scripts/eval/synthetic/constants.py", "string_match_all", "string_match_part")
    row(
        c,
        "RULER: share of the answers",
        f"{MADE} made replies",
        [ruler.string_match_all([r], [[a]]) / 100 for r, a in pairs],
        ours("all_in", pairs),
    )
    longproc(c, repos)
    ada(c, repos)
    g = functions(repos / "LooGLE/Evaluation/automatic_metrics.py", "get_exact_match")
    true = {"<mask-0>": "Bo", "<mask-1>": "Al"}
    cloze = [(str({k: random.Random(f"{i}{k}").choice(["Bo", "Al", "Ed"]) for k in true}), json.dumps(true)) for i in range(MADE)]
    row(
        c,
        "LooGLE: masks filled",
        f"{MADE} made replies",
        [g.get_exact_match("", true, r, "")[0] / 2 for r, _ in cloze],
        ours("cloze", cloze),
    )


def longproc(c: Comparison, repos: Path) -> None:
    t = functions(
        repos / "LongProc/longproc/tom_tracking_evaluator.py",
        "_normalize_tom",
        "_extract_belief_content",
        "evaluate_tom_trace",
        re=re,
        string=string,
    )
    lines = [f"- Step {i}: Ada is in the hall; Ada thinks the cup is on the {x}." for i, x in enumerate(("table", "shelf", "table"))]
    right = "\n".join(lines)
    pairs = []
    for i in range(MADE):
        rng = random.Random(i)
        said = lines if rng.random() < 0.5 else rng.sample(lines, rng.choice((2, 3)))
        pairs.append(("\n".join(said).replace(*rng.choice((("the", "a"), ("the", "an"), ("hall", "loft")))), right))
    row(c, "LongProc: beliefs", f"{MADE} made replies", [t.evaluate_tom_trace(r, a)[0] for r, a in pairs], ours("belief_trace", pairs))
    p = functions(repos / "LongProc/longproc/longproc_data.py", "_extract_with_tag", "eval_path_traversal")
    steps = [f"From {a}, take a bus to {b}." for a, b in (("Fez", "Rome"), ("Rome", "Oslo"), ("Oslo", "Bonn"))]
    pairs = [
        (random.Random(i).choice(("<Route>\n{}\n</Route>", "{}")).format("\n".join(steps if i % 3 else steps[:2])), "\n".join(steps))
        for i in range(MADE)
    ]
    theirs = [p.eval_path_traversal(r, {"reference_output": a})[0]["accuracy"] for r, a in pairs]
    row(c, "LongProc: routes", f"{MADE} made replies", theirs, ours("route", pairs))


def ada(c: Comparison, repos: Path) -> None:
    "The nested functions of Ada-LEval's classes, through the classes"
    import pandas as pd

    d = functions(
        repos / "Ada-LEval/ada_leval/dataset.py",
        "StackSelect",
        "TextSort",
        np=np,
        pd=pd,
        json=json,
        print=lambda *a: None,
        load=lambda f: [],
    )
    replies = [" ".join(random.Random(i).choices(["Answer:", "A1", "A2", "A10", "A3", "12", "none"], k=3)) for i in range(MADE)]
    one = lambda r: d.StackSelect().evaluate(pd.DataFrame([{"prediction": r, "answer": "A2", "num_choice": 12}])) / 100
    mine = ours("best_answer", [(r, "A2") for r in replies], parts=tuple((0, 1) for _ in range(12)))
    row(c, "Ada-LEval: best answer", f"{MADE} made replies", [one(r) for r in replies], mine)
    forms = ("Answer: [{}, {}, {}, {}]", "[{}, {}, {}, {}]", "order {} {} {} {}", "{}, then {}, {} and {}", "none of {} {} {}")
    orders = []
    for i in range(MADE):
        rng = random.Random(i)
        orders.append(rng.choice(forms).format(*(rng.sample((1, 2, 3, 4), 4) if i % 2 else (2, 1, 3, 4))))
    one = lambda r: d.TextSort().evaluate(pd.DataFrame([{"prediction": r, "answer": "[2, 1, 3, 4]"}])) / 100
    row(c, "Ada-LEval: order", f"{MADE} made replies", [one(r) for r in orders], ours("in_order", [(r, "[2, 1, 3, 4]") for r in orders]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repos", type=Path, required=True, help="a folder of checkouts")
    repos = p.parse_args().repos
    c = Comparison(
        "task_scorers",
        "Scorers of published sets",
        "; ".join(
            f"{n} at {commit_of(repos / n)}"
            for n in ("LongBench", "LEval", "LVEval", "locomo", "Ada-LEval", "HaystackCraft", "LongProc", "RULER", "LooGLE")
        ),
        "Their functions, as they are, reply by reply. Only L-Eval publishes replies with its scorers.",
    )
    for part in (longbench, leval, lveval, others):
        try:
            part(c, repos)
        except Exception as e:  # what a checkout lacks is told in the table
            c.not_run.append(f"{part.__name__}: {e}.")
    c.write()


if __name__ == "__main__":
    main()
