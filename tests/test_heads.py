"""Retrieval heads on a model whose copying head is known, because its weights were written by hand"""
from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from zoo import zoo_model

import longlens as ll
from longlens.interventions.base import interventions
from longlens.needle_lm.data import NAMES, VALUES
from longlens.probes.heads.ablation import ablation_curve
from longlens.probes.heads.duo_gates import GateSettings, duo_gates
from longlens.probes.heads.files import read_retrieval_scores, write_retrieval_scores
from longlens.probes.heads.probe import retrieval_heads
from longlens.probes.heads.report import HeadReport
from longlens.probes.heads.scores import Watch, _line_ended, pattern_scores, qr_scores, run_trials
from longlens.probes.heads.views import METHODS
from longlens.prompts.compose import Piece

WORDS, PLACES = 32, 64  # tokens of the vocabulary, positions
COPIES = (1, 1)  # the head that copies
LOOKS_BACK = (0, 0)  # the head that makes it possible


def _put(conv: torch.nn.Module, rows: slice, columns: slice, size: float) -> None:
    "size times the identity into a block of a Conv1D"
    n = rows.stop - rows.start
    conv.weight[rows, columns] = size * torch.eye(n)


@torch.no_grad()
def copying_model(copies: bool = True) -> GPT2LMHeadModel:
    """Two layers, two heads each, no MLP. The residual stream has three blocks: token, position, previous token.

    Head 0 of layer 0 asks for position i - 1 and writes the token there into the third block. Head 1 of layer 1 asks for the place
    whose previous token is the current one, and writes the token there into the first block, from which the logits are read.
    """
    d, head = 2 * WORDS + PLACES, PLACES
    token, place, before = slice(0, WORDS), slice(WORDS, WORDS + PLACES), slice(WORDS + PLACES, d)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=PLACES, n_embd=d, n_layer=2, n_head=2, n_inner=8, resid_pdrop=0.0,
                                       embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    for name, p in model.named_parameters():
        if "ln_" not in name: p.zero_()
    model.transformer.wte.weight[:, token] = torch.eye(WORDS)
    model.transformer.wpe.weight[:, place] = torch.eye(PLACES)
    q, k, v = (slice(i * d, (i + 1) * d) for i in range(3))
    def columns(part: slice, h: int, n: int) -> slice: return slice(part.start + h * head, part.start + h * head + n)
    first, second = (block.attn for block in model.transformer.h)
    _put(first.c_attn, place, columns(k, 0, PLACES), 2.0)
    first.c_attn.weight[place, columns(q, 0, PLACES)] = 2.0 * torch.eye(PLACES).roll(-1, 1)  # position i asks for i - 1
    _put(first.c_attn, token, columns(v, 0, WORDS), 1.0)
    _put(first.c_proj, slice(0, WORDS), before, 0.125)
    _put(second.c_attn, token, columns(q, 1, WORDS), 2.0)
    _put(second.c_attn, before, columns(k, 1, WORDS), 2.0)
    _put(second.c_attn, token, columns(v, 1, WORDS), 1.0)
    if copies: _put(second.c_proj, slice(head, head + WORDS), token, 4.0)
    return model


@functools.cache
def words() -> PreTrainedTokenizerFast:
    "One word, one token"
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))])},
                                     unk_token="w3"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@functools.cache
def known() -> ll.LongModel: return ll.load(copying_model(), words())


def question(lm: ll.LongModel, seed: int, n: int = 40) -> ll.Context:
    "Different words, among them a needle of a key and three more, then the key again"
    g = np.random.default_rng(seed)
    order = [f"w{i}" for i in g.permutation(np.arange(4, WORDS))]
    needle, rest = order[:4], order[4:]
    at = int(g.integers(0, len(rest)))
    pieces = ["".join(f"{w} " for w in rest[:at]), Piece(" ".join(needle), "needle"), "".join(f" {w}" for w in rest[at:]), f" {needle[0]}"]
    value = " ".join(needle[1:])
    return ll.compose_prompt(lm, [p for p in pieces if p], answers=[value], completion=f" {value}", kind="by hand")


