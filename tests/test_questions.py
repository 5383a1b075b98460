"Questions and their answers: damaged and hostile files, texts that look like something else, what must hold for any numbers"
from __future__ import annotations

import gzip
import itertools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longlens.charts.base import ChartError
from longlens.charts.common import arrange
from longlens.charts.curves import depth_points, position_curve, remedy_dots
from longlens.charts.heatmaps import depth_map
from longlens.models.load import load
from longlens.needle_lm.data import needle_tokenizer
from longlens.probes.answer_scores import (
    METRICS,
    best_subspan_em,
    bootstrap_interval,
    edit_distance,
    effective_length,
    kv_match,
    needlebench_score,
    paired_ends_against_middle,
    position_indices,
    rag_order,
    read_niah_scores,
    reorder,
    sign_flip_p,
    string_match_all,
    string_match_part,
    wilson_interval,
)
from longlens.prompts import questions as module
from longlens.prompts.key_value import kv_lines
from longlens.prompts.multi_document import VARIANTS, place_answer
from longlens.prompts.questions import (
    KeyValue,
    Question,
    fact_pairs,
    fact_questions,
    normalize_answer,
    read_key_values,
    read_questions,
    with_distractors,
)

DATA = Path(__file__).parents[1] / "../shared/data"
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINE: dict[str, Any] = {"question": "who found x-rays", "answers": ["Wilhelm Röntgen"],
                        "ctxs": [{"title": "Ada", "text": "No.", "isgold": False, "hasanswer": False},
                                 {"title": "Röntgen", "text": "Wilhelm Röntgen did.", "isgold": True, "hasanswer": True}]}
PAIRS: dict[str, Any] = {"ordered_kv_records": [["a", "1"], ["b", "2"]], "key": "b", "value": "2"}


def published(name: str) -> Path:
    "A published file"
    if not (DATA / name).exists(): pytest.skip(f"needs published files: {name} in a folder shared/data beside the project's")
    return DATA / name


def written(folder: Path, *rows: Any, name: str = "q.jsonl") -> Path:
    "A file of these lines"
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n"
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return folder / name


# Files

@pytest.mark.parametrize(("change", "message"), [
    ({"question": ""}, "question is empty"),
    ({"question": 3}, "question is 3, and a text was expected"),
    ({"answers": "Röntgen"}, "answers is 'Röntgen', and a list was expected"),
    ({"answers": []}, r"answers is \[\], and a list of one text or more"),
    ({"answers": ["Röntgen", "The."]}, r"answers\[1\] is 'The.', of which nothing is left"),
    ({"answers": [None]}, r"answers\[0\] is None, and a text was expected"),
    ({"ctxs": {}}, "ctxs is {}, and a list was expected"),
    ({"ctxs": []}, "ctxs: 0 of 0 documents are marked by hasanswer"),
    ({"ctxs": ["text"]}, r"ctxs\[0\] is 'text', and named entries were expected"),
    ({"ctxs": [{"title": "t"}]}, r"there is no ctxs\[0\].text, only 'title'"),
    ({"ctxs": [{"title": "t", "text": " "}]}, r"ctxs\[0\].text is empty"),
    ({"ctxs": [{"title": None, "text": "x"}]}, r"ctxs\[0\].title is None, and a text was expected"),
    ({"ctxs": [LINE["ctxs"][1]] * 2}, "ctxs: 2 of 2 documents are marked by isgold"),
    ({"ctxs": [LINE["ctxs"][0]]}, "ctxs: 0 of 1 documents are marked by isgold"),
    ({"ctxs": [{"title": "t", "text": "x", "isgold": "yes"}]}, r"ctxs\[0\].isgold is 'yes', and true or false was expected"),
])
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, LINE, LINE | change)
    with pytest.raises(ValueError, match=f"q.jsonl, line 2: {message}"): read_questions(path)
    assert len(read_questions(path, limit=1)) == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"key": "c"}, "the key is 'c'"),
    ({"value": "1"}, "the value of 'b' is '2' among the pairs, and '1' is given as right"),
    ({"ordered_kv_records": [["a", "1"], ["a", "2"]]}, "two records have the same key"),
    ({"ordered_kv_records": [["b", "2"]]}, "there are 1, and the key is 'b'"),
    ({"ordered_kv_records": [["b", 2], ["a", "1"]]}, r"ordered_kv_records\[0\] is \['b', 2\], and a key and a value, both texts"),
    ({"ordered_kv_records": [["b", "2"], "a1"]}, r"ordered_kv_records\[1\] is 'a1'"),
    ({"ordered_kv_records": {"b": "2"}}, "ordered_kv_records is {'b': '2'}, and a list was expected"),
])
def test_a_wrong_list_of_pairs_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"q.jsonl, line 1: .*{message}|q.jsonl, line 1: {message}"):
        read_key_values(written(tmp_path, PAIRS | change))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty: there are no questions in it"),
    (b"\n \n", "is empty"),
    (b"{", "line 1 cannot be read as JSON"),
    (b"[1]\n", r"line 1 holds \[1\] where named entries were expected"),
    (b"\xff\xfe{}", "line 1 is not text in UTF-8"),
    (b'{"a": 1, "a": 2}', "line 1 cannot be read as JSON: 'a' stands there twice"),
    (b"[" * 100_000, "line 1 cannot be read as JSON"),
    (b"1" * 5000, "line 1 cannot be read as JSON"),
    (b'{"question": NaN}', "line 1: there is no answers"),
    (gzip.compress(json.dumps(LINE).encode(), mtime=0)[:-9], "the gzip file is damaged or cut off"),
    (gzip.compress(json.dumps(LINE).encode() * 99, mtime=0)[:60], "line 1: the gzip file is damaged or cut off"),
    (b"\x1f\x8b" + bytes(30), "line 1: the gzip file is damaged or cut off"),
])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (path := tmp_path / "q.jsonl").write_bytes(content)
    for read in (read_questions, read_key_values):
        with pytest.raises(ValueError, match=message.replace("no answers", "no answers|there is no ordered_kv_records")): read(path)


