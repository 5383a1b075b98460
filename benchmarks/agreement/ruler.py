"""The metrics of NVIDIA/RULER (arXiv 2404.06654) on replies of SmolLM2 to tasks made by longlens, and on made replies.

python benchmarks/agreement/ruler.py --repo CHECKOUT
"""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
from common import Comparison, apart, arguments, commit_of, functions, smollm2

FILE, AFTER = "scripts/eval/synthetic/constants.py", "scripts/eval/evaluate.py"
LENGTH, TRIALS, MADE = 400, 6, 2_000


def asked(lm: Any) -> list[tuple[str, tuple[str, ...]]]:
    "Replies of the model to needles with two values of a key, and what is right"
    import longlens as ll

    contexts = [ll.needle_context(lm, LENGTH, 100 * i / (TRIALS - 1), n_values=2, seed=i, chat=True) for i in range(TRIALS)]
    return [(lm.generate(ctx.tokens, 40), ctx.answers) for ctx in contexts]


def made(seed: int = 0) -> list[tuple[str, tuple[str, ...]]]:
    "Replies out of words and numbers, with some of the answers in them, in any case, with control characters"
    rng = random.Random(seed)
    words = ["Blue-Harbor", "quiet river", "7402913", "A", "thé", "istanbul", "İZMİR", "straße"]

    def one() -> tuple[str, tuple[str, ...]]:
        answers = tuple(rng.sample(words, rng.randint(1, 4)))
        parts = [rng.choice((str, str.upper, str.lower))(rng.choice(words)) for _ in range(rng.randint(0, 5))]
        return rng.choice([" ", "\n", "\t", "\x00", ", "]).join(parts), answers

    return [one() for _ in range(MADE)]


def main() -> None:
    from longlens.probes.answer_scores import string_match_all, string_match_part

    a = arguments(__doc__, "NVIDIA/RULER")
    lm = smollm2(a)
    module = functions(a.repo / FILE, "string_match_all", "string_match_part")
    after = functions(a.repo / AFTER, "postprocess_pred", re=re).postprocess_pred
    c = Comparison(
        "ruler",
        "RULER's metrics",
        f"NVIDIA/RULER at {commit_of(a.repo)}, `{FILE}` and `{AFTER}`",
        "`string_match_all`, `string_match_part` and, before them, `postprocess_pred`.",
    )
    ours = {"string_match_all": string_match_all, "string_match_part": string_match_part}
    for on, cases in {
        f"replies of SmolLM2 to {TRIALS} tasks of {LENGTH} tokens, 2 values": asked(lm),
        f"{MADE:,} made replies": made(),
    }.items():
        for name, mine in ours.items():
            # each alone, for the share it adds; together for the percent that RULER prints
            one = np.array([getattr(module, name)([after(r, {})], [list(answers)]) for r, answers in cases])
            own = np.array([100 * mine(r, answers) for r, answers in cases])
            whole = getattr(module, name)([after(r, {}) for r, _ in cases], [list(answers) for _, answers in cases])
            c.add(
                name,
                on,
                f"{whole:.2f} %",
                f"{own.mean():.2f} %",
                apart(one, own.round(2)),
                "each reply alone, in percent with two digits as RULER rounds",
            )
    c.write()


if __name__ == "__main__":
    main()
