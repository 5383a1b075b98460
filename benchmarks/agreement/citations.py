"""L-CiteEval's own reading and scoring of citations (arXiv 2410.02115) on made replies, with one judge of entailment for both.

python benchmarks/agreement/citations.py --repo CHECKOUT
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
from common import Comparison, apart, arguments, commit_of, functions

DRAWS, TEXTS = 200, 6
SENTENCES = ("Eve's code is stone", "Bob lives by the river", "The lamp was green", "Nobody knows the way", "Tom has two boats")


def reply(draw: np.random.Generator) -> str:
    "A reply with citations, some of which name no text"
    marks = lambda: "".join(f"[{i}]" for i in draw.permutation(TEXTS + 1)[: draw.integers(0, 5)] + 1)
    return " ".join(f"{SENTENCES[i]} {m}." if (m := marks()) else f"{SENTENCES[i]}." for i in draw.integers(0, 5, draw.integers(1, 5)))


def holds(passage: str, claim: str) -> bool:
    "A judge that both ask: does a passage, by its letters, entail a claim?"
    return sum(map(ord, claim)) % 3 == 0 or sum(map(ord, passage + claim)) % 2 == 0


def main() -> None:
    from longlens.probes.traceback.methods.citations import cited_statements, entailed_scores
    from longlens.prompts.haystack import split_sentences

    a = arguments(__doc__, "ZetangForward/L-CITEEVAL")
    given: dict[str, Any] = {"re": re, "np": np, "copy": copy, "tqdm": lambda x, **kw: x, "sent_tokenize": lambda t: split_sentences(t)[0]}
    code = functions(
        a.repo / "script/eval_citation.py",
        "remove_citations",
        "compute_autoais",
        _run_nli_autoais=lambda passage, claim: int(holds(passage, claim)),
        **given,
    )
    draw = np.random.default_rng(0)
    docs = [f"Text {i}: {s}." for i, s in enumerate((*SENTENCES, "The end"), 1)]
    replies = [reply(draw) for _ in range(DRAWS)]
    data = [{"generation": [r], "docs": docs} for r in replies]

    def ours(r: str) -> tuple[float, ...]:
        s = cited_statements(r, TEXTS)
        passage = lambda at: "\n".join(f"Passage: {docs[i]}" for i in at)
        claims = s["text"].to_list()
        return entailed_scores(s["cited"].to_list(), s["unusable"].to_list(), lambda k, at: holds(passage(at), claims[k]), most=3)

    c = Comparison(
        "citations",
        "L-CiteEval",
        f"ZetangForward/L-CITEEVAL at {commit_of(a.repo)}, `script/eval_citation.py`",
        "Their functions on made replies. Sentences are cut by longlens in both (NLTK is not loaded), and one made judge of entailment "
        "answers both: what is compared is reading and counting.",
    )
    on = f"{DRAWS} made replies about {TEXTS} texts"
    statements = [cited_statements(r, TEXTS) for r in replies]
    want = [code.remove_citations(s).strip() for r in replies for s in split_sentences(r)[0]]
    got = [t for s in statements for t in s["text"]]
    c.add("sentences without their citations", on, f"{len(want)} sentences", f"{len(got)} sentences",
          f"{sum(x.replace(' .', '.') != y for x, y in zip(want, got, strict=True))} differ",
          "theirs leaves a space before the full stop")  # fmt: skip
    theirs = np.array(code.compute_autoais(data, at_most_citations=3)).T
    mine = np.array([ours(r) for r in replies])
    for k, name in enumerate(("recall", "precision", "F1", "citations")):
        c.add(f"{name} of a reply", on, f"mean {theirs[:, k].mean():.4f}", f"mean {mine[:, k].mean():.4f}", apart(theirs[:, k], mine[:, k]))
    c.not_run = [
        "their judge, `tasksource/deberta-base-long-nli`: its weights cannot be had here. `check_citations` asks no such model: "
        "a source is needed by a sentence if the sentence loses probability without it, which is not whether it entails it.",
        "the needle and Counting-Stars forms (`compute_niah_citation`, `compute_counting_stars_citation`): longlens has no such scorer.",
        "citations of the form [3, 7]: theirs reads the 3 only, longlens both.",
    ]
    c.write()


if __name__ == "__main__":
    main()