def test_damage_in_the_middle_of_a_gzip_file_is_found(tmp_path: Path) -> None:
    rows = [LINE | {"question": f"who found {i}?"} for i in range(400)]
    whole = written(tmp_path, *rows, name="q.jsonl.gz")
    assert [q.question for q in read_questions(whole)] == [r["question"] for r in rows]
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 0xFF
    whole.write_bytes(data)
    with pytest.raises(ValueError, match=r"q.jsonl.gz, line \d+"): read_questions(whole)


def test_files_that_are_not_files(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.jsonl", "is not there"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=message): read_questions(path)
        with pytest.raises(FileNotFoundError, match=message): read_niah_scores(path)
    with pytest.raises(ValueError, match="damaged or cut off"): read_questions(written(tmp_path, LINE).rename(tmp_path / "q.jsonl.gz"))
    with pytest.raises(ValueError, match="limit is 0"): read_questions(written(tmp_path, LINE), limit=0)


def test_files_of_other_habits(tmp_path: Path) -> None:
    text = "\n\r\n" + json.dumps(LINE) + "\r\n\n" + json.dumps(LINE)
    (path := tmp_path / "q").write_bytes(b"\xef\xbb\xbf" + text.encode())
    packed = tmp_path / "packed"    # a gzip file whose name doesn't say so
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_questions(path) == read_questions(packed) == read_questions(written(tmp_path, LINE, LINE))
    retrieved = LINE | {"ctxs": [{k: v for k, v in c.items() if k != "isgold"} for c in LINE["ctxs"]]}
    assert read_questions(written(tmp_path, retrieved)) == read_questions(written(tmp_path, LINE))


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", 1000)
    with pytest.raises(ValueError, match="line 1 is longer than 1,000 bytes"):
        read_questions(written(tmp_path, LINE | {"question": "x" * 1000}, name="q.jsonl.gz"))


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                           lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3), max_leaves=6)


@few
@given(field=st.sampled_from(["question", "answers", "ctxs"]), value=json_values)
def test_any_value_of_a_field_is_read_or_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = written(tmp_path, LINE | {field: value})
    try: q = read_questions(path)[0]
    except ValueError as e: assert "line 1: " in str(e) and field in str(e)
    else: assert all(normalize_answer(a) for a in q.answers) and q.question.strip()


@few
@given(content=st.binary(max_size=80) | st.binary(max_size=40).map(lambda b: b"\x1f\x8b\x08" + b)
       | st.binary(max_size=40).map(gzip.compress))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "any").write_bytes(content)
    for read in (read_questions, read_key_values, read_niah_scores):
        with pytest.raises(ValueError): read(path)


# Distractors

names = st.text("abcdefgh", min_size=1, max_size=3)


@few
@given(pairs=st.lists(st.tuples(names, st.text("abcdefgh ", min_size=1, max_size=9).filter(str.strip)), min_size=1, max_size=9),
       n=st.integers(1, 6), seed=st.integers(0, 9))
def test_distractors_hold_no_answer(pairs: list[tuple[str, str]], n: int, seed: int) -> None:
    assume(all(normalize_answer(a) for a, _ in pairs))
    asked = [Question(f"{i}?", (a,), (a, f"{a} {text}")) for i, (a, text) in enumerate(pairs)]
    try: out = with_distractors(asked, n, seed)
    except ValueError as e:
        assert f"{n} documents were asked for" in str(e)
        return
    assert out == with_distractors(asked, n, seed)
    for q, before in zip(out, asked, strict=True):
        assert len(q.others) == n - 1 == len({*q.others}) and q.gold not in q.others and replace(q, others=()) == before
        assert not any(f" {normalize_answer(q.answers[0])} " in f" {normalize_answer(' '.join(d))} " for d in q.others)
        assert {*q.others} <= {o.gold for o in asked}