@pytest.mark.parametrize("mode", ["teacher", "decode"])
def test_the_copying_head_is_found(mode: str) -> None:
    lm = known()
    contexts = [question(lm, s) for s in range(8)]
    report = retrieval_heads(lm, contexts, mode=mode, methods=("patterns",), ablation=None)
    assert report.frames["trials"]["kept"].all() and report.found == [COPIES]
    score = {(a, b): s for a, b, s in report.frames["heads"].select("layer", "head", "retrieval_score").iter_rows()}
    if mode == "teacher": assert score[COPIES] == pytest.approx(3 / 4)  # three of the needle's four tokens are said
    most = 0 if mode == "teacher" else .1  # decoding goes on after the answer, and then anything may be looked at
    assert all(s <= most for h, s in score.items() if h != COPIES)


def test_both_modes_agree_step_by_step() -> None:
    lm = known()
    for s in range(5):
        ctx = question(lm, s)
        forced, free = (run_trials(lm, [ctx], Watch(m, 3))[0] for m in ("teacher", "decode"))
        assert torch.equal(forced.reply_ids, free.reply_ids) and torch.equal(forced.looked, free.looked)
        assert torch.equal(forced.retrieval_score, free.retrieval_score)


def test_a_new_line_in_front_of_an_answer_does_not_end_it() -> None:
    lm: Any = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "".join("\nab "[i] for i in ids)))
    assert [_line_ended(lm, reply) for reply in ([0], [0, 3, 0, 1], [0, 1, 0], [1, 0])] == [False, False, True, True]


def test_patterns_name_the_heads() -> None:
    p = pattern_scores(known(), period=24, sequences=16)
    assert divmod(int(p["induction"].argmax()), 2) == COPIES and p["induction"][COPIES] > .4  # words repeat within a period by chance
    assert divmod(int(p["previous_token"].argmax()), 2) == LOOKS_BACK and p["previous_token"][LOOKS_BACK] > .9


def test_query_attention_names_the_head() -> None:
    lm, pairs, gold = known(), [], []
    for s in range(6):
        g = np.random.default_rng(s)
        order = [f"w{i}" for i in g.permutation(np.arange(4, WORDS))]
        docs, at = [order[i * 6:i * 6 + 6] for i in range(4)], s % 4
        # the query repeats words of one document; the null query has a word that no document has
        ask = [Piece(" " + " ".join(d), f"document_{i}") for i, d in enumerate(docs)]
        pairs.append(tuple(ll.compose_prompt(lm, [*ask, Piece(q, "query")], kind="by hand")
                           for q in (" " + " ".join(docs[at][:3]), " " + " ".join(["w3"] * 3))))
        gold.append([at])
    scores = qr_scores(lm, pairs, gold)
    assert divmod(int(scores.argmax()), 2) == COPIES
    others = scores.flatten().sort(descending=True).values[1]
    assert scores[COPIES] > .5 and others < .1


def test_gates_keep_the_head() -> None:
    lm, texts = known(), []
    for s in range(12):
        ctx = question(lm, s)
        ids = torch.cat([ctx.tokens.ids, ctx.completion_ids])
        texts.append((ids, torch.arange(len(ctx), len(ids))))
    fit = duo_gates(lm, texts, GateSettings(steps=60, lr=.05, penalty=.05, sink=1, recent=4), progress=False)
    gate = {(a, b): g for a, b, g in fit.gates.iter_rows()}
    assert gate[COPIES] > .8 and all(g < .3 for h, g in gate.items() if h != COPIES)
    assert fit.log["mean_gate"][-1] < fit.log["mean_gate"][0]
    assert all(p.requires_grad for p in lm.hf.parameters()) and not interventions(lm)


def test_silencing_it_ends_retrieval() -> None:
    lm = known()
    contexts = [question(lm, s) for s in range(6)]
    f = ablation_curve(lm, [COPIES], contexts, lm.tokens(question(lm, 99).text).ids, counts=(1,), n_random=6, progress=False)
    assert f.filter(silenced=0)["accuracy"][0] == 1 and f.filter(which="top", silenced=1)["accuracy"][0] == 0
    random = f.filter(which="random")
    needed = random["heads"] == "0-0"  # without the head that looks back there is nothing to match
    assert (random.filter(needed)["accuracy"] == 0).all() and (random.filter(~needed)["accuracy"] == 1).all() and (~needed).any()


