"""Every feature on every model of the zoo: right to 1e-4 against formed patterns and whole forward passes, or refused with a reason.

    python tests/matrix.py                          all of it, and docs/models.md is written
    python tests/matrix.py --fresh                  the same from the beginning: otherwise a run that was stopped goes on
    python tests/matrix.py --only jamba gemma4 --feature capture chunked

Each cell is kept in out/matrix.jsonl when it is done. `make matrix` runs all of it afresh, and tests/test_matrix.py a random
tenth. What a model is compared with does not go through longlens: patterns are those of transformers' own eager attention, logits those of
one forward pass of the whole text, and changed heads those of the attention function `formed` below, which forms the matrix.
"""
from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
    longer = prefix.extend(ids[25:30])
    wrong = max(off(prefix.logits_after(ids[25:]), whole[25:].float()), off(longer.logits, whole[29].float()),
                off(longer.logits_after(ids[30:]), whole[30:].float()))
    try: again = prefix.crop(20).extend(ids[20:30])
    except ValueError as e:    # a state that has taken tokens in cannot give them back
        if "has forgotten what it would need" not in str(e): raise
        return wrong
    return max(wrong, off(again.logits, whole[29].float()))


def ablate(hf: PreTrainedModel) -> float:
    ids, layer = zoo.token_ids(N), (layers_of(hf) or [0])[0]
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


def large(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, Any]:
    "The model with as large a vocabulary as needle-lm, and needle-lm's tokenizer"
    small = ll.load()
    before, (zoo.VOCAB, zoo.POSITIONS) = (zoo.VOCAB, zoo.POSITIONS), (small.vocab_size, 1024)
    try: return make(), small.tokenizer
    finally: zoo.VOCAB, zoo.POSITIONS = before


def with_words(make: Callable[[], PreTrainedModel]) -> LongModel: return ll.load(*large(make))


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
    report = ll.retrieval_heads(lm, lengths=(160,), depths=(50,), ablation=None, max_new_tokens=4)
    report.findings()
    return layers_off(lm, report.table)


def middle(lm: LongModel) -> float:
    report = ll.lost_in_the_middle(lm, items_of(lm), positions=2, max_new_tokens=4)
    report.findings()
    return layers_off(lm, report.frames["attention"])


def items_of(lm: LongModel) -> list[Any]:
    from longlens.prompts.questions import fact_questions
    return list(fact_questions(2, 2, seed=0, sentences=1))


def grid(lm: LongModel) -> float:
    report = ll.needle_grid(lm, lengths=(160,), depths=(50,), trials=1, max_new_tokens=4)
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
    k, answer = len(question.tokens), torch.tensor(found.frames["answer"]["id"].to_list())
    P = patterns(lm.hf, torch.cat([question.tokens.ids, answer])[None])
    want = torch.stack([p[0, :, k - 1:, :k].double().mean((0, 1)) for p in P.values()]).mean(0)
    return off(found.frames["tokens"].sort("position")["attention"].to_torch(), want)


def gain(lm: LongModel) -> float:
    "The end of a text, with two lengths of context before it"
    ids, targets = zoo.token_ids(70)[0], 8
    report = ll.context_gain(lm, [ids.tolist()], windows=(16, 48), targets=targets)
    report.findings()
    worst = 0.0
    for window in (16, 48):
        part = ids[-window - targets:]
        logits = lm.hf(input_ids=part[None], use_cache=False).logits[0, window - 1:-1].double()
        want = logits.log_softmax(-1).gather(-1, part[window:, None]).mean()
        got = report.frames["rows"].filter(window=window)["logprob"].to_torch()
        worst = max(worst, off(got, want.expand(1)))
    return worst


def collapse(encoder: Any) -> float:
    "Vectors of texts, against that of a plain forward"
    report = ll.length_collapse(encoder, lengths=(16, 32), n_documents=8, taus=(), retrieval=())
    report.findings()
    text = "What the two of them had seen from the bridge was a boat, and nobody in it."
    ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
    return off(torch.as_tensor(encoder.encode([text]))[0], encoder.hf(input_ids=ids)[0][0].mean(0))


