"""AT2's own features, loss, estimator and training (arXiv 2504.13752) on SmolLM2: attention to sources, coefficients, scores.

python benchmarks/agreement/at2.py --repo CHECKOUT
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers.models
from common import QUESTION, SENTENCES, Comparison, apart, arguments, commit_of, functions, smollm2

ANSWER, ABLATIONS, STEPS = " Clara Winslow, a retired captain.", 16, 200


def attention(repo: Path) -> Any:
    "Their attention of the rows that predict some tokens"
    return functions(
        repo / "at2/attribution/attention.py",
        "infer_model_type",
        "get_helpers",
        "get_position_ids_and_attention_mask",
        "get_attentions_shape",
        "get_layer_attention_weights",
        "get_attention_weights",
        math=math,
        ch=torch,
        transformers=transformers,
    )


def trained(repo: Path, features: np.ndarray, effects: np.ndarray) -> np.ndarray:  # (heads,)
    "Their coefficients of these features (examples, masks, heads) and effects (examples, masks); features in float32, not float16"
    parts = functions(
        repo / "at2/attribution/score_estimators.py",
        "ScoreEstimator",
        "LinearScoreEstimator",
        nn=torch.nn,
        ch=torch,
        ABC=ABC,
        abstractmethod=abstractmethod,
        Path=Path,
        FeatureExtractor=object,
        AttributionTask=object,
    )
    trainer = functions(
        repo / "at2/attribution/trainer.py",
        "PearsonCorrelationLoss",
        "LinearScoreEstimatorTrainer",
        change=[("np.float16", "np.float32")],
        np=np,
        ch=torch,
        Path=Path,
        tqdm=lambda x, **kw: x,
        Dataset=object,
        FeatureExtractor=object,
        AttributionTask=object,
        LinearScoreEstimator=parts.LinearScoreEstimator,
        print=lambda *a: None,
    )

    class Trainer(trainer.LinearScoreEstimatorTrainer):  # type: ignore[misc]
        "What it has computed before is given"

        def __init__(self) -> None:
            self.num_masks, self.feature_extractor = features.shape[1], SimpleNamespace(num_features=features.shape[2])
            self.dataset, self._task_datas = range(len(features)), [{"num_targets": 1}] * len(features)

        def is_features_and_outputs_completed(self, i: int) -> bool:
            return True

        def get_features_and_outputs(self, i: int) -> Any:
            return features[i : i + 1], effects[i : i + 1]

    made = Trainer().train(num_iterations=STEPS, batch_size=len(features), device="cpu", print_every=10**6)
    return made.linear.weight.detach()[0].numpy()


def main() -> None:
    from longlens.probes.traceback.methods.at2 import AT2, HeadFit, fit_coefficients, head_attention
    from longlens.probes.traceback.methods.contextcite import ablation_masks
    from longlens.probes.traceback.prompts import trace_prompt
    from longlens.probes.traceback.tracer import TraceJob

    a = arguments(__doc__, "MadryLab/AT2")
    lm = smollm2(a)
    theirs = attention(a.repo)
    x, y, first = [], [], None
    for sentences in (SENTENCES, SENTENCES[::-1], SENTENCES[2:8], SENTENCES[:5]):
        prompt = trace_prompt(lm, list(sentences), QUESTION, ANSWER, sep="")
        heads, mine = head_attention(lm, prompt)
        if first is None:
            ids, k, m = prompt.whole, len(prompt), len(prompt.answer)
            with torch.no_grad():
                hidden = [h[:, :-1] for h in lm.hf(ids[None], output_hidden_states=True).hidden_states]
            weights = theirs.get_attention_weights(lm.hf, hidden, k, k + m, "llama").permute(2, 3, 0, 1).flatten(2)  # (m, n, heads)
            sums = torch.stack([weights[:, r.start : r.stop].sum(1) for r in prompt.ranges])  # (sources, m, heads)
            first = (prompt, heads, mine, sums)
        masks = ablation_masks(prompt.n, ABLATIONS)
        x.append((torch.from_numpy(2.0 * masks - 1) @ mine).float().numpy())
        y.append(TraceJob(lm, prompt).scorer.log_odds(masks).astype(np.float32))
    prompt, heads, mine, sums = first  # type: ignore[misc]
    c = Comparison(
        "at2",
        "AT2",
        f"MadryLab/AT2 at {commit_of(a.repo)}, `at2/attribution/attention.py`, `score_estimators.py` and `trainer.py`",
        "Their attention of the rows that predict the answer, and their trainer with its loss, optimizer and normalisation, on features "
        "and effects computed here (sources leave the prompt; theirs are masked), kept in float32.",
    )
    on = f"{prompt.n} sentences, {len(prompt)} + {len(prompt.answer)} tokens, {len(heads)} heads"
    mean = sums.mean(1).double()
    c.add("attention of every head to every source", on, f"mean {mean.mean():.6f}", f"mean {mine.mean():.6f}", apart(mean, mine))
    features, effects = np.stack(x), np.stack(y)
    want = trained(a.repo, features, effects)
    got = fit_coefficients(torch.from_numpy(features), torch.from_numpy(effects), STEPS).numpy()
    of = f"{len(x)} contexts, {ABLATIONS} ablations each, {STEPS} steps"
    c.add("coefficients of all heads", of, f"largest {want.max():.5f}", f"largest {got.max():.5f}", apart(want, got))
    rows = tuple((layer, head, float(w)) for (layer, head), w in zip(heads, got, strict=True))
    scores = AT2(HeadFit(rows, lm.name, len(x), ABLATIONS, 0.0)).run(TraceJob(lm, prompt)).values
    named = (sums.double() @ torch.from_numpy(want).double()).mean(1).numpy()
    best = [int(np.argmax(v)) for v in (named, scores)]
    told = [f"highest {v.max():.5f}, sentence {i}" for v, i in zip((named, scores), best, strict=True)]
    c.add("score of every sentence", on, *told, apart(named, scores))
    c.write()


if __name__ == "__main__":
    main()