@pytest.mark.parametrize("model", ["silent", "gpt2"])
def test_no_copying_heads_means_none(model: str) -> None:
    "The same model whose copying head writes nothing, and a random one: no trial is answered, so nothing is claimed"
    hf = copying_model(copies=False) if model == "silent" else zoo_model("gpt2")
    lm = ll.load(hf, words())
    report = retrieval_heads(lm, [question(lm, s) for s in range(6)], methods=("patterns",))
    assert report.found == [] and report.meta["counted"] == 0 and "ablation" not in report.frames
    assert "nothing can be said" in report.details()[0]
    counted = retrieval_heads(lm, [question(lm, s) for s in range(6)], methods=(), keep_all=True, ablation=None)
    assert counted.found == [] and counted.frames["heads"]["retrieval_score"].max() < .1


def test_report_survives_its_folder(tmp_path: Path) -> None:
    lm = known()
    report = retrieval_heads(lm, [question(lm, s) for s in range(4)], methods=("patterns",), n_random=2)
    again = ll.Report.load(report.save(tmp_path / "heads"))
    assert isinstance(again, HeadReport) and again.found == report.found == [COPIES] and again.details() == report.details()
    assert [s.title for s in again.sections()] == [s.title for s in report.sections()]
    assert again.chart().to_json() == report.chart().to_json()


def test_scores_go_to_the_published_format_and_back(tmp_path: Path) -> None:
    lm = known()
    report = retrieval_heads(lm, [question(lm, s) for s in range(4)], methods=(), ablation=None)
    back = read_retrieval_scores(write_retrieval_scores(report.frames["scores"], tmp_path / "scores.json"))
    mean = back.group_by("layer", "head").agg(pl.col("score").mean()).sort("layer", "head")["score"]
    assert mean.to_list() == pytest.approx(report.frames["heads"]["retrieval_score"].to_list())


def test_what_is_changed_meanwhile_is_said() -> None:
    lm = known()
    contexts = [question(lm, s) for s in range(3)]
    with ll.ablate(lm, [COPIES]): report = retrieval_heads(lm, contexts, methods=(), ablation=None)
    assert report.found == [] and [i["intervention"] for i in report.meta["interventions"]] == ["ablate"]
    assert retrieval_heads(lm, contexts, methods=(), ablation=None).meta["interventions"] == []


def test_a_view_of_ones_own() -> None:
    lm = known()
    METHODS["mine"] = lambda lm, s, progress: {"mine": torch.arange(4.0).view(2, 2)}
    try: report = retrieval_heads(lm, [question(lm, 1)], methods=("mine",), ablation=None)
    finally: del METHODS["mine"]
    assert report.frames["heads"]["mine"].to_list() == [0, 1, 2, 3]


def test_bad_input() -> None:
    lm = known()
    with pytest.raises(ValueError, match="contexts is empty"): retrieval_heads(lm, [])
    ctx = ll.compose_prompt(lm, ["w4 w5 w6"], answers=["w5"], completion=" w5")
    with pytest.raises(ValueError, match="no span 'needle'"): retrieval_heads(lm, [ctx])
    with pytest.raises(ValueError, match="trials is 0"): retrieval_heads(lm, trials=0)


def test_a_haystack_that_has_the_fact_already() -> None:
    "Needles have names and values that the text has not; a text that leaves none, or a wording without names, is refused"
    lm, seen = ll.load(), {"lengths": (300,), "depths": (50,), "trials": 3, "methods": (), "ablation": None}
    drawn = retrieval_heads(lm, **seen).frames["trials"]["answer"].to_list()
    facts = zip(NAMES[:200], [*drawn, *VALUES], strict=False)
    text = " ".join(f"The code for {name} is {value}." for name, value in facts) + " It rained." * 9
    report = retrieval_heads(lm, haystack=ll.Haystack.from_text(text, repeat=True), **seen)
    assert not {*report.frames["trials"]["answer"]} & {*drawn} and report.frames["trials"]["right"].all()
    crowded = ll.Haystack.from_text(" ".join(f"The code for {name} is river." for name in NAMES), repeat=True)
    with pytest.raises(ValueError, match="no new one comes that the haystack has not already"):
        retrieval_heads(lm, haystack=crowded, **seen)
    city = ll.Haystack.from_text("The best thing to do in San Francisco is to leave. The end of it.", repeat=True)
    with pytest.raises(ValueError, match="the haystack says 'The best thing to do in San Francisco is' already"):
        ll.needle_context(lm, 300, haystack=city, wording="san_francisco")
