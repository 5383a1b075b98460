"""LongCodeZip's own splitting, perplexities, blocks and knapsack (arXiv 2510.00446) on SmolLM2 and a file of this project.

python benchmarks/agreement/longcodezip.py --repo CHECKOUT
"""

from __future__ import annotations

import ast
import logging
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Comparison, apart, arguments, commit_of, functions, smollm2

CODE = Path(__file__).with_name("common.py")
QUESTION = "Which function writes the table again when a comparison is saved?"
DRAWS, BUDGET = 200, 400


def theirs(repo: Path, lm: Any) -> Any:
    "Their class with SmolLM2 as both of its models, made without loading any"
    parts = functions(
        repo / "longcodezip/__init__.py",
        "EntropyChunking",
        "LongCodeZip",
        torch=torch,
        np=np,
        math=math,
        re=re,
        time=time,
        logger=logging.getLogger("longcodezip"),
        tqdm=lambda x, **kw: x,
        AutoTokenizer=None,
        AutoModelForCausalLM=None,
    )
    blocks = object.__new__(parts.EntropyChunking)
    blocks.tokenizer, blocks.model, blocks.device = lm.tokenizer, lm.hf, torch.device("cpu")
    whole = object.__new__(parts.LongCodeZip)
    whole.tokenizer, whole.model, whole.device, whole.max_position_embeddings = lm.tokenizer, lm.hf, "cpu", 8192
    whole.cache = {name: {} for name in ("token_length", "encodings", "perplexity", "conditional_ppl", "outputs")}
    whole.max_cache_size, whole.entropy_chunking, whole.context_idxs = 10**6, blocks, []
    return whole


def split(c: Comparison, tool: Any, code: str) -> None:
    "Where functions, classes and methods begin"
    from longlens.probes.traceback.sources import cut_context

    def begins(pieces: list[str]) -> list[str]:
        found = [re.search(r"^\s*(?:async )?(def|class) +(\w+)", p, re.MULTILINE) for p in pieces]
        return [m[2] for m in found if m]

    want, got = tool.split_code_by_functions(code), cut_context(code, by="functions").texts
    both = begins(want), begins(got)
    inner = {
        n.name
        for f in ast.walk(ast.parse(code))
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if n is not f and isinstance(n, ast.FunctionDef)
    }
    c.add(
        "functions, classes and methods that begin a piece",
        f"{CODE.name}, {len(code.splitlines())} lines",
        f"{len(want)} pieces",
        f"{len(got)} pieces",
        "none" if both[0] == both[1] else f"only theirs: {', '.join(x for x in both[0] if x not in both[1]) or 'none'}",
        f"functions inside functions ({', '.join(sorted(inner)) or 'none here'}) are pieces there and not here; a decorator ends the piece "
        "before it there and begins its own here",
    )


def scores(c: Comparison, tool: Any, lm: Any, code: str) -> np.ndarray:
    "By how much each function lowers the perplexity of the question"
    from longlens.probes.traceback.methods.one_source import LongCodeZip
    from longlens.probes.traceback.prompts import trace_prompt
    from longlens.probes.traceback.sources import cut_context
    from longlens.probes.traceback.tracer import TraceJob

    pieces = [t.strip() for t in cut_context(code, by="functions").texts]
    want = np.array([tool.get_condition_ppl(p, QUESTION, "prefix") for p in pieces])
    prompt = trace_prompt(lm, [p + "\n\n" for p in pieces], QUESTION, "x", template="{context}{question}", sep="")
    got = LongCodeZip().run(TraceJob(lm, prompt)).values
    on = f"{len(pieces)} functions of {CODE.name}, {len(prompt)} tokens"
    told = lambda *both: [f"highest {x.max():.4f}, piece {int(x.argmax())}" for x in both]
    c.add("perplexity of the question, less that with the function", on, *told(want, got), apart(want, got),
          "theirs counts the first token of the question too where there is a function, and not where there is none: two line ends are one "
          "token at the end of a text and two before a word, so it takes the question to begin one token early")  # fmt: skip
    n = [len(tool.tokenizer(f"{p}\n\n{QUESTION}").input_ids) - len(tool.tokenizer(QUESTION).input_ids) for p in pieces]
    joint = [tool.get_ppl(f"{p}\n\n{QUESTION}", condition_mode="prefix", condition_pos_id=k)["ppl"] for p, k in zip(pieces, n, strict=True)]
    mended = tool.get_ppl(QUESTION)["ppl"] - np.array(joint)
    c.add("the same, their function given where the question begins", on, *told(mended, got), apart(mended, got))
    bare = tool.get_ppl(QUESTION)["ppl"]
    c.add("perplexity of the question alone", QUESTION, f"{bare:.4f}", f"{LongCodeZip().value(lm, prompt, None):.4f}",
          apart(bare, LongCodeZip().value(lm, prompt, None)))  # fmt: skip
    return want


