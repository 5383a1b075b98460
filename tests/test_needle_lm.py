"""needle-lm: what the notebook does badly: arbitrary text, the stored folder, a run that is put down and taken up."""
from __future__ import annotations

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlens.needle_lm import card as nc
from longlens.needle_lm import data as nl
from longlens.needle_lm import train as nt

TINY = nt.Recipe(steps=20, lengths=(64,), tokens_per_step=512, warmup=4,
                 model=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8))


@pytest.fixture(scope="module")
def model():
    return nl.needle_model()


def test_generator_is_a_function_of_its_seed():
    assert nl.filler(20, seed=3) == nl.filler(20, seed=3) != nl.filler(20, seed=4)
    for kind in nl.KINDS:
        assert nl.make_example(kind, 300, seed=5) == nl.make_example(kind, 300, seed=5) != nl.make_example(kind, 300, seed=6)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(nl.KINDS), depth=st.floats(0, 100), n_tokens=st.integers(400, 900), n_facts=st.integers(1, 10),
       n_documents=st.integers(1, 6), words=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_spans_and_length_by_construction(kind, depth, n_tokens, n_facts, n_documents, words, seed):
    ex = nl.make_example(kind, n_tokens, depth, n_facts=n_facts, n_documents=n_documents, value_words=words, seed=seed)
    piece = {k: ex.text[a:b] for k, (a, b) in ex.spans.items()}
    assert piece["answer"] == ex.answer.strip() and piece["needle"].endswith(f" {piece['answer']}.")
    assert all(piece[k].endswith(".") for k in piece if k.startswith("fact_"))
    if kind == "docs":
        documents = [piece[f"document_{i}"] for i in range(n_documents)]
        assert "\n".join(documents) == ex.text
        assert piece["needle"] in documents[ex.gold_index]
    used = len(nl.needle_tokenizer()(ex.prompt + ex.answer + ".").input_ids)
    assert used <= n_tokens and used > n_tokens - 45


@pytest.mark.parametrize("kind", ["kv", "docs"])
@pytest.mark.parametrize("gold", [0, 3, 7])
def test_gold_index_is_where_it_was_asked_for(kind, gold):
    ex = nl.make_example(kind, 500, gold_index=gold, n_facts=8, n_documents=8, seed=1)
    assert ex.gold_index == gold
    if kind == "kv":
        before = [k for k, v in ex.spans.items() if k.startswith("fact_") and v < ex.spans["needle"]]
        assert len(before) == gold


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_tokenizer_loses_nothing(text):
    tok = nl.needle_tokenizer()
    ids = tok(text).input_ids
    assert ids[0] == tok.bos_token_id and tok.unk_token_id is None
    if not any(s in text for s in tok.all_special_tokens):
        assert tok.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_names_and_values_are_single_tokens_and_digits_are_split():
    assert len(set(nl.ids_of(nl.NAMES + nl.VALUES))) == len(nl.NAMES) + len(nl.VALUES)
    tok = nl.needle_tokenizer()
    assert [tok.decode([i]) for i in tok("1984", add_special_tokens=False).input_ids] == list("1984")


def test_offsets_cover_the_text():
    text = "The code for Ada is river. Ünïcode ☃ too."
    enc = nl.needle_tokenizer()(text, return_offsets_mapping=True)
    assert enc.offset_mapping[0] == (0, 0) and enc.offset_mapping[-1][1] == len(text)


def test_folder_is_small_and_loads_through_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = nl.needle_lm_path()
    files = list(folder.iterdir())
    assert sum(f.stat().st_size for f in files) < 8e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    hf, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert hf.dtype == torch.float32 and type(hf).__name__ == "LlamaForCausalLM"
    assert tok("Ada").input_ids == nl.needle_tokenizer()("Ada").input_ids


def test_answers_at_the_trained_length(model):
    got = nc.evaluate(model, lengths=(2048,), depths=(0, 25, 50, 75, 100), n=4, seed=77)
    assert got["correct"].sum() / got["n"].sum() >= 0.9


def test_without_its_copying_heads_it_does_not_answer(model):
    order = list(pl.read_csv(nl.needle_lm_path() / "copying.csv").select("layer", "head").iter_rows())
    ask = dict(lengths=(256,), depths=(20, 50, 80), n=5)
    whole, top = nc.evaluate(model, **ask), nc.evaluate_without(model, order[:8], **ask)
    assert whole["accuracy"].mean() >= 0.9 and top["accuracy"].mean() <= 0.3
    assert nc.evaluate(model, **ask).equals(whole)  # the hooks are gone


def test_some_heads_are_sinks(model):
    alpha = nc.bos_attention(model, [nl.filler(12, seed=s) for s in range(4)])
    assert (alpha["alpha"] > 0.3).sum() >= 1
    assert model.config._attn_implementation == "sdpa"  # put back


def test_training_learns_and_resumes_where_it_was(tmp_path):
    whole = nt.train(tmp_path / "a", TINY, progress=False)
    nt.train(tmp_path / "b", TINY, stop_at=7, progress=False)
    with pytest.raises(FileExistsError, match="not empty"):
        nt.train(tmp_path / "b", TINY, progress=False)
    again = nt.train(tmp_path / "b", TINY, resume=True, progress=False)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
    rng = nt.random.Random(0)
    ids, *_ = nt._task_rows(nl.needle_tokenizer(), 8, 64, rng, 0)
    loss = lambda m: m(input_ids=ids, labels=ids).loss.item()
    assert loss(whole) < loss(nt.new_model(TINY.seed, **TINY.model)) - 0.2
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.part"))