def test_own_others_come_first_and_stay_in_order() -> None:
    own = tuple((f"own {i}", "text") for i in range(3))
    first = Question("1?", ("red",), ("1", "red"), own)
    rest = [Question(f"{i}?", (w,), (w, w)) for i, w in enumerate(("blue", "green", "white", "black"))]
    assert with_distractors([first, *rest], 3)[0].others == own[:2]
    more = with_distractors([first, *rest], 5)[0].others
    assert more[:3] == own and len({*more}) == 4
    assert with_distractors([first, *rest], 1)[0].others == ()
    seeds = {with_distractors(rest, 3, seed)[0].others for seed in range(30)}
    assert len(seeds) == 6    # every order of two of the three
    with pytest.raises(ValueError, match="n_documents is 0"): with_distractors(rest, 0)
    with pytest.raises(ValueError, match=r"9 documents were asked for, and '1\?' can have 8: its own 4"):
        with_distractors([first, *rest], 9)


# Questions that are made

def test_made_questions() -> None:
    asked = fact_questions(40, 6, seed="s", sentences=2)
    assert asked[:7] == fact_questions(7, 6, seed="s", sentences=2) and asked[0] != fact_questions(1, 6, seed="t", sentences=2)[0]
    for q in asked:
        who, value = q.question.removeprefix("What is the code for ").removesuffix("?"), q.answers[0]
        holds = [f"The code for {who} is {value}." in text for _, text in (q.gold, *q.others)]
        assert holds == [True] + [False] * 5 and not any(f"The code for {who} " in text for _, text in q.others)
        assert q.answer_prefix == f" The code for {who} is" and len({title for title, _ in (q.gold, *q.others)} | {who}) == 7
    assert len({q.question for q in asked}) == 40
    assert fact_questions(1, 1, sentences=0)[0].gold[1].startswith("The code for")
    for wrong in (dict(n_documents=0), dict(sentences=-1), dict(n=0), dict(n_documents=200)):
        with pytest.raises(ValueError): fact_questions(**{"n": 1, **wrong})


def test_made_pairs() -> None:
    lists = fact_pairs(20, 255)
    assert lists[:3] == fact_pairs(3, 255) and len({p.key for p in lists}) == 20
    assert all(len(p.records) == 255 and dict(p.records)[p.key] == p.value and p.form == "lines" for p in lists)
    assert len({[k for k, _ in p.records].index(p.key) for p in lists}) > 10    # the asked key stands anywhere
    with pytest.raises(ValueError, match="256 different names"): fact_pairs(1, 256)
    with pytest.raises(ValueError, match="n_pairs is 1"): fact_pairs(1, 1)


# A place for the answer

@few
@given(n=st.integers(1, 7), data=st.data())
def test_the_answer_stands_where_it_should(n: int, data: st.DataObject) -> None:
    tok, g = needle_tokenizer(), data.draw(st.integers(0, n - 1))
    variant = data.draw(st.sampled_from(VARIANTS[:3]))
    q = fact_questions(1, n, sentences=1)[0]
    ctx = place_answer(tok, q, g, variant=variant, seed=3)
    assert ctx.spans["gold"] == ctx.spans[f"document_{g}"] and ctx.meta["gold_index"] == g and ctx.meta["variant"] == variant
    shown = [tok.decode(ctx.tokens.ids[ctx.spans[f"document_{i}"]]) for i in range(n)]
    texts = [s.split(") ", 1)[1] for s in shown]
    assert texts[g] == q.gold[1] and {*texts[:g], *texts[g + 1:]} == {t for _, t in q.others}
    if variant != "random_order": assert texts[:g] + texts[g + 1:] == [t for _, t in q.others]
    assert ctx.text.endswith(f"\nQuestion: {q.question}\nAnswer:{q.answer_prefix}") and ctx.completion == f" {q.answers[0]}"
    with pytest.raises(ValueError, match=f"gold_index is {n}, and there are {n} documents: it is 0 to {n - 1}"): place_answer(tok, q, n)


