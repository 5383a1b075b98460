"""Published sets: real sample rows, damaged, mixed, huge and duplicate files, and questions through every probe"""
from __future__ import annotations

import copy
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matrix import patterns

import longlens as ll
from longlens.cli.main import main
from longlens.probes.tasks.readings import READINGS, quotes_first, reading_curve, segments_in_turn
from longlens.prompts.compose import PromptSettings
from longlens.prompts.questions import fact_questions, read_questions, title_and_text
from longlens.run import plan
from longlens.task_data import made
from longlens.task_data.files import read_rows
from longlens.task_data.haystacks import bm25_scores
from longlens.task_data.load import DATASETS, tasks
from longlens.task_data.made import document_tasks
from longlens.task_data.metrics import TASK_METRICS, score_reply

SAMPLES = Path(__file__).parent / "data" / "tasks"


@pytest.fixture(scope="module")
def lm() -> ll.LongModel: return ll.load("needle-lm")


# ---- real rows

@pytest.mark.parametrize(("name", "file", "state"), [
    ("longproc:path_traversal", "path_traversal_0.5k.json", "found"), ("longproc:tom_tracking", "tom_tracking_0.5k.json", "none"),
    ("longproc:countdown", "countdown_0.5k.json", "none"), ("loogle:longdep_qa", "longdep_qa.jsonl", None)])
def test_real_rows_are_read(name: str, file: str, state: str | None) -> None:
    found = tasks(name, SAMPLES / file)
    assert len(found) and all(q.where.startswith(str(SAMPLES / file)) for q in found)
    assert state is None or found[0].gold_state == state
    assert all(q.context[a:b].strip() for q in found for a, b in q.gold)


def test_the_right_answer_of_a_real_row_scores_one() -> None:
    route, beliefs, sums = (tasks(f"longproc:{n}", SAMPLES / f"{n}_0.5k.json")[0] for n in ("path_traversal", "tom_tracking", "countdown"))
    assert score_reply(route, f"<Route>\n{route.answers[0]}\n</Route>") == 1
    assert score_reply(beliefs, beliefs.answers[0]) == 1
    assert score_reply(sums, f"<Solution>\n{sums.answers[0]}\n</Solution>") == 1
    assert score_reply(sums, "<Solution>\n1 + 1 = 2\n</Solution>") == 0


def test_every_route_stands_in_its_context() -> None:
    q = tasks("longproc:path_traversal", SAMPLES / "path_traversal_0.5k.json")[0]
    assert len(q.gold) == len(q.answers[0].splitlines()) and 0 < q.scope < 1 and 0 < q.diffusion <= 1


# ---- files

