"""TracLLM's own PerturbationBasedAttribution (arXiv 2506.04202) on SmolLM2: values of texts, score functions, search, ensemble.

python benchmarks/agreement/tracllm.py --repo CHECKOUT
"""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import QUESTION, SENTENCES, Comparison, apart, arguments, commit_of, functions, smollm2

SRC, PERMUTATIONS, KEEP = "src/attribution/perturbation_based.py", 3, 2
ANSWER = " Clara Winslow, a retired captain."


class Ours:
    "In place of `random`: the orders that longlens draws, anew at each level of a search"

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, of: Any, k: int) -> list[int]:
        level, i = divmod(self.calls, PERMUTATIONS)
        if i == 0: self.rng = np.random.default_rng([1000 * level, 0])
        self.calls += 1
        return self.rng.permutation(k).tolist()


def attribution(repo: Any, lm: Any, draws: Ours, joined: str, known: dict[str, float]) -> Any:
    "Their class on the model; `joined` stands between the texts of a group (published: a space); `known`: values so far"
    prompts = functions(
        repo / "src/prompts.py", "MULTIPLE_PROMPT_FORCE", "wrap_prompt", change=[("Contexts: [context]", "Contexts:[context]")]
    )
    utils = functions(repo / "src/utils.py", "split_context", "mean_of_percent", "manual_zip", "unzip_tuples")
    base = functions(repo / "src/attribution/attribute.py", "Attribution", torch=torch, math=math, wrap_prompt=prompts.wrap_prompt)
    module = functions(
        repo / SRC,
        "PerturbationBasedAttribution",
        change=[('" ".join(unzip', f'"{joined}".join(unzip')],
        Attribution=base.Attribution,
        np=np,
        random=draws,
        time=time,
        **{k: v for k, v in vars(utils).items() if k != "space"},
    )
    llm = SimpleNamespace(name="smollm2", model=lm.hf, tokenizer=lm.tokenizer)
    made = module.PerturbationBasedAttribution(llm, "sentence", KEEP, sh_N=PERMUTATIONS, verbose=0)
    value = made.context_value

    def once(question: str, contexts: list[str], answer: str) -> float:
        text = "".join(contexts)
        if text not in known: known[text] = value(question, contexts, answer)
        return known[text]

    made.context_value = once
    return made, prompts.MULTIPLE_PROMPT_FORCE


def main() -> None:
    from longlens.probes.traceback.methods.perturbation import DenoisedShapley, InformedSearch, LeaveOneOut, Shapley, SingleText
    from longlens.probes.traceback.prompts import trace_prompt
    from longlens.probes.traceback.tracer import TraceJob

    a = arguments(__doc__, "Wang-Yanting/TracLLM")
    lm, texts = smollm2(a), list(SENTENCES[1:6])
    n, draws, known = len(texts), Ours(), dict[str, float]()
    theirs, template = attribution(a.repo, lm, draws, " ", known)
    prompt = trace_prompt(
        lm, texts, QUESTION, ANSWER, sep="", template=template.replace("[context]", "{context}").replace("[question]", "{question}")
    )
    job = TraceJob(lm, prompt)
    c = Comparison(
        "tracllm",
        "TracLLM",
        f"Wang-Yanting/TracLLM at {commit_of(a.repo)}, `{SRC}`, `attribute.py`, `prompts.py`, `utils.py`",
        "The class `PerturbationBasedAttribution` as it is, with the orders of longlens in place of `random.sample`, and its prompt "
        "without the space before the contexts, so that both read the same tokens.",
    )
    on = f"{n} sentences, {len(prompt.ids)} + {len(prompt.answer)} tokens"
    some = np.random.RandomState(0).rand(12, n) < 0.5
    values = [theirs.context_value(QUESTION, [t for t, kept in zip(texts, m, strict=True) if kept] or [""], ANSWER) for m in some]
    mine = job.scorer(some)
    c.add(
        "log-probability of the answer",
        f"12 subsets of {on}",
        f"mean {np.mean(values):.5f} nats",
        f"mean {mine.mean():.5f} nats",
        apart(values, mine),
    )
    methods = {
        "stc": SingleText(),
        "loo": LeaveOneOut(),
        "shapley": Shapley(PERMUTATIONS),
        "denoised_shapley": DenoisedShapley(PERMUTATIONS),
    }
    for name, method in methods.items():
        draws.calls = 0
        want, got = theirs.func_map[name](QUESTION, texts, ANSWER), method.run(job).values
        c.add(
            name,
            on,
            f"highest {max(want):.4f}, sentence {int(np.argmax(want))}",
            f"highest {got.max():.4f}, sentence {got.argmax()}",
            apart(want, got),
            f"{PERMUTATIONS} orders" if "shapley" in name else "",
        )
    search = InformedSearch(keep=KEEP, permutations=PERMUTATIONS)
    got = search.run(job)
    for joined, title in (("", "with nothing between the texts of a group"), (" ", "as published")):
        module, _ = attribution(a.repo, lm, Ours(), joined, known)
        _, ids, scores, *_ = module.attribute(QUESTION, texts, ANSWER)
        want = np.full(n, np.nan)
        want[ids] = scores
        same = set(np.flatnonzero(~np.isnan(want))) == set(np.flatnonzero(~np.isnan(got.values)))
        off = apart(want, got.values) if same else f"texts {sorted(ids)} against {np.flatnonzero(~np.isnan(got.values)).tolist()}"
        c.add(
            f"tracllm: search and ensemble, {title}",
            f"{on}; K = {KEEP}",
            f"highest {np.nanmax(want):.4f}, sentence {np.nanargmax(want)}",
            f"highest {np.nanmax(got.values):.4f}, sentence {np.nanargmax(got.values)}",
            off,
            "by design: its groups are joined with one more space, longlens leaves tokens out of the one prompt"
            if joined
            else f"{len(ids)} texts come out of it",
        )
    c.write()


if __name__ == "__main__":
    main()