@pytest.mark.parametrize("form", ["json", "lines"])
def test_a_pair_stands_where_it_should(form: str) -> None:
    tok, p = needle_tokenizer(), replace(fact_pairs(1, 9)[0], form=form)
    for g in range(9):
        ctx = place_answer(tok, p, g)
        assert ctx.spans["gold"] == ctx.spans[f"pair_{g}"] and ctx.spans["answer"] == ctx.spans[f"value_{g}"]
        assert tok.decode(ctx.tokens.ids[ctx.spans[f"key_{g}"]]).strip() == p.key and ctx.answers == (p.value,)
        rest = [tok.decode(ctx.tokens.ids[ctx.spans[f"value_{i}"]]).strip() for i in range(9) if i != g]
        assert rest == [v for k, v in p.records if k != p.key]
    for g in (9, -1):
        with pytest.raises(ValueError, match=f"gold_index is {g}, and there are 9 pairs: it is 0 to 8"): place_answer(tok, p, g)
    assert place_answer(tok, p, 0, variant="query_aware").text.count(p.key) == place_answer(tok, p, 0).text.count(p.key) + 1


def test_texts_that_look_like_something_else() -> None:
    tok = needle_tokenizer()
    text = "{0} %s \\n\nQuestion: who?\nAnswer: <x>"
    odd = Question("Is {question} <b>\nAnswer:</b>?", ("<x>",), ("Document [7](Title: {t})", text), ("é中🙂",))
    ctx = place_answer(tok, odd, 1)
    assert tok.decode(ctx.tokens.ids[ctx.spans["gold"]]) == f"Document [2](Title: Document [7](Title: {{t}})) {text}"
    assert tok.decode(ctx.tokens.ids[ctx.spans["document_0"]]) == "Document [1](Title: ) é中🙂"
    with pytest.raises(ValueError, match="reads as a special token"): place_answer(tok, replace(odd, gold="an <eos> here"), 0)
    with pytest.raises(ValueError, match="'key'|reads as a special token"): kv_lines(tok, [("a", "<eos>"), ("b", "c")], "a")


def test_lines_on_a_tokenizer_that_joins_stops_and_line_breaks() -> None:
    rule = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(rule, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    lists = fact_pairs(8, 40)
    corpus = ["".join(f"Key {k}: {v}.\n" for k, v in p.records) for p in lists]
    tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False)
    assert ".\n" in [fast.decode([i]) for i in fast("Key Ada: river.\nKey")["input_ids"]]
    ctx = place_answer(fast, lists[0], 3)
    assert fast.decode(ctx.tokens.ids[ctx.spans["gold"]]) == f"Key {lists[0].key}: {lists[0].value}"
    assert fast.decode(ctx.tokens.ids[ctx.spans["answer"]]) == fast.decode(ctx.completion_ids) == f" {lists[0].value}"


def test_what_the_variants_are() -> None:
    lm, q = load(), fact_questions(1, 4, sentences=1)[0]
    texts = {v: place_answer(lm, q, 2, variant=v) for v in VARIANTS}
    assert texts["closed_book"].text == f"Question: {q.question}\nAnswer:{q.answer_prefix}"
    assert "document_1" not in texts["oracle"].spans and texts["oracle"].spans["gold"] == texts["oracle"].spans["document_0"]
    assert {v: c.meta["variant"] for v, c in texts.items()} == {v: v for v in VARIANTS}
    assert len({texts["plain"].text, texts["random_order"].text, place_answer(lm, q, 2, variant="random_order", seed=1).text}) == 3
    right = [bool(lm.score(c.tokens, c.completion_ids).greedy.all()) for v, c in texts.items() if v != "closed_book"]
    assert right == [True] * 4
    long = fact_questions(1, 20, sentences=12)[0]
    with pytest.raises(ValueError, match="needle-lm was made for 2,048 positions"): place_answer(lm, long, 0)
    assert len(place_answer(lm, long, 0, allow_longer=True)) > 2048
    for item, variant in ((KeyValue((("a", "1"), ("b", "2")), "a", "1"), "closed_book"), (q, "Plain")):
        with pytest.raises(ValueError, match="a variant of a"): place_answer(lm, item, variant=variant)


# Metrics

texts = st.text(max_size=30)
words = st.text("abcXYZ09", min_size=1, max_size=8).filter(normalize_answer)


