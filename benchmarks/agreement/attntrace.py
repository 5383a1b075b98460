"""AttnTrace's own AttnTraceAttribution (arXiv 2508.03793) on SmolLM2: attention to texts in random subsets of them.

python benchmarks/agreement/attntrace.py --repo CHECKOUT
"""

from __future__ import annotations

import gc
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers.models
from common import QUESTION, SENTENCES, Comparison, apart, arguments, commit_of, functions, smollm2

SRC, UTILS = "src/attribution/attntrace.py", "src/attribution/attention_utils.py"
ANSWER, DRAWS, SEED = " Clara Winslow, a retired captain.", 6, 0


class WithStart:
    "A tokenizer that puts a token before every text, as LLaMA's does: the code drops the first one of every context"

    def __init__(self, lm: Any):
        self.lm = lm

    def __call__(self, text: str, return_tensors: str) -> Any:
        ids = self.lm.tokens(text, add_special_tokens=False).ids
        return SimpleNamespace(input_ids=torch.cat([ids.new_tensor([self.lm.tokenizer.bos_token_id]), ids])[None])


def attribution(repo: Any, lm: Any, half: bool) -> Any:
    "Their class; `half`: keep the mean in float16, as published"
    utils = functions(
        repo / UTILS,
        "infer_model_type",
        "get_helpers",
        "get_position_ids_and_attention_mask",
        "get_attentions_shape",
        "get_layer_attention_weights",
        "get_attention_weights_one_layer",
        math=math,
        ch=torch,
        torch=torch,
        transformers=transformers,
    )
    prompts = functions(repo / "src/prompts.py", "MULTIPLE_PROMPT_PART1", "MULTIPLE_PROMPT_PART2", "wrap_prompt_attention")
    base = type("Attribution", (), {"__init__": lambda self, *a: None})
    module = functions(
        repo / SRC,
        "AttnTraceAttribution",
        change=[] if half else [(".to(torch.float16)", "")],
        Attribution=base,
        np=np,
        gc=gc,
        time=time,
        torch=torch,
        split_context=lambda level, texts: texts,
        wrap_prompt_attention=prompts.wrap_prompt_attention,
        get_attention_weights_one_layer=utils.get_attention_weights_one_layer,
    )
    llm = SimpleNamespace(model=lm.hf, tokenizer=WithStart(lm), provider="llama")
    made = module.AttnTraceAttribution(llm, K=len(SENTENCES), B=DRAWS)
    made.K = len(SENTENCES)  # what its base class sets
    return made, prompts.wrap_prompt_attention


def scores(made: Any) -> np.ndarray:  # (n,)
    np.random.seed(SEED)
    _, best, values, *_ = made.attribute(QUESTION, list(SENTENCES), ANSWER)
    out = np.zeros(len(SENTENCES))
    out[best] = values
    return out


def main() -> None:
    from longlens.probes.traceback.methods.attention import AttnTrace
    from longlens.probes.traceback.sources import token_prompt
    from longlens.probes.traceback.tracer import TraceJob

    a = arguments(__doc__, "Wang-Yanting/AttnTrace")
    lm = smollm2(a)
    (exact, wrap), (half, _) = (attribution(a.repo, lm, h) for h in (False, True))
    read, (before, after) = WithStart(lm), wrap(QUESTION)
    ids = [read(text, "pt").input_ids[0] for text in (before, *SENTENCES, after)]
    ids[1:-1] = [x[1:] for x in ids[1:-1]]
    ends = np.cumsum([len(x) for x in ids])
    prompt = token_prompt(
        torch.cat(ids), list(zip(ends[:-2].tolist(), ends[1:-1].tolist(), strict=True)), read(ANSWER, "pt").input_ids[0]
    )
    mine = AttnTrace(draws=DRAWS).run(TraceJob(lm, prompt, seed=SEED)).values
    c = Comparison(
        "attntrace",
        "AttnTrace",
        f"Wang-Yanting/AttnTrace: no snapshot of the repository was to be had ({commit_of(a.repo)}); `{SRC}` and the two "
        "prompt parts were found by their text in an index of public files, `attention_utils.py` is Wang-Yanting/FlashRT's at bcb27ee, "
        "2026-04-30",
        "The class `AttnTraceAttribution` as it is, on token ids with a start token in front of every text.",
    )
    on = f"{len(SENTENCES)} sentences, {len(prompt.ids)} + {len(prompt.answer)} tokens, {DRAWS} draws"
    for made, title, note in (
        (exact, "score of every sentence, in float32", ""),
        (half, "the same, as published", "by design: theirs rounds attention to float16"),
    ):
        theirs = scores(made)
        order = int((np.argsort(-theirs) != np.argsort(-mine)).sum())
        c.add(
            title,
            on,
            f"highest {theirs.max():.6f}, sentence {theirs.argmax()}",
            f"highest {mine.max():.6f}, sentence {mine.argmax()}",
            apart(theirs, mine),
            f"{order} ranks differ" + f"; {note}" * bool(note),
        )
    c.write()


if __name__ == "__main__":
    main()
