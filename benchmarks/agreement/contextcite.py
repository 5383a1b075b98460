"""ContextCite's own ContextCiter (arXiv 2409.00729) on SmolLM2: masks, answer, target of every ablation, scores.

python benchmarks/agreement/contextcite.py --repo CHECKOUT
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
from common import QUESTION, SENTENCES, Comparison, apart, arguments, commit_of, smollm2, stub

TEMPLATE = "Context:{context}\n\nQuery: {query}"


def citer(lm: Any) -> Any:
    "Their class, with the sentences as they are cut here"
    from context_cite import ContextCiter
    from context_cite.context_partitioner import BaseContextPartitioner

    class Sentences(BaseContextPartitioner):
        num_sources = len(SENTENCES)

        def split_context(self) -> None:
            pass

        def get_source(self, index: int) -> str:
            return SENTENCES[index]

        def get_context(self, mask: Any = None) -> str:
            return "".join(
                s for s, kept in zip(SENTENCES, np.ones(len(SENTENCES), bool) if mask is None else mask, strict=True) if kept
            )

    whole = "".join(SENTENCES)
    return ContextCiter(
        lm.hf,
        lm.tokenizer,
        whole,
        QUESTION,
        prompt_template=TEMPLATE,
        partitioner=Sentences(whole),
        generate_kwargs={"max_new_tokens": 40, "do_sample": False},
    )


def main() -> None:
    from longlens.probes.traceback.methods.contextcite import ContextCite
    from longlens.probes.traceback.prompts import trace_prompt
    from longlens.probes.traceback.tracer import TraceJob

    a = arguments(__doc__, "MadryLab/context-cite")
    stub("nltk", download=lambda name: None, sent_tokenize=None)  # it downloads when it is imported
    for name in ("spacy", "spacy.lang", "spacy.lang.en"):
        stub(name, English=None, Language=type("Language", (), {}))
    sys.path.insert(0, str(a.repo))
    lm = smollm2(a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = citer(lm)
        from context_cite.utils import aggregate_logit_probs

        masks, tokens = theirs._masks, theirs._logit_probs
        targets, scores = aggregate_logit_probs(tokens), theirs.get_attributions(verbose=False)
    prompt = trace_prompt(
        lm, list(SENTENCES), QUESTION, theirs._response_ids, sep="", template=TEMPLATE.replace("query", "question"), chat=True
    )
    method = ContextCite()
    job = TraceJob(lm, prompt)
    own = method.masks(job)[: method.ablations]
    values, odds = method.run(job), job.scorer.measures(own)[:, 1]
    c = Comparison(
        "contextcite",
        "ContextCite",
        f"MadryLab/context-cite at {commit_of(a.repo)}, `context_cite/`",
        "The whole `ContextCiter`, with the sentences given (NLTK and spaCy are not loaded) and a template without a space before "
        "the context, so that both read the same tokens.",
    )
    on = f"{len(SENTENCES)} sentences, chat, {len(prompt.ids)} + {len(prompt.answer)} tokens"
    c.add(
        "prompt and answer",
        on,
        f"{len(theirs._get_prompt_ids())} + {len(theirs._response_ids)} ids",
        f"{len(prompt.ids)} + {len(prompt.answer)} ids",
        "none" if theirs._get_prompt_ids() == prompt.ids.tolist() else "they differ",
        repr(theirs.response),
    )
    c.add(
        "which sentences each of 64 ablations keeps",
        on,
        f"{masks.sum()} kept",
        f"{own.sum()} kept",
        f"{(masks != own).sum()} of {masks.size} differ",
    )
    c.add(
        "log-odds of every token of the answer, every ablation",
        on,
        f"mean {tokens.mean():.5f}",
        f"mean {odds.mean():.5f}",
        apart(tokens, odds),
    )
    mine = job.scorer.log_odds(own)
    c.add(
        "target: log-odds of the answer, every ablation",
        on,
        f"{targets.min():.4f} to {targets.max():.4f}",
        f"{mine.min():.4f} to {mine.max():.4f}",
        apart(targets, mine),
        "longlens summed the log-odds of the tokens before this comparison, which is another number",
    )
    best = [int(np.argmax(x)) for x in (scores, values.values)]
    c.add(
        "score of every sentence",
        on,
        f"highest {scores.max():.4f}, sentence {best[0]}",
        f"highest {values.values.max():.4f}, sentence {best[1]}",
        apart(scores, values.values),
    )
    c.write()


if __name__ == "__main__":
    main()