@given(text=texts)
def test_normalising_twice_changes_little(text: str) -> None:
    once = normalize_answer(text)
    assert once == " ".join(once.split()) and not {*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"} & {*once}
    assert not {"a", "an", "the"} & {*once.split()}


@given(before=texts, after=texts, answer=words)
def test_metrics_are_shares_and_find_the_answer(before: str, after: str, answer: str) -> None:
    for name, metric in METRICS.items():
        assert 0 <= metric(before, [answer]) <= 1, name
        if name != "best_subspan_em": assert metric(before + answer + after, [answer]) == 1, name
    line = before.replace("\n", " ") + f" {answer} " + after
    assert best_subspan_em(line, [answer]) == 1 and best_subspan_em(f"\n{line}", [answer]) == 0
    assert best_subspan_em(line, [f"The {answer.swapcase()}!"]) == kv_match(line, answer.swapcase()) == 1


def test_metrics_by_hand() -> None:
    assert best_subspan_em("An apple-pie", ["applepie", "x"]) == 1    # punctuation goes without leaving a space
    assert normalize_answer("A theory, an anthem") == "theory anthem"    # an article is a word, not letters
    assert string_match_all("alpha, BETA", ["Alpha", "beta", "gamma"]) == pytest.approx(2 / 3)
    assert string_match_part("alpha", ["x", "ALPHA"]) == 1 and string_match_part("", ["x"]) == 0
    assert edit_distance("Itisblue.", "Itisred.") == 4    # b, l and u become r, e and d, and one letter goes
    assert needlebench_score("It is red.", "blue", "It is blue.") == pytest.approx(20 * (1 - 4 / 9))
    assert needlebench_score("it is blue", "Blue", "Blue") == pytest.approx(20 * (1 - 5 / 8))    # case counts
    for metric, answers in (("needlebench", [" "]), ("kv_match", [""]), ("string_match_all", []), ("string_match_part", ["a", ""]),
                            ("best_subspan_em", ["the"]), ("best_subspan_em", "river"), ("kv_match", "river"), ("needlebench", ["a", "b"])):
        with pytest.raises(ValueError): METRICS[metric]("anything", answers)


@given(a=st.text("ab", max_size=6), b=st.text("ab", max_size=6), c=st.text("ab", max_size=6))
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) and (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


# Statistics

scores = st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30)


@few
@given(values=scores, times=st.integers(1, 4), seed=st.integers(0, 99))
def test_an_interval_holds_the_mean(values: list[float], times: int, seed: int) -> None:
    got = bootstrap_interval(values, seed=seed, n=300)
    assert got.mean == pytest.approx(np.mean(values))
    if len(values) > 1: assert min(values) - 1e-9 <= got.lower <= got.mean + 1e-9 and got.mean - 1e-9 <= got.upper <= max(values) + 1e-9
    else: assert math.isnan(got.lower) and math.isnan(got.upper)
    many = bootstrap_interval(values * times, seed=seed, n=300, groups=[*range(len(values))] * times)
    np.testing.assert_allclose(many, got)    # asking again tells nothing new about other questions


def test_an_interval_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(2000) < 0.7
    got, half = bootstrap_interval(values, n=4000), 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / 2000)
    assert got.upper - got.mean == pytest.approx(half, rel=0.1) and got.mean - got.lower == pytest.approx(half, rel=0.1)
    narrow = bootstrap_interval(values, level=0.5)
    assert got.lower < narrow.lower < narrow.mean < narrow.upper < got.upper
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    for wrong in (dict(level=1), dict(level=0), dict(n=0), dict(groups=[1])):
        with pytest.raises(ValueError): bootstrap_interval(values, **wrong)


def test_intervals_of_groups_hold_the_truth_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(1), {True: 0, False: 0}
    for _ in range(150):
        hard = rng.random(25)[:, None] < 0.6    # a question is right at all of its five positions, or mostly wrong
        right = np.where(hard, 0.95, 0.1) > rng.random((25, 5))
        for grouped in held:
            got = bootstrap_interval(right.ravel(), n=400, groups=np.repeat(np.arange(25), 5) if grouped else None)
            held[grouped] += got.lower <= 0.6 * 0.95 + 0.4 * 0.1 <= got.upper
    assert 0.88 <= held[True] / 150 <= 0.99 and held[False] / 150 < 0.8


@given(n=st.integers(1, 400), data=st.data(), level=st.floats(0.5, 0.99))
def test_wilson(n: int, data: st.DataObject, level: float) -> None:
    k = data.draw(st.integers(0, n))
    p, lower, upper = wilson_interval(k, n, level)
    assert 0 <= lower <= p <= upper <= 1 and lower < upper
    np.testing.assert_allclose(wilson_interval(n - k, n, level)[1:], (1 - upper, 1 - lower), atol=1e-9)


@few
@given(d=st.lists(st.integers(-5, 5), min_size=1, max_size=10))
def test_sign_flips_are_all_tried(d: list[int]) -> None:
    tosses = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) >= abs(sum(d)) for signs in itertools.product((1, -1), repeat=len(d))]
    assert sign_flip_p(d) == pytest.approx(sum(tosses) / len(tosses))
    assert sign_flip_p(d) == sign_flip_p([-x for x in d]) == pytest.approx(sign_flip_p([x / 7 for x in d]))