def blocks(c: Comparison, tool: Any, lm: Any, code: str) -> None:
    "Perplexities of lines, and where they end a block"
    from longlens.probes.traceback.shorten import line_perplexities, line_spans, spikes
    from longlens.probes.traceback.sources import cut_context

    pieces = [t.strip("\n") for t in cut_context(code, by="functions").texts]
    found = []
    for piece in (pieces[0], max((p for p in pieces[1:] if p.startswith("def ")), key=len)):
        lines = [piece[a:b].rstrip("\n") for a, b in line_spans(piece)]
        after = [i > 0 and not lines[i - 1] for i in range(len(lines))]
        found += [*zip(tool.entropy_chunking.calculate_sentence_ppl(lines), line_perplexities(lm, piece), after, strict=True)]
    for name, empty, note in (
        ("", False, "one run there for each line, one for all lines here"),
        (", where an empty line stands before", True, "theirs counts the line end before it, too"),
    ):
        want, got = (np.array([f[i] for f in found if np.isfinite(f[1]) and f[2] == empty]) for i in (0, 1))
        on = f"the imports and the longest function of {CODE.name}"
        c.add(f"perplexity of a line from all before it, log to base 2{name}", on, f"mean {want.mean():.5f}", f"mean {got.mean():.5f}",
              apart(want, got), note)  # fmt: skip
    draw = np.random.default_rng(0)
    made = [np.round(draw.gamma(2, 1, draw.integers(3, 40)), 3) for _ in range(DRAWS)]
    pairs = [(tool.entropy_chunking.find_ppl_spikes_adaptive(list(v))[0], spikes(v)) for v in made]
    theirs_n, ours_n = (sum(len(p[i]) for p in pairs) for i in (0, 1))
    c.add("lines that end a block, given the perplexities", f"{DRAWS} made lists of 3 to 39 lines", f"{theirs_n} lines", f"{ours_n} lines",
          f"{sum(a != b for a, b in pairs)} of {DRAWS} lists differ")  # fmt: skip


def knapsack(c: Comparison, tool: Any, values: np.ndarray, code: str) -> None:
    "Which parts are kept"
    from longlens.probes.traceback.shorten import best_subset
    from longlens.probes.traceback.sources import cut_context

    pieces = [t.strip() for t in cut_context(code, by="functions").texts]
    want, _ = tool._knapsack_block_selection(pieces, values.tolist(), BUDGET)
    weights = [tool.get_token_length(p) for p in pieces]
    got = set(np.flatnonzero(best_subset(values, weights, BUDGET)).tolist())
    told = [f"{len(x)} of {len(pieces)}, {sum(weights[i] for i in x)} tokens" for x in (want, got)]
    c.add("functions kept of the scores above", f"room for {BUDGET} tokens", *told, f"{len(want ^ got)} differ")
    draw, apart_by, same = np.random.default_rng(0), [], 0
    for _ in range(DRAWS):
        n, room = int(draw.integers(1, 30)), int(draw.integers(0, 300))
        v, w = draw.normal(0.5, 1, n), draw.integers(1, 80, n)
        a = sorted(tool._solve_knapsack_dp([(i, int(w[i]), float(v[i])) for i in range(n)], room))
        b = np.flatnonzero(best_subset(v, w, room)).tolist()
        apart_by.append(abs(v[a].sum() - v[b].sum()))
        same += a == b
    c.add("sum of the values kept", f"{DRAWS} made knapsacks of 1 to 29 parts", f"{DRAWS} solved", f"{same} with the same parts",
          f"{max(apart_by):.1e} at most")  # fmt: skip


def main() -> None:
    a = arguments(__doc__, "YerbaPage/LongCodeZip")
    lm = smollm2(a)
    tool, code = theirs(a.repo, lm), CODE.read_text(encoding="utf-8")
    c = Comparison(
        "longcodezip",
        "LongCodeZip",
        f"YerbaPage/LongCodeZip at {commit_of(a.repo)}, `longcodezip/__init__.py`",
        "Methods of their two classes with SmolLM2 in the place of Qwen2.5-Coder; the prompt is the function, an empty line and the "
        "question, as they join them.",
    )
    with torch.no_grad():
        split(c, tool, code)
        values = scores(c, tool, lm, code)
        blocks(c, tool, lm, code)
        knapsack(c, tool, values, code)
    c.not_run = [
        "the whole `compress_code_file`. It may go over its budget (it adds 100 tokens and keeps the function that passes it), gives each "
        "function a share of lines by its rank and writes comments where something was left out; `shorten_context` keeps its budget, lets "
        "the blocks of all functions that were kept compete for it, and writes nothing."
    ]
    c.write()


if __name__ == "__main__":
    main()