MODEL = {"capture": capture, "padded left": padded_left, "padded right": padded_right, "chunked": chunked,
         "prefix continued": prefix_continued, "ablate": ablate, "streaming": streaming, "generate": generate}
PROBES = {"sinks": sinks, "heads": heads, "middle": middle, "grid": grid, "trace": trace, "gain": gain, "collapse": collapse}
OF_ENCODERS = {"capture", "padded left", "padded right", "ablate", "collapse"}    # an encoder has no cache and writes nothing
FEATURES: dict[str, Callable[[Any], float]] = {**MODEL, **PROBES}


# ---- the matrix

@dataclass(frozen=True)
class Result:
    "What a feature did on a model"
    model: str
    feature: str
    kind: str    # "right", "refused", "wrong" or "error"
    text: str    # the error of a right or wrong one, the message of the others
    seconds: float = 0.0

    @property
    def good(self) -> bool: return self.kind in ("right", "refused")


def names_itself(error: Exception, hf: PreTrainedModel) -> bool:
    "Is it a refusal: an error of ours that names the model's class, or the part of it that is not supported?"
    own = {type(m).__name__ for m in hf.modules()}
    return isinstance(error, UnsupportedModel | ValueError) and any(name in str(error) for name in own)


def cell(model: str, feature: str) -> Result:
    "One feature on one model, and how long it took"
    start = time.perf_counter()
    return replace(tried(model, feature), seconds=round(time.perf_counter() - start, 2))


def given(make: Callable[[], PreTrainedModel], probe: str) -> Any:
    "What a probe measures"
    return ll.load_encoder(*large(make), "mean") if probe == "collapse" else with_words(make)


@torch.no_grad()
def tried(model: str, feature: str) -> Result:
    "One feature on one model"
    make = zoo.EVERYTHING[model]
    hf = make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = FEATURES[feature](given(make, feature) if feature in PROBES else hf)
    except Exception as e:
        if names_itself(e, hf): return Result(model, feature, "refused", str(e))
        last = traceback.extract_tb(e.__traceback__)[-1]
        return Result(model, feature, "error", f"{type(e).__name__}: {e} ({Path(last.filename).name}:{last.lineno})")
    return Result(model, feature, "right" if error <= CLOSE else "wrong", f"{error:.1e}")


def cells() -> list[tuple[str, str]]:
    "All pairs that have a meaning"
    return [(model, feature) for model in zoo.EVERYTHING for feature in FEATURES
            if (feature in OF_ENCODERS if model in zoo.ENCODERS else feature != "collapse")]


def some_cells(seed: int, share: float = 0.1) -> list[tuple[str, str]]:
    "A random part of them"
    every = cells()
    return random.Random(seed).sample(every, round(share * len(every)))


# ---- what was found