def test_a_huge_file_streams(tmp_path: Path) -> None:
    "200 MB of JSON, as one list, in 40 MB more than the process takes without it"
    path, row = tmp_path / "huge.json", json.dumps({"a": "x" * 100_000})
    with path.open("w") as f:
        f.write("[")
        for i in range(2000): f.write(("," if i else "") + row)
        f.write("]")
    code = ("import resource; from longlens.task_data.files import read_rows; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"n = sum(1 for _ in read_rows({str(path)!r}))\nprint(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n, kilobytes = map(int, done.stdout.split())
    assert n == 2000 and kilobytes < 40_000, done.stdout


def test_a_cut_archive_says_where(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps({"i": i, "t": str(i) * 999}) for i in range(999)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut off|cannot be read as JSON"): list(read_rows(tmp_path / "a.jsonl.gz"))


def test_what_stands_twice_is_kept_and_told(tmp_path: Path) -> None:
    row = {"input": "Who?", "context": "Bo did.", "answers": ["Bo"], "dataset": "qasper", "language": "en", "all_classes": None, "_id": "1"}
    (tmp_path / "qasper.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    found = tasks("longbench:qasper", tmp_path)
    assert len(found) == 3 and "2 stand there twice, and are kept" in found.notes()


def on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A folder in the place of LongBench on the hub: `datasets` reads both alike"
    folder.mkdir()
    row = {"input": "Who?", "context": "Bo did.", "answers": ["Bo"], "dataset": "qasper", "language": "en", "all_classes": None, "_id": "1"}
    (folder / "qasper.jsonl").write_text("\n".join(json.dumps({**row, "_id": str(i)}) for i in range(3)))
    about = {"configs": [{"config_name": "qasper", "data_files": [{"split": "test", "path": "qasper.jsonl"}]}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(about)}\n---\n")
    monkeypatch.setitem(DATASETS, "longbench", replace(DATASETS["longbench"], hub=str(folder)))


def test_a_set_on_the_hub_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_hub(tmp_path / "LongBench", monkeypatch)
    found = tasks("longbench:qasper", hub=True, limit=2)
    assert [q.id for q in found] == ["0", "1"] and found[1].where == f"{tmp_path / 'LongBench'} on the hub, row 2"
    said = r"LongBench: datasets [\d.]+ cannot read hotpotqa from .*: download it from http.* and give its path"
    with pytest.raises(ValueError, match=said): tasks("longbench:hotpotqa", hub=True)


def test_a_set_that_is_a_script_is_read_as_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "`datasets` runs no scripts; the hub keeps the rows of many as parquet, under a revision of its own"
    import datasets
    on_the_hub(folder := tmp_path / "LongBench", monkeypatch)
    load, revisions = datasets.load_dataset, []

    def asked(*args: object, revision: str | None = None, **how: object) -> object:
        revisions.append(revision)
        script = folder / "LongBench.py"
        script.unlink() if revision else script.write_text("")    # a folder has no revisions
        return load(*args, **how)
    monkeypatch.setattr(datasets, "load_dataset", asked)
    assert len(tasks("longbench:qasper", hub=True)) == 3 and revisions == [None, "refs/convert/parquet"]


def test_a_row_of_another_form_names_its_line(tmp_path: Path) -> None:
    good = {"input": "Who?", "context": "Bo did.", "answers": ["Bo"], "dataset": "qasper"}
    for bad, why in (({**good, "answers": None}, "answers"), ({**good, "context": ""}, "context is empty"), ({"x": 1}, "there is no")):
        (tmp_path / "qasper.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=rf"qasper.jsonl, line 2.*{why}"): tasks("longbench:qasper", tmp_path / "qasper.jsonl")


# ---- the registry

def test_every_set_says_what_it_is() -> None:
    for d in DATASETS.values():
        assert d.title and d.licence and d.source.startswith("https://") and d.fields and d.metric and d.seen, d.name
        assert all(":" not in p for p in d.parts)


def test_every_metric_is_a_share() -> None:
    q = document_tasks(fact_questions(1, 3))[0]
    extra = {"category": 2, "keywords": "a", "begin": "", "nums": [1, 2], "target": 3, "type": "Week", "number": 2,
             "relevance": (1.0, 0.0, 0.0)}
    own = {"passage_number": "Paragraph 2", "cloze": '{"<mask-0>": "x"}', "in_order": "[1, 2, 3, 4]", "row_f1": "a\tb\n1\t2", "choice": "B"}
    for name in TASK_METRICS.keys() - {"judged"}:
        if name.endswith("_zh") or name == "rouge_l_zh_keywords": continue    # they need jieba
        for reply in ("", "no", q.answers[0], "[1, 2, 3, 4]", "A1", "Paragraph 2"):
            assert 0 <= score_reply(replace(q, metric=name, answers=(own.get(name, q.answers[0]),), meta=extra), reply) <= 1, name


# ---- made questions

MADE = {"common": lambda s: made.common_words(60, n_common=4, seed=s), "frequent": lambda s: made.frequent_words(120, seed=s),
        "unlike": lambda s: made.unlike_needle(9, 50, seed=s), "repeated": lambda s: made.repeated_requests(6, 2, 1, seed=s),
        "sorted": lambda s: made.sort_paragraphs(2, seed=s), "best": lambda s: made.best_answer(5, seed=s),
        "labels": lambda s: made.labels_by_place(12, "end", seed=s), "wrong": lambda s: made.wrong_ones(7, (1, 3), seed=s),
        "ranked": lambda s: made.rank_documents(5, seed=s)}


@pytest.mark.parametrize("name", MADE)
def test_a_made_question_is_answered_by_its_answer(name: str) -> None:
    for seed in range(5):
        q, again = MADE[name](seed), MADE[name](seed)
        assert q == again and q.gold and score_reply(q, ", ".join(q.answers) if q.metric == "all_in" else q.answers[0]) == 1
        assert all(q.context[a:b].strip() for a, b in (*q.gold, *q.parts))
    assert MADE[name](0).context != MADE[name](1).context


def test_an_order_is_read_out_of_a_reply() -> None:
    assert made.named_order("[3] > [1]", 4) == [2, 0, 1, 3]
    q = made.rank_task("x", ["a", "b", "c"], [0, 2, 1])
    assert score_reply(q, "2 > 3 > 1") == 1 > score_reply(q, "1 > 3 > 2")


def test_bm25_ranks_the_passage_that_answers_first() -> None:
    nq = read_questions("nq-sample", limit=40, drop_empty=True)
    texts = [" ".join(title_and_text(q.gold)) for q in nq]
    assert sum(int(bm25_scores(q.question, texts).argmax()) == i for i, q in enumerate(nq)) > 30


def test_readings_keep_the_evidence(lm: ll.LongModel) -> None:
    assert [*READINGS][:3] == ["plain", "structured", "recycled"]
    q = document_tasks(fact_questions(1, 4), "middle", 1)[0]
    assert quotes_first(lm, q).meta["quotes"] >= 0 and "notes" in segments_in_turn(lm, q).meta
    f = reading_curve(lm, fact_questions(1, 3), ("plain", "recycled"), places=(0,), form="middle", max_new_tokens=4)
    assert f["questions"].to_list() == [1, 1] and f["tokens"][1] > f["tokens"][0]


# ---- through the probes

def test_a_question_goes_through_every_probe(lm: ll.LongModel) -> None:
    q = document_tasks(fact_questions(1, 4), "middle")[0]
    ctx = q.prompt(lm)
    assert set(ctx.spans) >= {"context", "gold", "question", "document_0"}
    assert lm.decode(ctx.tokens.ids[list(ctx.spans["gold"])]).strip() == q.context[slice(*q.gold[0])]
    assert ll.explore(lm, q).report is not None
    with ll.capture(lm, ll.SpanMass({"gold": (ctx.spans["gold"].start, ctx.spans["gold"].stop)})) as seen: lm(ctx.tokens)
    assert seen.frame("span_mass").height
    assert plan(ll.trace_context, lm, q).tokens > 0
    assert plan(ll.policy_lens, lm, [q], ["snapkv"], budgets=.5).height == 1
    assert ll.trace_context(lm, q, answer=" " + q.answers[0], method="attention", by="documents").table.height == 4
    asked = document_tasks(fact_questions(2, 3), "middle")
    assert ll.lost_in_the_middle(lm, asked, positions=2, baselines=False, max_new_tokens=4).table.height == 2
    heads = ll.retrieval_heads(lm, asked, methods=(), ablation=None)
    once = [q.answers[0] for q in asked if q.context.count(q.answers[0]) == 1]
    assert heads.frames["trials"].filter("kept")["answer"].to_list() == once and 0 < len(once)
    assert sum(n for _, n in heads.meta["settings"]["left_out"]) == len(asked) - len(once)
    assert ll.context_gain(lm, q, windows=(8, 64), targets=8).meta["texts"] == 1  # and all that read a text
    assert ll.attention_sinks(lm, [q, asked[1]], sequences=1).meta["lengths"] == [len(x.prompt(lm)) for x in (q, asked[1])]


def test_scores_attention_and_bins(lm: ll.LongModel) -> None:
    asked = [q for p in (0, 1) for q in document_tasks(fact_questions(2, 4), "middle", p)]
    r = ll.evaluate_tasks(lm, asked, max_new_tokens=6)
    f = r.frames["answers"]
    assert f["score"].min() == 1 and f["gold_attention"].null_count() == 0
    ctx = asked[0].prompt(lm)
    full = torch.cat([ctx.tokens.ids, ctx.completion_ids])
    rows, gold = range(len(ctx) - 1, len(full) - 1), ctx.spans["gold"]
    with torch.no_grad(): formed = patterns(lm.hf, full[None])
    mass = torch.stack([p[0, :, rows.start:rows.stop, gold.start:gold.stop].sum(-1).mean(-1) for p in formed.values()])
    assert abs(float(mass.mean()) - f["gold_attention"][0]) < 1e-4
    found = r.frames["located"].select("right", "wrong").sum().row(0)
    assert sum(found) == 4


def test_truncation_counts_what_it_cuts(lm: ll.LongModel) -> None:
    q = document_tasks(fact_questions(1, 12), "middle", .5)[0]
    n = len(q.prompt(lm))
    short = q.prompt(lm, truncate=n // 2)
    assert len(short) <= n // 2 and short.meta["cut"]["gold_cut"] == 1 and "gold" not in short.spans
    assert short.meta["cut"]["tokens"] + len(short) == n
    r = ll.evaluate_tasks(lm, [q], truncate=n // 2, max_new_tokens=2)
    assert any("evidence of 1 questions" in s for s in r.details())


def test_chat_puts_the_prompt_into_one_turn(lm: ll.LongModel) -> None:
    tok = copy.deepcopy(lm.tokenizer)
    tok.chat_template = "{% for m in messages %}User: {{ m['content'] }}\nAssistant:{% endfor %}"
    q = document_tasks(fact_questions(1, 2))[0]
    ctx = q.prompt(tok, settings=PromptSettings(chat=True))
    assert ctx.text.count(q.context) == 1 and ctx.text.startswith("User: ")
    gold = q.context[slice(*q.gold[0])]
    assert tok.decode(ctx.tokens.ids[list(ctx.spans["gold"])]).strip() == gold


def test_the_command_writes_a_page(tmp_path: Path) -> None:
    out = tmp_path / "page"
    code = main(["eval", "needle-lm", "--task", "longproc:path_traversal", str(SAMPLES / "path_traversal_0.5k.json"), "--truncate", "400",
                 "--max-new-tokens", "4", "--out", str(out)])
    assert code == 0 and "Published tasks" in (out / "index.html").read_text(encoding="utf-8") and (out / "tasks").is_dir()
    assert main(["eval", "--task", "longproc"]) == 2 and main(["eval", "--list"]) == 0
