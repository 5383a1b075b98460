"""Retrieval scores of nightdessert/Retrieval_Head (arXiv 2404.15574): its needles, its prompts, its decoding and its counting, on SmolLM2.

python benchmarks/agreement/retrieval_head.py --repo CHECKOUT        # rouge-score should be installed for the last row
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
from collections import defaultdict
from dataclasses import replace
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
    from longlens.probes.heads.scores import Watch, run_trials
    from longlens.prompts.compose import Context

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
    whole, scores, ours, recalls, tokens, lengths = [], [], [], [], [0, 0], []
    for number in range(3):
        t = tester(module, lm, a.repo, number)
        for depth in DEPTHS:
            ids = prompt_of(t, depth)
            words = replace(lm.tokens("x"), ids=ids[0], text=lm.decode(ids[0]), offsets=None)
            ctx = Context(words, {"needle": range(t.needle_start, t.needle_end)}, (t.real_needle,), question=t.retrieval_question)
            (trial,) = run_trials(lm, [ctx], Watch("decode"), progress=False)
            reply, score = counted(t, ids, len(trial.reply_ids))
            whole.append(counted(t, ids, 50)[1])
            tokens[0], tokens[1] = (
                tokens[0] + len(reply),
                tokens[1] + sum(x != y for x, y in zip(reply, trial.reply_ids.tolist(), strict=True)),
            )
            scores.append(score)
            ours.append(trial.retrieval_score.numpy())
            recalls.append((t.real_needle, trial.reply, trial.recall))
            lengths.append(len(ids[0]))
    report(a, module, np.array(scores), np.array(whole), np.array(ours), recalls, tokens, lengths)


def report(
    a: Any,
    module: Any,
    scores: np.ndarray,
    whole: np.ndarray,
    ours: np.ndarray,
    recalls: list,
    tokens: list[int],
    lengths: list[int],
) -> None:
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
        "tokens of the replies",
        on,
        f"{tokens[0]}",
        f"{tokens[0]}",
        f"{tokens[1]} differ",
        "greedy, up to the end that longlens sees",
    )
    c.add(
        "retrieval score of every head and trial",
        on,
        f"strongest {best[0]}, {scores.mean(0).max():.5f}",
        f"strongest {best[1]}, {ours.mean(0).max():.5f}",
        apart(scores, ours),
        f"{(scores > 0).sum()} of them above 0",
    )
    found = [int((x.mean(0) >= 0.1).sum()) for x in (scores, ours, whole)]
    c.add("heads with a mean of 0.1 or more", on, str(found[0]), str(found[1]), str(found[0] - found[1]))
    c.add(
        "the same with all of its 50 steps",
        on,
        f"strongest {whole.mean(0).max():.5f}, {found[2]} heads",
        f"{ours.mean(0).max():.5f}, {found[1]} heads",
        apart(whole.mean(0), ours.mean(0)),
        "by design: its code stops at LLaMA's newline token only, and goes on after the answer with this tokenizer; longlens stops at a "
        "new line or the end token",
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