def kept(path: Path) -> dict[tuple[str, str], Result]:
    "Results of a run that may have been stopped"
    if not path.exists(): return {}
    found = [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {(r.model, r.feature): r for r in found}


def keep_result(path: Path, r: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as f: f.write(json.dumps(asdict(r)) + "\n")


INTRO = """# Models

> Every feature of longlens on small random models of every architecture

Each cell compares what longlens gives with patterns formed by transformers' eager attention, or with one forward pass of the whole text.
"""
WHAT = {"capture": "five statistics of every head", "padded left": "of a batch with padding in front", "padded right": "or behind",
        "chunked": "of a text that runs in chunks", "prefix continued": "logits after a prefix that goes on, and one that is cut",
        "ablate": "logits with a head silenced", "streaming": "logits with streaming attention", "generate": "greedy tokens",
        "sinks": "`attention_sinks`", "heads": "`retrieval_heads`", "middle": "`lost_in_the_middle`", "grid": "`needle_grid`",
        "trace": "`trace_context`", "gain": "`context_gain`", "collapse": "`length_collapse`"}
MARKS = {"right": "yes", "refused": "refused", "wrong": "WRONG", "error": "ERROR"}


def special(model: str) -> str: return zoo.MORE[model][0] if model in zoo.MORE else (zoo.ZOO[model].__doc__ or "").strip().rstrip(".")


def page(found: dict[tuple[str, str], Result]) -> str:
    "The table as a page of the site"
    results, models = list(found.values()), list(dict.fromkeys(model for model, _ in found))
    count = {kind: sum(r.kind == kind for r in results) for kind in MARKS}
    minutes = sum(r.seconds for r in results) / 60
    versions = f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}"
    lines = [INTRO, f"Run on {datetime.date.today()} with {versions} (`make matrix`, {minutes:.0f} minutes): {len(models)} architectures, "
             f"{len(results)} cells. **yes** ({count['right']}): equal to 1e-4. **refused** ({count['refused']}): one error, before "
             "anything is measured, that names the model and says why. Empty: the feature has no meaning for the model. `make test` tries "
             "a random tenth again.", "",
             "; ".join(f"**{name}**: {what}" for name, what in WHAT.items()) + ".", "",
             "| model | what is special | " + " | ".join(FEATURES) + " |", "|---|---|" + "---|" * len(FEATURES)]
    for model in models:
        row = [MARKS[found[model, f].kind] if (model, f) in found else "" for f in FEATURES]
        lines.append(f"| {model} | {special(model)} | {' | '.join(row)} |")
    lines += ["", "## What is refused, and why", ""]
    why: dict[tuple[str, str], list[str]] = {}
    for r in results:
        if r.kind == "refused": why.setdefault((r.model, r.text.split("\n")[0]), []).append(r.feature)
    lines += [f"- **{model}** ({', '.join(features)}): {text}" for (model, text), features in why.items()]
    if bad := [r for r in results if not r.good]:
        lines += ["", "## What is not right yet", "", *(f"- **{r.model}, {r.feature}**: {r.text}" for r in bad)]
    return "\n".join(lines) + "\n"


def main() -> int:
    "Run the matrix, or a part of it"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="MODEL", help="names in the zoo (default: all)")
    parser.add_argument("--feature", nargs="*", default=[*FEATURES], choices=[*FEATURES])
    parser.add_argument("--results", type=Path, default=ROOT / "out/matrix.jsonl", help="where finished cells are kept")
    parser.add_argument("--fresh", action="store_true", help="run cells again that are kept there")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/models.md", help="the page, which is written when no cell is missing")
    asked = parser.parse_args()
    if odd := set(asked.only or ()) - zoo.EVERYTHING.keys(): parser.error(f"no model {min(odd)!r}: there are {', '.join(zoo.EVERYTHING)}")
    transformers.logging.set_verbosity_error()
    wanted = [c for c in cells() if (not asked.only or c[0] in asked.only) and c[1] in asked.feature]
    done = {} if asked.fresh and len(wanted) == len(cells()) else kept(asked.results)
    if not done: asked.results.unlink(missing_ok=True)
    left = wanted if asked.fresh or len(wanted) < len(cells()) else [c for c in wanted if c not in done]
    if len(left) < len(wanted): print(f"{len(wanted) - len(left)} cells are in {asked.results} already: --fresh runs them again")
    for c in left:
        done[c] = r = cell(*c)
        keep_result(asked.results, r)
        print(f"{r.model:20} {r.feature:18} {r.kind:8} {r.seconds:6.1f} s  {r.text[:160]}", flush=True)
    if all(c in done for c in cells()): asked.out.write_text(page({c: done[c] for c in cells()}), encoding="utf-8")
    bad = [done[c] for c in wanted if not done[c].good]
    print(f"{len(wanted)} cells, {len(bad)} not right, {sum(done[c].seconds for c in wanted):.0f} s")
    for r in bad: print(f"NOT RIGHT: {r.model}, {r.feature}: {r.text}")
    return int(bool(bad))


if __name__ == "__main__": sys.exit(main())