def test_sign_flips_of_many_questions() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=300)
    assert sign_flip_p(noise + 1) == pytest.approx(1 / 10_001)
    assert 0.05 < sign_flip_p(noise - noise.mean() + 0.05) < 0.9
    assert sign_flip_p(noise, seed=1) == sign_flip_p(noise, seed=1)
    z = abs(noise.mean()) / (math.sqrt((noise ** 2).mean() / 300))
    assert sign_flip_p(noise) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    for wrong in ([], [float("nan")]):
        with pytest.raises(ValueError): sign_flip_p(wrong)


def table(a: np.ndarray, **more: Any) -> pl.DataFrame:
    "Scores (questions, positions) as a table"
    rows = [(q, 5 * g, float(s)) for (q, g), s in np.ndenumerate(a)]
    return pl.DataFrame(rows, schema=["question", "gold_index", "score"], orient="row").with_columns(**more)


@few
@given(a=st.integers(3, 6).flatmap(lambda k: st.lists(st.lists(st.integers(0, 1), min_size=k, max_size=k), min_size=1, max_size=9)))
def test_indices_by_hand(a: list[list[int]]) -> None:
    m = np.array(a, dtype=float)
    mean, middle = m.mean(0), m[:, 1:-1].mean()
    got = position_indices(table(m).sample(fraction=1, shuffle=True, seed=0))
    np.testing.assert_allclose(got["value"], [mean[0] - middle, mean[-1] - middle, (mean[0] + mean[-1]) / 2 - middle], atol=1e-12)
    test = paired_ends_against_middle(table(m))
    u = got.row(2)
    np.testing.assert_allclose((test.difference, test.lower, test.upper, test.n), u[1:])
    assert 0 < test.p <= 1 and got["index"].to_list() == ["primacy", "recency", "u_shape"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.with_columns(score=None), "question 0 at gold_index 0: score is None"),
    (lambda t: t.with_columns(score=pl.lit(float("nan"))), "score is nan"),
    (lambda t: t.filter(pl.col("gold_index") != 5), "there are 2 positions in column 'gold_index'"),
    (lambda t: t.head(5), "question 1 has 2 of 3 positions"),
    (lambda t: pl.concat([t, t]), "question 0 at gold_index 0 stands in the table twice"),
    (lambda t: t.drop("question"), "no column 'question': it has gold_index, score"),
    (lambda t: t.head(0), "there are 0 positions"),
])
def test_tables_that_cannot_be_compared(change: Callable[[pl.DataFrame], pl.DataFrame], message: str) -> None:
    for use in (paired_ends_against_middle, position_indices):
        with pytest.raises(ValueError, match=message): use(change(table(np.eye(3))))


@given(scores=st.lists(st.sampled_from([0.2, 0.856, 0.9, 1.0]), min_size=1, max_size=7), seed=st.randoms(use_true_random=False))
def test_effective_length(scores: list[float], seed: Any) -> None:
    lengths = [2 ** i for i in range(len(scores))]
    good = [n for i, n in enumerate(lengths) if all(s >= 0.856 for s in scores[: i + 1])]
    mixed = list(zip(lengths, scores, strict=True))
    seed.shuffle(mixed)
    assert effective_length([n for n, _ in mixed], [s for _, s in mixed]) == (good[-1] if good else None)


def test_effective_lengths_as_published() -> None:
    "Rows of RULER's table, thousands of tokens; 16 of them, base models too"
    k = 4, 8, 16, 32, 64, 128
    rows = {"96.6 96.3 95.2 93.2 87.0 81.2": 64, "96.5 95.8 95.4 94.8 88.4 66.6": 64, "96.9 96.1 94.9 94.1 79.8 53.7": 32,
            "95.6 95.2 94.2 92.0 84.3 63.1": 32, "94.7 92.8 92.1 89.9 86.7 83.1": 64, "95.5 93.8 91.6 87.4 84.7 77.0": 32,
            "95.1 94.4 90.8 85.4 80.9 72.1": 16, "95.6 94.9 93.4 90.9 84.7 31.7": 32, "93.3 92.2 91.3 87.5 83.2 77.3": 32,
            "94.9 92.1 92.5 85.9 72.4 44.5": 32, "88.1 85.5 84.5 82.7 75.5 68.9": 4, "87.8 83.4 78.6 69.9 56.0 42.0": 4,
            "82.3 78.4 73.7 69.1 68.1 65.0": None, "95.1 93.8 83.6 63.1 2.4 0.0": 8, "84.7 79.9 70.8 59.3 0.0 0.0": None,
            "98.4 96.0 96.2 94.4 91.8 85.6": 128}    # the last: published as more than 128
    assert [effective_length(k, [float(s) for s in row.split()], 85.6) for row in rows] == [*rows.values()]
    for wrong in (([], []), ([1, 2], [1]), ([1, 1], [1, 1]), ([1], [float("nan")]), ([1], [85.6])):
        with pytest.raises(ValueError): effective_length(*wrong)


