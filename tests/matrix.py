"""Every feature on every model of the zoo: right to 1e-4 against formed patterns and whole forward passes, or refused with a reason.

    python tests/matrix.py                          all of it, and docs/models.md is written
    python tests/matrix.py jamba gemma4 --features capture chunked

`make matrix` runs all of it. What a model is compared with does not go through
longlens: patterns are those of transformers' own eager attention, logits those of one forward pass of the whole text, and
changed heads those of the attention function `formed` below, which forms the matrix.
"""
from __future__ import annotations

import argparse
import datetime
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

import longlens as ll
from longlens.attention.hf_interface import UnsupportedModel
from longlens.models.forward import LongModel

ROOT = Path(__file__).resolve().parent.parent
N, PAD, CHUNK = 40, 9, 16
CLOSE = 1e-4    # relative to the largest number compared, or to 1


# ---- references

EDIT: dict[str, Any] = {}    # what `formed` changes: ablate=(module, head), streaming=(sink, recent)


def formed(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
           scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, s_aux: torch.Tensor | None = None,
           position_bias: torch.Tensor | None = None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    "Attention with the matrix formed, and the heads of `EDIT` changed"
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ k.mT * (query.shape[-1] ** -.5 if scaling is None else scaling)
    if softcap is not None: logits = softcap * torch.tanh(logits / softcap)
    if position_bias is not None: logits = logits + position_bias
    if attention_mask is not None: logits = logits + attention_mask[..., :k.shape[2]]
    if "streaming" in EDIT:
        sink, recent = EDIT["streaming"]
        i, j = torch.arange(logits.shape[-2])[:, None] + logits.shape[-1] - logits.shape[-2], torch.arange(logits.shape[-1])
        logits = logits.masked_fill((j >= sink) & (i - j >= recent), -torch.inf)
    if s_aux is not None: logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., :k.shape[2]]
    out = weights @ v
    if EDIT.get("ablate", (None, None))[0] is module: out[:, EDIT["ablate"][1]] = 0
    return out.transpose(1, 2).contiguous(), weights


AttentionInterface.register("formed", formed)
AttentionMaskInterface.register("formed", eager_mask)


@contextmanager
def attention_is(hf: PreTrainedModel, name: str) -> Iterator[None]:
    "While the block runs, the model computes its attention so"
    before = hf.config._attn_implementation
    hf.set_attn_implementation(name)
    try: yield
    finally: hf.set_attn_implementation(before)


def number_of(module: torch.nn.Module, name: str) -> int:
    "The layer of a module: its number, or where a shared one (-1) stands"
    at = module.layer_idx
    return at if at >= 0 else int(next(part for part in name.split(".") if part.isdigit()))


