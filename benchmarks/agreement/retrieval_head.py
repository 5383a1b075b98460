"""Retrieval scores of nightdessert/Retrieval_Head (arXiv 2404.15574): its needles, its prompts, its decoding and its counting, on SmolLM2.

python benchmarks/agreement/retrieval_head.py --repo CHECKOUT        # rouge-score should be installed for the last row
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Comparison, apart, arguments, commit_of, functions, smollm2

FILE, LENGTH, DEPTHS = "retrieval_head_detection.py", 800, (50,)  # 200 of the tokens are kept free for the answer, as published


class Attending:
    "SmolLM2 as the published code calls it: the prompt in one go, then steps that give their patterns"

    def __init__(self, hf: Any) -> None:
        self.hf = hf

    def __call__(self, attn_mode: str = "", output_attentions: bool = False, **inputs: Any) -> Any:
        self.hf.set_attn_implementation("eager" if output_attentions else "sdpa")
        out = self.hf(output_attentions=output_attentions, **inputs)
        self.hf.set_attn_implementation("sdpa")
        return out


def tester(module: Any, lm: Any, repo: Path, number: int) -> Any:
    "Their tester with SmolLM2 in it, set to one of the three needles; its constructor wants a GPU and is not called"
    t = module.LLMNeedleHaystackTester.__new__(module.LLMNeedleHaystackTester)
    needle = [json.loads(x) for x in (repo / "haystack_for_detect/needles.jsonl").read_text(encoding="utf-8").splitlines()][number]
    t.needle, t.retrieval_question, t.real_needle = needle["needle"], needle["question"], needle["real_needle"]
    t.haystack_dir, t.context_lengths, t.final_context_length_buffer = (
        str(repo / f"haystack_for_detect/part{number + 1}"),
        [LENGTH],
        200,
    )
    t.enc, t.model_provider, t.layer_num, t.head_num = lm.tokenizer, "OpenAI", lm.n_layers, lm.n_heads
    t.model_to_test, t.head_counter = Attending(lm.hf), defaultdict(list)
    return t


def prompt_of(t: Any, depth: float) -> torch.Tensor:  # (1, n)
    "The ids of their prompt; the span of the needle is in the tester then"
    with contextlib.redirect_stdout(io.StringIO()):
        text = t.generate_context(LENGTH, depth) + f"Based on the content of the book, Question: {t.retrieval_question}\nAnswer:"
        ids = t.enc(text, return_tensors="pt")["input_ids"]
        t.prompt_ids = ids[0]
        t.needle_start, t.needle_end = t.find_needle_idx(t.real_needle)
    return ids


def counted(t: Any, ids: torch.Tensor, steps: int) -> tuple[list[int], np.ndarray]:  # reply, (layers, heads)
    "Their greedy decoding with their count of copied tokens"
    with torch.no_grad():
        out = t.model_to_test(input_ids=ids[:, :-1], use_cache=True, return_dict=True)
        reply, score = t.decode(out, ids[:, -1], steps)
    return reply, np.array([[head[0] for head in layer] for layer in score])


def main() -> None:
    from longlens.probes.heads.scores import _rouge1_recall

    a = arguments(__doc__, "nightdessert/Retrieval_Head")
    lm = smollm2(a)
    module = functions(
        a.repo / FILE,
        "LLMNeedleHaystackTester",
        np=np,
        torch=torch,
        glob=glob,
        datetime=datetime,
        json=json,
        defaultdict=defaultdict,
    )
    scores, ours, recalls, lengths = [], [], [], []
    for number in range(3):
        t = tester(module, lm, a.repo, number)
        for depth in DEPTHS:
            ids = prompt_of(t, depth)
            reply, score = counted(t, ids, 50)
            scores.append(score)
            ours.append(copied(lm, ids[0], torch.tensor(reply), range(t.needle_start, t.needle_end)))
            text = lm.decode(torch.tensor(reply))
            recalls.append((t.real_needle, text, _rouge1_recall(t.real_needle, text)))
            lengths.append(len(ids[0]))
    report(a, np.array(scores), np.array(ours), recalls, lengths)


def copied(lm: Any, ids: torch.Tensor, reply: torch.Tensor, needle: range) -> np.ndarray:  # (layers, heads)
    "The score of longlens for the same words: prompt and reply in one forward, and where each head looks most at each step"
    import longlens as ll
    from longlens.probes.heads.scores import copy_scores

    n = len(ids)
    with ll.capture(lm, ll.Rows(range(n - 1, n - 1 + len(reply)), top=1)) as seen:
        lm(torch.cat([ids, reply[:-1]]))
    return copy_scores(ids, needle, reply, seen.top_keys()[0][..., 0])[0].numpy()


def report(a: Any, scores: np.ndarray, ours: np.ndarray, recalls: list, lengths: list[int]) -> None:
    c = Comparison(
        "retrieval_head",
        "Retrieval_Head",
        f"nightdessert/Retrieval_Head at {commit_of(a.repo)}, `{FILE}`",
        "Methods of `LLMNeedleHaystackTester` (context, needle span, `decode`, `retrieval_calculate`) with SmolLM2 in eager "
        "attention in place of its own flash-attention models.",
    )
    on = f"{len(ours)} trials (3 needles, depth {', '.join(map(str, DEPTHS))} %) of {min(lengths)} to {max(lengths)} tokens"
    best = [
        f"{np.unravel_index(x.mean(0).argmax(), x.shape[1:])[0]}-{np.unravel_index(x.mean(0).argmax(), x.shape[1:])[1]}"
        for x in (scores, ours)
    ]
    c.add(
        "retrieval score of every head and trial",
        on,
        f"strongest {best[0]}, {scores.mean(0).max():.5f}",
        f"strongest {best[1]}, {ours.mean(0).max():.5f}",
        apart(scores, ours),
        f"{(scores > 0).sum()} of them above 0",
    )
    found = [int((x.mean(0) >= 0.1).sum()) for x in (scores, ours)]
    c.add(
        "heads with a mean of 0.1 or more",
        on,
        str(found[0]),
        str(found[1]),
        str(found[0] - found[1]),
        "both on the 50 tokens that its code decodes: it knows LLaMA's newline token only, so it writes on behind SmolLM2's end token, "
        "where longlens would end",
    )
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        c.not_run.append("its ROUGE-1 recall, which needs the package rouge-score")
    else:
        scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
        theirs, own = [scorer.score(want, got)["rouge1"].recall for want, got, _ in recalls], [r for *_, r in recalls]
        c.add(
            "ROUGE-1 recall of the replies",
            on,
            f"mean {np.mean(theirs):.4f}; {sum(x > 0.5 for x in theirs)} kept",
            f"mean {np.mean(own):.4f}; {sum(x > 0.5 for x in own)} kept",
            apart(theirs, own),
            "theirs stems words first, ours does not",
        )
    c.write()


if __name__ == "__main__":
    main()