@given(items=st.lists(st.integers(), max_size=40))
def test_an_order_is_a_permutation_with_the_best_at_the_ends(items: list[int]) -> None:
    k, order = len(items), rag_order(len(items))
    assert sorted(order) == [*range(k)] and sorted(reorder(items)) == sorted(items)
    from_edge = [min(i, k - 1 - i) for i in range(k)]
    assert all(from_edge[order.index(r)] == r // 2 for r in range(k))    # ranks 1 and 2 outermost, 3 and 4 next, and so on
    assert order[:1] == [0][:k] and order[-1:] == [min(1, k - 1)][:k]


# Published files

def test_published_questions() -> None:
    path = published("lost-in-the-middle/nq-open-oracle.jsonl.gz")
    with pytest.raises(ValueError, match=r"line 1,452: answers\[2\] is '\*'"): read_questions(path)
    asked = read_questions(path, drop_empty=True)
    assert len(asked) == 2655 == len({q.question for q in asked}) and not any(q.others for q in asked)
    assert asked[1451].answers == ("a rotationally symmetric saltire", "the symbol ×")
    assert all(best_subspan_em(q.gold[1].replace("\n", " "), q.answers) for q in asked)    # the documents do answer
    twenty = with_distractors(asked, 20)
    assert all(len({q.gold, *q.others}) == 20 for q in twenty) and twenty[:5] == with_distractors(asked, 20)[:5]
    long = [q for q in twenty if min(map(len, map(normalize_answer, q.answers))) > 2]
    assert not any(best_subspan_em(f"{t} {d}".replace("\n", " "), q.answers) for q in long for t, d in q.others)
    ctx = place_answer(needle_tokenizer(), twenty[0], 9)
    assert ctx.text.count("\nDocument [") == 20
    assert "Document [10](Title: List of Nobel laureates in Physics) The first Nobel Prize" in ctx.text


def test_published_pairs() -> None:
    lists = read_key_values(published("lost-in-the-middle/kv-retrieval-75_keys.jsonl.gz"))
    assert len(lists) == 500 and {len(p.records) for p in lists} == {75}
    assert len(read_key_values(DATA / "lost-in-the-middle/kv-retrieval-75_keys.jsonl.gz", limit=3)) == 3
    ctx = place_answer(needle_tokenizer(), lists[0], 74)
    assert json.loads(ctx.text.split("JSON data:\n")[1].split("\n\n")[0])[lists[0].key] == lists[0].value
    assert [*json.loads(ctx.text.split("JSON data:\n")[1].split("\n\n")[0])][74] == lists[0].key


def test_published_grids() -> None:
    gpt = read_niah_scores(published("niah/OpenAI_OriginalResults.json"))
    assert (gpt.height, gpt["context_length"].n_unique(), gpt["depth_percent"].n_unique()) == (225, 15, 15)
    assert gpt["score"].value_counts().sort("score").rows() == [(1, 3), (3, 13), (5, 1), (7, 1), (10, 207)]
    low = gpt.filter(pl.col("score") < 10)
    assert low["context_length"].min() == 73571 and gpt["context_length"].max() == 128000    # fails beyond 73K only
    claude = read_niah_scores(published("niah/anthropic_claude21_original_scores.csv"))
    assert claude.group_by("trial").len().sort("trial").rows() == [(1, 1225), (2, 151)]
    assert claude.schema == gpt.schema and claude["score"].mean() == pytest.approx((540 + 2 * 3 + 3 * 5 + 12 * 7 + 819 * 10) / 1376)
    for grid in (gpt, claude):
        assert depth_map(grid, "score").to_dict() and depth_points(grid, "score", domain=(1, 10)).to_dict()


# Pictures

CURVE = pl.DataFrame([dict(model=m, gold_index=g, accuracy=a, lower=a - .1, upper=a + .1, attention=.1) for m in ("m", "n")
                      for g, a in ((0, .9), (5, .4), (9, .8))])


def test_pictures_say_the_same_each_time_and_stand_together() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw = lambda: position_curve(CURVE, "accuracy", by="model", attention="attention", lines={"oracle": 1, "closed book": .2})
        other = position_curve(CURVE.filter(pl.col("model") == "m"), "accuracy", attention="attention")
        assert draw().to_json() == draw().to_json()
        spec = arrange([draw(), other], columns=1).to_dict()
    assert len({p["name"] for p in spec["params"]}) == 4


def test_pictures_of_hostile_names_and_lacking_numbers() -> None:
    odd = CURVE.with_columns(model=pl.when(pl.col("model") == "m").then(pl.lit("a.b[0]\u202e<img src=x>")))
    odd = odd.rename({"accuracy": "acc.[x]"}).with_columns(lower=float("nan"), upper=None)
    spec = lambda chart: json.dumps(chart.to_dict(), ensure_ascii=False)
    drawn = spec(position_curve(odd, "acc.[x]", by="model", lines={"\u202eup'\"\\": .5}, title="<b>"))
    assert "\u202e" not in drawn and "\\\\u202eup" in drawn    # written out, not obeyed
    assert "Band" not in drawn and "One point for each place." in drawn    # no interval is known
    dots = spec(remedy_dots(odd.filter(pl.col("gold_index") == 0), "acc.[x]", category="model", split=None))
    assert "\u202e" not in dots and '"x2"' not in dots
    some = CURVE.with_columns(lower=pl.when(pl.col("gold_index") > 0).then("lower"))
    assert position_curve(some.filter(pl.col("model") == "m"), "accuracy", attention="attention").to_dict()


@pytest.mark.parametrize(("draw", "message"), [
    (lambda: position_curve(CURVE, "accuracy"), "two rows at 0, accuracy"),
    (lambda: position_curve(CURVE.head(0), "accuracy", by="model"), "no rows"),
    (lambda: position_curve(CURVE, "accuracy", by="model", attention="lens"), "no column 'lens'"),
    (lambda: position_curve(CURVE.with_columns(model=pl.int_range(6)), "accuracy", by="none"), "no column 'none'"),
    (lambda: position_curve(pl.concat([CURVE.head(3).with_columns(model=pl.lit(f"{i}")) for i in range(9)]), "accuracy", by="model"),
     "'model' has 9 values, and 7 colours"),
    (lambda: remedy_dots(CURVE, "accuracy", category="model", split="gold_index", baseline="x"), "no model is called 'x': there are m, n"),
    (lambda: depth_points(CURVE.rename({"gold_index": "context_length"}), "accuracy"), "no column 'depth_percent'"),
    (lambda: depth_points(CURVE.with_columns(context_length=1, depth_percent=-1), "accuracy"), "a depth of -1 %"),
])
def test_what_cannot_be_drawn(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ChartError, match=message): draw()


@settings(max_examples=25, deadline=None)
@given(depths=st.lists(st.floats(0, 100), min_size=1, max_size=20, unique=True))
def test_every_measurement_is_a_tile_at_its_depth(depths: list[float]) -> None:
    frame = pl.DataFrame({"context_length": 100, "depth_percent": depths, "score": 1.0})
    rows = next(iter(depth_points(frame, "score").to_dict()["datasets"].values()))
    assert len(rows) == len(depths)
    assert all(abs((r["top"] + r["bottom"]) / 2 - d) < 1e-3 for r, d in zip(rows, sorted(depths), strict=True))
    assert len({round(r["bottom"] - r["top"], 2) for r in rows}) <= 3


# ---- the sample that ships with longlens

def test_the_sample_is_what_its_tool_makes() -> None:
    "Two hundred questions, whose answer stands in no passage but their own"
    import importlib.util
    tool = importlib.util.spec_from_file_location("nq_sample", Path(__file__).parent.parent / "tools" / "nq_sample.py")
    assert tool and tool.loader
    nq = importlib.util.module_from_spec(tool)
    tool.loader.exec_module(nq)
    lines = nq.OUT.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200 and nq.OUT.stat().st_size < 200_000
    notes = nq.OUT.with_suffix(".txt").read_text(encoding="utf-8")
    assert "MIT License" in notes and "CC BY-SA" in notes
    rows = [json.loads(line) for line in lines]
    assert all(map(nq.fits, rows)) and nq.chosen(rows) == rows
    source = Path(__file__).parent.parent.parent / "shared/data/lost-in-the-middle/nq-open-oracle.jsonl.gz"
    if not source.exists(): pytest.skip("whether it is made of the published file can be seen where ../shared/data has that")
    with gzip.open(source, "rt", encoding="utf-8") as f: published = [json.loads(line) for line in f]
    assert "".join(map(nq.line, nq.chosen(published))) == nq.OUT.read_text(encoding="utf-8")


def test_the_sample_is_asked_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longlens import Haystack, load, lost_in_the_middle, needle_context, plan
    lm = load(device="cpu")
    planned = plan(lost_in_the_middle, lm, "nq-sample", n_documents=4, n_questions=2, positions=2, allow_longer=True)
    assert planned
    assert "Wikipedia" not in needle_context(lm, 900, haystack="nq-sample").text and Haystack.nq_sample().take(1)[0][0] in needle_context(
        lm, 900, haystack="nq-sample").text
    monkeypatch.chdir(tmp_path)
    Path("nq-sample").write_text('{"question": "who", "answers": ["Ada"], "ctxs": [{"title": "A", "text": "Ada.", "isgold": true}]}\n')
    assert [q.question for q in read_questions("nq-sample")] == ["who"]    # a file of that name comes first