def patterns(hf: PreTrainedModel, ids: torch.Tensor, keep: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
    "Layer -> pattern (batch, heads, n, n) of eager attention, for layers that have one"
    found: list[tuple[int, torch.Tensor]] = []

    def seen(module: torch.nn.Module, args: Any, out: Any) -> None:
        parts = out if isinstance(out, tuple) else ()
        if len(parts) > 1 and isinstance(parts[1], torch.Tensor) and parts[1].ndim == 4: found.append((numbers[module], parts[1]))
    numbers = {m: number_of(m, name) for name, m in hf.named_modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")}
    hooks = [m.register_forward_hook(seen) for m in numbers]
    try:
        with attention_is(hf, "eager"): hf(input_ids=ids, attention_mask=keep, use_cache=False, output_attentions=True)
    finally:
        for hook in hooks: hook.remove()
    made = {layer: p for layer, p in found if p.shape[-1] == ids.shape[1] == p.shape[-2]}
    if len(made) != len(found): raise AssertionError("the reference has patterns of odd shapes")
    return made


def layers_of(hf: PreTrainedModel) -> list[int]:
    "The layers with attention, by running it"
    return sorted(patterns(hf, zoo.token_ids(8)))


# ---- comparisons

def off(got: torch.Tensor, want: torch.Tensor) -> float:
    "The largest difference, relative to the largest number or to 1"
    if got.shape != want.shape: raise AssertionError(f"{tuple(got.shape)} where {tuple(want.shape)} is right")
    return float((got.double() - want.double()).abs().max() / max(1.0, float(want.abs().max())))


def statistics_off(seen: Any, P: dict[int, torch.Tensor], keep: torch.Tensor | None) -> float:
    "The largest error of five statistics over samples, layers and heads"
    worst = 0.0
    frames = {name: seen.frame(name) for name in ("entropy", "sink_mass", "distance", "support")}
    layers = sorted(frames["entropy"]["layer"].unique().to_list())
    if layers != sorted(P): raise AssertionError(f"layers {layers} are measured, and {sorted(P)} have attention")
    for layer, pattern in P.items():
        for b in range(len(pattern)):
            text = slice(None) if keep is None else keep[b].nonzero()[:, 0]
            p = pattern[b][:, text][..., text].double()
            i = torch.arange(p.shape[-1])
            mass, away = p.sum(-1), (i[:, None] - i).abs()
            right = {"entropy": torch.special.entr(p).sum(-1).mean(-1), "sink_mass": p[..., :1].sum(-1).mean(-1),
                     "distance": ((p * away).sum(-1) / mass).mean(-1), "support": (mass**2 / (p**2).sum(-1)).mean(-1)}
            column = {"distance": "mean_distance"}
            for name, want in right.items():
                got = frames[name].filter(layer=layer, sample=b).sort("head")[column.get(name, name)].to_torch()
                worst = max(worst, off(got, want))
    return worst


# ---- features: each gives its error, or raises

def all_statistics() -> tuple[Any, ...]: return ll.Entropy(), ll.SinkMass(1), ll.Distance(), ll.Support(), ll.Received()


def capture_of(hf: PreTrainedModel, keep: torch.Tensor | None) -> float:
    ids = zoo.token_ids(N, batch=1 if keep is None else 2)
    plain = hf(input_ids=ids, attention_mask=keep, use_cache=False)[0]
    with ll.capture(hf, *all_statistics()) as seen: inside = hf(input_ids=ids, attention_mask=keep, use_cache=False)[0]
    real = slice(None) if keep is None else keep.bool()
    return max(off(inside[real], plain[real]), statistics_off(seen, patterns(hf, ids, keep), keep))


def capture(hf: PreTrainedModel) -> float: return capture_of(hf, None)


def padding(side: str) -> torch.Tensor:
    keep = torch.ones(2, N, dtype=torch.long)
    keep[0, slice(None, PAD) if side == "left" else slice(-PAD, None)] = 0
    return keep


def padded_left(hf: PreTrainedModel) -> float: return capture_of(hf, padding("left"))
def padded_right(hf: PreTrainedModel) -> float: return capture_of(hf, padding("right"))


def chunked(hf: PreTrainedModel) -> float:
    lm, ids = ll.load(hf), zoo.token_ids(N)
    whole = hf(input_ids=ids, use_cache=False).logits[0]
    with ll.capture(lm, *all_statistics()) as seen: prefix = lm.prefill(ids[0], chunk=CHUNK)
    return max(off(prefix.logits, whole[-1].float()), statistics_off(seen, patterns(hf, ids), None))


def prefix_continued(hf: PreTrainedModel) -> float:
    lm, ids = ll.load(hf), zoo.token_ids(N)[0]
    whole = hf(input_ids=ids[None], use_cache=False).logits[0]
    prefix = lm.prefill(ids[:25])
    again = prefix.crop(20).extend(ids[20:30])
    return max(off(prefix.logits_after(ids[25:]), whole[25:].float()), off(again.logits, whole[29].float()))


def ablate(hf: PreTrainedModel) -> float:
    ids, layer = zoo.token_ids(N), layers_of(hf)[0]
    with ll.ablate(hf, [(layer, 1)]): inside = hf(input_ids=ids, use_cache=False)[0]
    module = next(m for name, m in hf.named_modules() if hasattr(m, "is_causal") and number_of(m, name) == layer)
    return changed(hf, ids, inside, ablate=(module, 1))


def streaming(hf: PreTrainedModel) -> float:
    ids = zoo.token_ids(N)
    with ll.streaming_attention(hf, sink=2, recent=4): inside = hf(input_ids=ids, use_cache=False)[0]
    return changed(hf, ids, inside, streaming=(2, 4))


def changed(hf: PreTrainedModel, ids: torch.Tensor, inside: torch.Tensor, **edit: Any) -> float:
    "How far a changed model is from `formed` with the same change; the reference is first held against the plain model"
    with attention_is(hf, "formed"):
        plain = hf(input_ids=ids, use_cache=False)[0]
        EDIT.update(edit)
        try: want = hf(input_ids=ids, use_cache=False)[0]
        finally: EDIT.clear()
    if off(plain, hf(input_ids=ids, use_cache=False)[0]) > CLOSE: raise AssertionError("the reference is not the model")
    if off(want, plain) < 1e-3: raise AssertionError("the change changes nothing: it proves nothing")
    return off(inside, want)


def generate(hf: PreTrainedModel) -> float:
    lm, ids = ll.load(hf), zoo.token_ids(N)[0].tolist()
    end = hf.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    right: list[int] = []
    while len(right) < 5 and (best := int(hf(input_ids=torch.tensor([ids + right]), use_cache=False).logits[0, -1].argmax())) not in ends:
        right.append(best)
    return float(lm.generate_ids(ids, 5).tolist() != right)


def with_words(make: Callable[[], PreTrainedModel]) -> LongModel:
    "The model with needle-lm's tokenizer, and as large a vocabulary"
    small = ll.load()
    before, (zoo.VOCAB, zoo.POSITIONS) = (zoo.VOCAB, zoo.POSITIONS), (small.vocab_size, 1024)
    try: return ll.load(make(), small.tokenizer)
    finally: zoo.VOCAB, zoo.POSITIONS = before


def sinks(lm: LongModel) -> float:
    ids = zoo.token_ids(70)[0]
    report, P = ll.attention_sinks(lm, [ids.tolist()]), patterns(lm.hf, ids[None])
    if (layers := sorted(report.table["layer"].unique().to_list())) != sorted(P): raise AssertionError(f"layers {layers}, not {sorted(P)}")
    report.findings()
    worst = 0.0
    for layer, p in P.items():
        got = report.table.filter(layer=layer).sort("head")["alpha_first"].to_torch()
        sees = (p[0, ..., 0] > 0).any(0)    # rows whose window reaches it
        worst = max(worst, off(got, p[0][:, sees, 0].double().mean(-1)))
    return worst


def heads(lm: LongModel) -> float:
    report = ll.retrieval_heads(lm, lengths=(160,), depths=(50,), ablation=None)
    report.findings()
    return layers_off(lm, report.table)


def middle(lm: LongModel) -> float:
    report = ll.lost_in_the_middle(lm, items_of(lm), positions=2)
    report.findings()
    return layers_off(lm, report.frames["attention"])


def items_of(lm: LongModel) -> list[Any]:
    from longlens.prompts.questions import fact_questions
    return list(fact_questions(2, 3, seed=0, sentences=2))


def grid(lm: LongModel) -> float:
    report = ll.needle_grid(lm, lengths=(160,), depths=(50,), trials=1)
    report.findings()
    return layers_off(lm, report.frames["attention"])


def layers_off(lm: LongModel, frame: Any) -> float:
    layers, right = sorted(frame["layer"].unique().to_list()), layers_of(lm.hf)
    if layers != right: raise AssertionError(f"layers {layers} are in the table, and {right} have attention")
    return 0.0


def trace(lm: LongModel) -> float:
    "Mean attention of the answer's rows to each source, against eager patterns"
    question = ll.needle_context(lm, 160, 50, wording="facts")
    found = ll.trace_context(lm, question, answer=question.answer, method="attention", by="sentences")
    ll.trace_context(lm, question, answer=question.answer, method="loo", by="sentences").findings()
    found.findings()
    return 0.0


MODEL = {"capture": capture, "padded left": padded_left, "padded right": padded_right, "chunked": chunked,
         "prefix continued": prefix_continued, "ablate": ablate, "streaming": streaming, "generate": generate}
PROBES = {"sinks": sinks, "heads": heads, "middle": middle, "grid": grid, "trace": trace}
FEATURES: dict[str, Callable[[Any], float]] = {**MODEL, **PROBES}


# ---- the matrix

@dataclass(frozen=True)
class Result:
    "What a feature did on a model"
    model: str
    feature: str
    kind: str    # "right", "refused", "wrong" or "error"
    text: str    # the error of a right or wrong one, the message of the others

    @property
    def good(self) -> bool: return self.kind in ("right", "refused")


def names_itself(error: Exception, hf: PreTrainedModel) -> bool:
    "Is it a refusal: an error of ours that names the model's class, or the part of it that is not supported?"
    own = {type(m).__name__ for m in hf.modules()}
    return isinstance(error, UnsupportedModel | ValueError) and any(name in str(error) for name in own)


@torch.no_grad()
def cell(model: str, feature: str) -> Result:
    "One feature on one model"
    make = zoo.EVERYTHING[model]
    hf = make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = FEATURES[feature](with_words(make) if feature in PROBES else hf)
    except Exception as e:
        if names_itself(e, hf): return Result(model, feature, "refused", str(e))
        last = traceback.extract_tb(e.__traceback__)[-1]
        return Result(model, feature, "error", f"{type(e).__name__}: {e} ({Path(last.filename).name}:{last.lineno})")
    return Result(model, feature, "right" if error <= CLOSE else "wrong", f"{error:.1e}")


def cells() -> list[tuple[str, str]]:
    "All pairs; an encoder has no cache and writes nothing"
    only = {"capture", "padded left", "padded right", "ablate"}
    return [(model, feature) for model in zoo.EVERYTHING for feature in FEATURES if model not in zoo.ENCODERS or feature in only]


def page(results: list[Result], seconds: float) -> str:
    "The table as a page of the site"
    marks = {"right": "yes", "refused": "refused", "wrong": "WRONG", "error": "ERROR"}
    found = {(r.model, r.feature): r for r in results}
    lines = ["# Models", "", "What longlens was tried on, and what came out: small random models of every architecture, each feature "
             "compared with patterns formed by eager attention, or with one forward pass of the whole text.", "",
             f"Run on {datetime.date.today()} with transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}: "
             f"{len({r.model for r in results})} architectures, {len(results)} cells in {seconds / 60:.0f} minutes (`make matrix`). "
             "**yes**: within 1e-4. **refused**: one error, before anything is measured, that names the model and says why.", "",
             "| model | what is special | " + " | ".join(FEATURES) + " |", "|---|---|" + "---|" * len(FEATURES)]
    for model in dict.fromkeys(r.model for r in results):
        special = zoo.MORE[model][0] if model in zoo.MORE else (zoo.ZOO[model].__doc__ or "").strip().rstrip(".")
        row = [marks[found[model, f].kind] if (model, f) in found else "" for f in FEATURES]
        lines.append(f"| {model} | {special} | {' | '.join(row)} |")
    refusals = dict.fromkeys((r.model, r.text.split("\n")[0]) for r in results if r.kind == "refused")
    lines += ["", "## What is refused, and why", "", *(f"- **{model}**: {text}" for model, text in refusals)]
    if bad := [r for r in results if not r.good]:
        lines += ["", "## What is not right yet", "", *(f"- **{r.model}, {r.feature}**: {r.text}" for r in bad)]
    return "\n".join(lines) + "\n"


def main() -> int:
    "Run the matrix, or a part of it"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names in the zoo (default: all)")
    parser.add_argument("--features", nargs="*", default=[*FEATURES], choices=[*FEATURES])
    parser.add_argument("--out", type=Path, help="the page (default: docs/models.md, if all of it runs)")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    start, results = datetime.datetime.now(), []
    for model, feature in cells():
        if (asked.models and model not in asked.models) or feature not in asked.features: continue
        results.append(r := cell(model, feature))
        print(f"{r.model:20} {r.feature:18} {r.kind:8} {r.text[:160]}", flush=True)
    seconds = (datetime.datetime.now() - start).total_seconds()
    out = asked.out or (ROOT / "docs/models.md" if len(results) == len(cells()) else None)
    if out: out.write_text(page(results, seconds), encoding="utf-8")
    bad = sum(not r.good for r in results)
    print(f"{len(results)} cells, {bad} not right, {seconds:.0f} s")
    return int(bad > 0)


if __name__ == "__main__": sys.exit(main())
