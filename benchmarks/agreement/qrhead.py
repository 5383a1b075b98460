"""QRScores of princeton-pli/QRHead (arXiv 2506.09944): its prompts, spans, calibration and scores, on SmolLM2.

python benchmarks/agreement/qrhead.py --repo CHECKOUT
"""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import QUESTION, SENTENCES, Comparison, apart, arguments, commit_of, functions, smollm2

SRC, DETECT = "src/qrretriever/attn_retriever.py", "exp_scripts/detection/detect_qrhead_lme.py"
EXAMPLES = ((QUESTION, "d1"), ("When was the railway closed?", "d3"), ("What does the mayor do at the race?", "d2"))


def documents() -> list[dict[str, str]]:
    "Four paragraphs"
    parts = [SENTENCES[:2], SENTENCES[2:4], SENTENCES[4:7], SENTENCES[7:]]
    return [
        {"idx": f"d{i}", "title": f"Brightwater, part {i + 1}", "paragraph_text": "".join(p).strip()} for i, p in enumerate(parts)
    ]


def retriever(module: Any, lm: Any) -> Any:
    "Theirs with SmolLM2 in it; its own model classes want transformers 4 and flash attention, so the patterns are eager ones"

    def pattern(prompt: str, query: tuple[int, int], cache: Any = None, start: int = 0) -> Any:
        ids = lm.tokenizer(prompt, return_tensors="pt").input_ids
        lm.hf.set_attn_implementation("eager")
        with torch.no_grad():
            out = lm.hf(ids, output_attentions=True, use_cache=False)
        lm.hf.set_attn_implementation("sdpa")
        return torch.cat(out.attentions)[:, :, query[0] : query[1] + 1].mean(2), SimpleNamespace(key_cache=[])

    made = module.AttnBasedRetriever.__new__(module.AttnBasedRetriever)
    vars(made).update(
        model_base_class="qwen2.5-7b-instruct",
        tokenizer=lm.tokenizer,
        null_query="N/A",
        attn_head_set="full_heads",
        score_per_token_attention_to_query=pattern,
    )  # Qwen's chat form is SmolLM2's
    return made


def context(made: Any, lm: Any, query: str) -> Any:
    "Their prompt with their spans, for longlens"
    from longlens.models.tokens import Tokens
    from longlens.prompts.compose import Context

    text, ids, (a, b), spans = made.compose_scoring_prompt(query, documents())
    named = {f"document_{i}": range(x, y + 1) for i, (x, y) in enumerate(spans)}
    return Context(Tokens(torch.tensor(ids), text, tokenizer=lm.tokenizer), {**named, "query": range(a, b + 1)}, question=query)


def main() -> None:
    from longlens.probes.heads.scores import _document_scores, qr_scores

    a = arguments(__doc__, "princeton-pli/QRHead")
    lm = smollm2(a)
    module = functions(a.repo / SRC, "SPEC_HEAD_SET", "AttnBasedRetriever", torch=torch, math=math)
    detect = functions(a.repo / DETECT, "lme_eval", "score_heads", np=np, product=product, tqdm=lambda x, **k: x)
    made = retriever(module, lm)
    per_head = {q: made.score_docs_per_head_for_detection(q, documents()) for q, _ in EXAMPLES}
    ranked = dict(detect.score_heads(per_head, [{"idx": q, "gt_docs": [gold]} for q, gold in EXAMPLES]))
    theirs = np.array([[ranked[f"{layer}-{head}"] for head in range(lm.n_heads)] for layer in range(lm.n_layers)])
    pairs = [(context(made, lm, q), context(made, lm, "N/A")) for q, _ in EXAMPLES]
    ours = qr_scores(lm, pairs, [[int(gold[1:])] for _, gold in EXAMPLES]).numpy()
    c = Comparison(
        "qrhead",
        "QRHead",
        f"princeton-pli/QRHead at {commit_of(a.repo)}, `{SRC}` and `{DETECT}`",
        "`AttnBasedRetriever` (prompt, spans, calibration, document scores) and `score_heads`; the mean attention of the query's tokens is "
        "taken from eager patterns of SmolLM2 instead of its model classes, which want transformers 4 and flash attention.",
    )
    on = f"{len(EXAMPLES)} questions, 4 documents, {len(pairs[0][0])} tokens"
    best = [np.unravel_index(x.argmax(), x.shape) for x in (theirs, ours)]
    c.add(
        "QRScore of every head",
        on,
        f"highest {theirs.max():.6f}, head {best[0][0]}-{best[0][1]}",
        f"highest {ours.max():.6f}, head {best[1][0]}-{best[1][1]}",
        apart(theirs, ours),
        f"of the 16 highest, {len(set(np.argsort(-theirs.ravel())[:16]) & set(np.argsort(-ours.ravel())[:16]))} are the same",
    )
    x = torch.randn(2, 3, 90, generator=torch.Generator().manual_seed(0))
    x[0, 0, 5] = -40.0  # far below its document's mean, so that it is left out
    made.score_per_token_attention_to_query = lambda prompt, query, cache=None, start=0: (
        x * ("N/A" not in prompt),
        SimpleNamespace(key_cache=[]),
    )
    spans = [(0, 29), (30, 59), (60, 89)]
    made.compose_scoring_prompt = lambda query, docs: (query, [0] * 95, (90, 94), spans)
    want = made.score_docs_per_head_for_detection("q", [{"idx": i} for i in range(3)])
    got = _document_scores(x, [range(a, b + 1) for a, b in spans])
    c.add(
        "document scores out of given attention",
        "random numbers, one of them far below",
        "2 x 3 heads, 3 documents",
        "the same",
        apart(torch.stack([want[i] for i in range(3)], -1), got),
    )
    c.write()


if __name__ == "__main__":
    main()
