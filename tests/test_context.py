"Contexts on tokenizers of several kinds: what a span says, what fits, what is refused"
from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from zoo import zoo_model

from longlens.models.forward import LongModel
from longlens.models.load import load
from longlens.prompts.benchmark_tasks import ancestral_chain, passkeys, retrieval_prompt, variable_tracking
from longlens.prompts.compose import BoundaryError, Context, Piece, compose_prompt
from longlens.prompts.haystack import Haystack
from longlens.prompts.key_value import kv_json, threads
from longlens.prompts.multi_document import numbered_documents
from longlens.prompts.needle import NIAH_TASKS, haystack_context, needle_context
from longlens.prompts.wording import WORDINGS, Wording

DATA = Path(__file__).parents[1] / "../shared/data"
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
         "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-'\"[](){}<>|/_*\\ ="


def corpus() -> Iterator[str]:
    "What the tokenizers are trained on: prose, wordings, and every character"
    yield from Haystack.generated().take(300)[0]
    yield from [w.needle + w.intro + w.question + w.answer_prefix for w in WORDINGS.values()] * 20
    yield from [" ".join(LETTERS), LETTERS] * 5


def wrapped(tok: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False, **special)


def bpe() -> PreTrainedTokenizerFast:
    "needle-lm's: byte-level BPE, <bos> in front"
    return load().tokenizer


def llama3() -> PreTrainedTokenizerFast:
    "Byte-level BPE as Llama 3 has it: digits in threes, punctuation takes line breaks along, offsets without the leading space"
    tok = Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tok.train_from_iterator([*corpus(), 'a",\n "b"}\n\n'], trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bos = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return wrapped(tok, bos_token="<|begin|>", eos_token="<|eot_id|>", additional_special_tokens=special[1:3])


def unigram() -> PreTrainedTokenizerFast:
    "SentencePiece-like: Unigram with a sign for the space, put in front of the text too"
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Metaspace(prepend_scheme="first")
    tok.train_from_iterator(corpus(), trainers.UnigramTrainer(vocab_size=700, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>",
                                                              show_progress=False))
    tok.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return wrapped(tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama2() -> PreTrainedTokenizerFast:
    "SentencePiece's BPE as Llama 2 has it: the sign for the space comes from a normalizer, unknown characters become bytes"
    space, bytes_ = "▁", [f"<0x{i:02X}>" for i in range(256)]
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split("\n", "isolated"),
                                                 pre_tokenizers.Punctuation()])    # no token has letters and signs
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *bytes_],
                                                          show_progress=False))
    made = json.loads(tok.to_str())
    made["added_tokens"] = made["added_tokens"][:3]    # the bytes are ordinary tokens
    tok = Tokenizer.from_str(json.dumps(made))
    tok.pre_tokenizer, tok.normalizer = None, normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tok.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    "As BERT has it: no white space in the tokens, [CLS] in front and [SEP] behind"
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    tok.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=700, special_tokens=["[UNK]", "[CLS]", "[SEP]"],
                                                                show_progress=False))
    tok.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return wrapped(tok, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


MAKE = {f.__name__: functools.cache(f) for f in (bpe, llama3, llama2, unigram, wordpiece)}


@pytest.fixture(params=MAKE)
def tok(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def lm() -> LongModel:
    return load(allow_longer=True)


def text_of(ctx: Context, name: str) -> str:
    "The tokens of a span, decoded, without white space and without WordPiece's sign for the inside of a word"
    ids = ctx.tokens.ids[ctx.spans[name]]
    return "".join(ctx.tokens.tokenizer.decode(ids).replace("##", "").split())


def bare(text: str) -> str:
    return "".join(text.split())


def crossing(ctx_text: str, offsets: list[list[int]], marks: list[tuple[int, int]]) -> bool:
    "Does a token cover more than white space on both sides of an edge? Looked up token by token, edge by edge"
    return any(a < e < b and ctx_text[a:e].strip() and ctx_text[e:b].strip() for a, b in offsets for mark in marks for e in mark)


# --- pieces


def rows(alphabet: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    "Pieces, and what stands behind each"
    text = st.text(alphabet, min_size=1, max_size=12).filter(lambda t: bool(t.strip()))
    return st.lists(st.tuples(text, st.sampled_from(["", " ", "\n", "\n\n", "  "])), min_size=1, max_size=6)


def check_pieces(tok: PreTrainedTokenizerFast, row: list[tuple[str, str]]) -> None:
    pieces = [p for i, (text, gap) in enumerate(row) for p in (Piece(text, f"p{i}"), Piece(gap))]
    text = "".join(p.text for p in pieces)
    ends = [sum(len(p.text) for p in pieces[: 2 * i]) for i in range(len(row))]
    marks = [(e, e + len(t)) for e, (t, _) in zip(ends, row, strict=True)]
    offsets = tok(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    try: ctx = compose_prompt(tok, pieces)
    except BoundaryError as e:
        assert crossing(text, offsets, marks) or "drops it" in str(e)
        return
    assert not crossing(text, offsets, marks)
    assert ctx.text == text
    spans = [ctx.spans[f"p{i}"] for i in range(len(row))]
    assert all(len(s) for s in spans) and all(a.stop <= b.start for a, b in pairwise(spans))    # none empty, disjoint, in order
    assert spans[-1].stop <= len(ctx)
    for (a, b), s in zip(marks, spans, strict=True):    # every character of a piece is in its span, and no other but white space
        covered = {k for i in s for k in range(*ctx.tokens.offsets[i].tolist())}
        assert {k for k in range(a, b) if not text[k].isspace()} <= covered
        assert all(text[k].isspace() for k in covered - set(range(a, b)))
    assert [text_of(ctx, f"p{i}") for i in range(len(row))] == [bare(t) for t, _ in row]


@settings(max_examples=150, deadline=None)
@given(rows(st.characters(exclude_categories=["Cs"])))
def test_any_text_in_bytes(row: list[tuple[str, str]]) -> None:
    "Byte-level BPE: every character there is; a span decodes to its piece"
    if not set("<#") & set("".join(t for t, _ in row)): check_pieces(MAKE["bpe"](), row)


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=80, deadline=None)
@given(row=rows(st.sampled_from(LETTERS.replace("<", "").replace("[", "") + "     \n")))
def test_spans_of_any_pieces(name: str, row: list[tuple[str, str]]) -> None:
    check_pieces(MAKE[name](), row)


def test_same_for_a_model_and_its_tokenizer(lm: LongModel) -> None:
    a, b = (needle_context(m, 400, 30, seed=4) for m in (lm, lm.tokenizer))
    assert torch.equal(a.tokens.ids, b.tokens.ids) and a.spans == b.spans


def test_special_tokens_behind_the_text_are_left_out(tok: PreTrainedTokenizerFast) -> None:
    ctx = compose_prompt(tok, ["It was ", Piece("warm", "w")], completion=" in the valley.")
    whole = tok(ctx.text + ctx.completion)["input_ids"]
    assert ctx.tokens.ids[0] == whole[0]
    got = ctx.tokens.ids.tolist() + ctx.completion_ids.tolist()
    assert got == whole[: len(got)] and set(whole[len(got):]) <= set(tok.all_special_ids)
    assert bare(tok.decode(ctx.completion_ids)) == "inthevalley."


def test_special_tokens_in_the_text_are_refused() -> None:
    for name, text in (("bpe", "<eos>"), ("unigram", "</s>"), ("wordpiece", "[SEP]"), ("llama3", "<|eot_id|>")):
        with pytest.raises(ValueError, match="reads as a special token: take it out"):
            compose_prompt(MAKE[name](), [f"It says {text} here."])
        allowed = compose_prompt(MAKE[name](), ["It says ", Piece(text, special=True), " here."])
        assert MAKE[name]().convert_tokens_to_ids(text) in allowed.tokens.ids.tolist()


def test_unknown_words_are_no_special_tokens() -> None:
    ctx = compose_prompt(MAKE["wordpiece"](), ["A word: ", Piece("日本", "unknown"), "."])
    assert set(ctx.tokens.ids[ctx.spans["unknown"]].tolist()) == {0} and ctx.tokens.tokenizer.unk_token_id == 0


def test_merged_boundaries_name_both_sides() -> None:
    with pytest.raises(BoundaryError, match=r"the token '.*' covers both sides of an edge of the piece 'end'.*put a space"):
        compose_prompt(MAKE["bpe"](), ["The mark", Piece("et", "end")])
    with pytest.raises(BoundaryError, match=r"\('The mark'\) with the beginning of the completion \('et'\)"):
        compose_prompt(MAKE["bpe"](), ["The mark"], completion="et")
    with pytest.raises(BoundaryError, match="piece 'pair'"):    # Llama 3 joins a closing quote with the comma and the line break behind it
        compose_prompt(MAKE["llama3"](), ["{", Piece('"a": "b"', "pair"), ',\n "c": "d"}'])


def test_a_prompt_whose_tokens_change_is_refused() -> None:
    "The whole text has more tokens than the prompt, and yet the prompt's last one is not among them"
    tok = MAKE["bpe"]()
    assert len(tok("The code is river.")["input_ids"]) > len(tok("The code is ")["input_ids"])
    with pytest.raises(BoundaryError, match="move the white space between them to the completion"):
        compose_prompt(tok, ["The code is "], completion="river.")


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="ByT5Tokenizer is a slow tokenizer.*load the fast one"): compose_prompt(ByT5Tokenizer(), ["Hi."])


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="has no tokenizer"): compose_prompt(load(zoo_model("llama")), ["Hi."])


def test_html_escapes_and_elides(lm: LongModel) -> None:
    evil = "<img src=x onerror=alert(1)> is the code."
    ctx = haystack_context(lm, 1500, [(50, Piece(evil, "<b>needle"))])
    html = ctx._repr_html_()
    assert "<img" not in html and "<b>needle" not in html and "tokens …" in html and len(html) < 20_000


# --- chat templates


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("name", ["bpe", "llama3", "llama2", "unigram"])
def test_chat(name: str, template: str) -> None:
    tok = wrapped_with(name, template)
    ctx = needle_context(tok, 400, 50, chat=True, system="Be brief." if template == CHATML else None, seed=2)
    messages = [{"role": "user", "content": user_turn(ctx)}]
    if template == CHATML: messages.insert(0, {"role": "system", "content": "Be brief."})
    rendered = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ctx.text == rendered + ctx.text[len(rendered):] and ctx.text.endswith("mentioned in the provided text is")
    assert ctx.tokens.ids.tolist() == tok(ctx.text, add_special_tokens=False)["input_ids"]
    assert (ctx.tokens.ids == (tok.bos_token_id)).sum() == (template == LLAMA)
    assert text_of(ctx, "answer") == ctx.answer and text_of(ctx, "question").startswith("Whatisthespecialmagic")
    assert len(ctx) + len(ctx.completion_ids) <= 400


def wrapped_with(name: str, template: str) -> PreTrainedTokenizerFast:
    tok = MAKE[name].__wrapped__()    # a copy of its own
    tok.chat_template = template
    return tok


def user_turn(ctx: Context) -> str:
    start = ctx.text.index("A special magic number")
    return ctx.text[start: ctx.text.index("mentioned in the provided text?") + len("mentioned in the provided text?")]


def test_chat_without_an_answer_prefix_strips_the_completion() -> None:
    tok = wrapped_with("bpe", CHATML)
    ctx = compose_prompt(tok, ["What is it?"], completion=" river.", chat=True)
    assert ctx.completion == "river." and bare(tok.decode(ctx.completion_ids)) == "river."
    assert tok(ctx.text + ctx.completion, add_special_tokens=False)["input_ids"] == [*ctx.tokens.ids.tolist(), *ctx.completion_ids.tolist()]


def test_templates_that_change_the_text_are_refused() -> None:
    upper, other = (CHATML.replace("m['content']", f"m['content'] | {f}") for f in ("upper", "replace('cat', 'dog')"))
    for template, why in ((LLAMA, "cuts off the white space at its beginning or end"), (upper, "0 times"), (other, "it changes it, or")):
        with pytest.raises(ValueError, match=why): compose_prompt(wrapped_with("bpe", template), ["A cat. "], chat=True)


# --- needles


@pytest.mark.parametrize("task", NIAH_TASKS)
def test_ruler_tasks(tok: PreTrainedTokenizerFast, task: str) -> None:
    ctx = needle_context(tok, 1200, None, seed=5, **NIAH_TASKS[task])
    several = "multiv" in task or "multiq" in task
    assert len(ctx.answers) == (4 if several else 1) == len(set(ctx.answers))
    assert len(ctx) + len(ctx.completion_ids) <= 1200
    for i, answer in enumerate(ctx.answers):
        number = f"_{i}" * several
        assert text_of(ctx, f"answer{number}") == bare(answer) and text_of(ctx, f"needle{number}").endswith(bare(answer) + ".")
        assert ctx.spans[f"needle{number}"].start <= ctx.spans[f"answer{number}"].start
    assert sum(k.startswith("distractor") for k in ctx.spans) == (3 if task == "niah_multikey_1" else 0)
    assert all(bare(k) in text_of(ctx, "question") for k in ctx.meta["keys"])
    assert ctx.text.count(ctx.answer) == 1
    assert text_of(ctx, "question").startswith("Whatareallthe" if several else "Whatisthe")


def test_ruler_wording_by_the_letter(lm: LongModel) -> None:
    ctx = needle_context(lm, 200, 50, needles=[("calm-otter", "1234567")])
    assert ctx.text.startswith("A special magic number is hidden within the following text. Make sure to memorize it. "
                               "I will quiz you about the number afterwards.\n")
    assert " One of the special magic numbers for calm-otter is: 1234567. " in ctx.text
    assert ctx.text.endswith("\nWhat is the special magic number for calm-otter mentioned in the provided text? "
                             "The special magic number for calm-otter mentioned in the provided text is")
    two = needle_context(lm, 250, 50, needles=[("a-b", "1234567"), ("c-d", "7654321")], n_queries=2)
    assert two.text.startswith("Some special magic numbers are hidden")
    assert two.text.endswith("for a-b, and c-d mentioned in the provided text are")
    assert two.completion == " 1234567, and 7654321."


def units_of(tok: PreTrainedTokenizerFast, seed: int) -> list[list[int]]:
    return tok([f" {u}" for u in Haystack.generated(seed).take(60)[0]], add_special_tokens=False)["input_ids"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(list(MAKE)), n=st.integers(200, 900), depth=st.floats(0, 100), seed=st.integers(0, 9),
       kind=st.sampled_from(["words", "numbers", "uuids", "names"]), keys=st.integers(1, 3), exact=st.booleans())
def test_any_needle(name: str, n: int, depth: float, seed: int, kind: str, keys: int, exact: bool) -> None:
    tok = MAKE[name]()
    make = functools.partial(needle_context, tok, n, key_kind=kind, value_kind=kind, n_keys=keys, seed=seed, exact=exact)
    try: ctx = make(depth)
    except ValueError as e:
        event(f"refused: {str(e)[:12]}")
        assert any(s in str(e) for s in ("without any haystack", "first sentence has", "no cut of")), e
        return
    event(f"made: {name}")
    total = len(ctx) + len(ctx.completion_ids)
    assert total == n if exact else total <= n
    assert text_of(ctx, "answer") == bare(ctx.answer)
    off, sentence = (ctx.meta["depth_percent"] - depth) * ctx.meta["haystack_tokens"] / 100, max(map(len, units_of(tok, seed)))
    assert -sentence - 4 <= off <= 4    # the last boundary that is not behind the depth; 4 tokens for what is counted at breaks
    assert torch.equal(make(depth).tokens.ids, ctx.tokens.ids)    # the same seed, the same ids
    assert ctx.spans["needle"].stop <= ctx.spans["question"].start < len(ctx)


def test_depth_is_monotone_and_close(tok: PreTrainedTokenizerFast) -> None:
    found = [needle_context(tok, 1500, d, seed=1).meta["depth_percent"] for d in range(0, 101, 5)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 100
    assert max(abs(f - d) for f, d in zip(found, range(0, 101, 5), strict=True)) < 4    # a sentence of about 30 tokens of 1,300


def test_no_further_sentence_fits(tok: PreTrainedTokenizerFast) -> None:
    "The number of sentences is the largest one: with the next one written in, the text is too long"
    for n in (500, 757, 1200):
        ctx = needle_context(tok, n, 50, seed=3)
        following = Haystack.generated(3).take(ctx.meta["sentences"] + 1)[0]
        assert following[-2] in ctx.text and following[-1] not in ctx.text.split(following[-2])[1]
        longer = ctx.text.replace("\nWhat is", f" {following[-1]}\nWhat is") + ctx.completion
        assert len(ctx) + len(ctx.completion_ids) <= n < len(tok(longer)["input_ids"])


def test_only_the_needle_moves(lm: LongModel) -> None:
    contexts = [needle_context(lm, 800, d, wording="facts", seed=1) for d in (0, 40, 100)]
    needle = spaced_text_of(contexts[0], "needle")
    assert len({bare(c.text.replace(needle, "")) for c in contexts}) == 1
    assert len({c.text for c in contexts}) == 3


def spaced_text_of(ctx: Context, name: str) -> str:
    return ctx.tokens.tokenizer.decode(ctx.tokens.ids[ctx.spans[name]]).strip()


def test_several_needles_stand_where_the_first_tests_put_them(lm: LongModel) -> None:
    ctx = needle_context(lm, 2000, 20, n_values=4, seed=2)
    assert [round(d / 10) for d in ctx.meta["depth_percent"]] == [2, 4, 6, 8]


def test_32k_tokens_are_fast(lm: LongModel) -> None:
    start = perf_counter()
    ctx = needle_context(lm, 32_000, 50, seed=1)
    assert perf_counter() - start < 15 and 31_950 < len(ctx) < 32_000    # about a second on an idle core


def test_facts_are_answered_by_the_embedded_model(lm: LongModel) -> None:
    right = 0
    for seed in range(10):
        ctx = needle_context(lm, 500, 10 * seed, wording="facts", n_keys=4, seed=seed)
        right += lm.generate(ctx.tokens, max_new_tokens=1).strip() == ctx.answer
    assert right >= 9


def test_city_is_asked_as_published(lm: LongModel) -> None:
    ctx = needle_context(lm, 400, 50, wording="san_francisco")
    assert text_of(ctx, "needle") == bare("The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.")
    assert ctx.text.endswith("\nBased on the content of the book, Question: What is the best thing to do in San Francisco?\nAnswer:")
    assert text_of(ctx, "answer") == bare(ctx.answer) and ctx.completion == " eat a sandwich and sit in Dolores Park on a sunny day."


# --- haystacks


@given(st.text(st.sampled_from("ab .!?\n。\"”'…\t"), min_size=1).filter(lambda t: bool(t.strip())))
def test_every_character_is_kept(text: str) -> None:
    h = Haystack.from_text(text)
    assert h.gaps is not None and "".join(u + g for u, g in zip(h.units, h.gaps, strict=True)) == text
    assert all(u.strip() for u in h.units)


def test_a_short_haystack_says_both_numbers(lm: LongModel) -> None:
    short = Haystack.from_text("The rain fell. " * 30)
    with pytest.raises(ValueError, match=r"the haystack \(text\) has 1\d\d tokens and 8\d\d are needed: .*say repeat=True"):
        needle_context(lm, 1000, 50, haystack=short)
    again = needle_context(lm, 1000, 50, haystack=replace(short, repeat=True))
    assert 5 < again.meta["repeats"] < 9


def test_own_text_keeps_its_paragraphs(lm: LongModel) -> None:
    h = Haystack.from_documents([f"Document {i} has a title\n\nIt says this. It says that." for i in range(20)])
    ctx = haystack_context(lm, 230, [(33, Piece("A needle.", "needle"))], haystack=h)
    assert "has a title\n\nIt says this." in ctx.text and "says that.\n\nDocument" in ctx.text
    assert ctx.text.replace(" A needle.", "", 1).startswith("Document 0 has a title\n\nIt says this. It says that.\n\nDocument 1")


def test_published_passages_as_a_haystack(lm: LongModel) -> None:
    file = DATA / "lost-in-the-middle/nq-open-oracle.jsonl.gz"
    if not file.exists(): pytest.skip("needs published files: lost-in-the-middle/nq-open-oracle.jsonl.gz in a folder shared/data")
    with gzip.open(file, "rt", encoding="utf-8") as f: records = [json.loads(next(f)) for _ in range(400)]
    h = Haystack.from_documents([r["ctxs"][0]["text"] for r in records])
    ctx = needle_context(lm, 20_000, 50, haystack=h, exact=True)
    assert len(ctx) + len(ctx.completion_ids) == 20_000 and abs(ctx.meta["depth_percent"] - 50) < 1
    docs = [r["ctxs"][0] for r in records[:10]]
    ctx = numbered_documents(lm, records[3]["question"], docs[3], [d for d in docs if d is not docs[3]], 7, answers=records[3]["answers"])
    assert text_of(ctx, "document_7") == text_of(ctx, "gold") and bare(docs[3]["text"]) in text_of(ctx, "gold")
    assert list(ctx.answers) == records[3]["answers"]


# --- tasks


def test_published_pairs(lm: LongModel) -> None:
    file = DATA / "lost-in-the-middle/kv-retrieval-75_keys.jsonl.gz"
    if not file.exists(): pytest.skip("needs published files: lost-in-the-middle/kv-retrieval-75_keys.jsonl.gz in a folder shared/data")
    with gzip.open(file, "rt", encoding="utf-8") as f: record = json.loads(next(f))
    for index in (0, 37, 74):
        ctx = kv_json(lm, records=record["ordered_kv_records"], key=record["key"], gold_index=index)
        assert ctx.answer == record["value"] and text_of(ctx, f"key_{index}") == record["key"] and text_of(ctx, "answer") == record["value"]
        assert len([k for k in ctx.spans if k.startswith("pair_")]) == 75
        spans = [ctx.spans[f"pair_{i}"] for i in range(75)]
        assert all(a.stop <= b.start for a, b in pairwise(spans))


TASKS: dict[str, Any] = {
    "variable_tracking": lambda m, **kw: variable_tracking(m, 1500, n_chains=2, **kw),
    "kv_json": lambda m, **kw: kv_json(m, 12, 5, **kw),
    "threads": lambda m, **kw: threads(m, "multi_threading", 20, **kw),
    "conditional": lambda m, **kw: threads(m, "conditional", 20, **kw),
    "ancestral_chain": lambda m, **kw: ancestral_chain(m, 8, **kw),
    "passkeys": lambda m, **kw: passkeys(m, 2500, n_passkeys=5, words_per_passkey=8, **kw),
    "retrieval_prompt": lambda m, **kw: retrieval_prompt(m, "the mill", [("A", "The mill."), "The lake."], **kw),
    "documents": lambda m, **kw: numbered_documents(m, "Who?", ("A", "Ada."), [("B", "Ben."), ("C", "Cleo.")], 1, answers=["Ada"], **kw),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_on_every_tokenizer(tok: PreTrainedTokenizerFast, task: str) -> None:
    "Spans say what the text says, and completions continue the prompt"
    ctx = TASKS[task](tok, seed=1)
    assert torch.equal(TASKS[task](tok, seed=1).tokens.ids, ctx.tokens.ids)
    for name, span in ctx.spans.items():
        a, b = int(ctx.tokens.offsets[span.start, 0]), int(ctx.tokens.offsets[span.stop - 1, 1])
        covered = ctx.text[a:b]
        if "answer" in name and "prefix" not in name: assert covered.strip().strip('"') in ctx.answers, name
        if name.startswith("question") and "_" not in name: assert covered.strip().endswith(ctx.question)
        assert len(span) > 0
    tops = sorted((s for k, s in ctx.spans.items() if k.split("_")[0] in ("pair", "relation", "document", "assignment", "needle")),
                  key=lambda s: s.start)
    assert all(a.stop <= b.start for a, b in pairwise(tops))
    assert ctx.meta["context_length"] == len(ctx)


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
@pytest.mark.parametrize("task", ["threading", "multi_threading"])
def test_threads_end_where_the_object_says(lm: LongModel, task: str, direction: str) -> None:
    ctx = threads(lm, task, 40, thread_length=6, n_threads=4, direction=direction, seed=7)
    record = json.loads(ctx.text.split("\n")[0])
    for t, answer in enumerate(ctx.answers):
        at, steps = text_of(ctx, f"thread_{t}_0").split('":')[0], 0
        while at in record: at, steps = record[at], steps + 1
        assert (at, steps) == (answer, 6)
    assert len(ctx.answers) == (4 if task == "multi_threading" else 1)


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("passkeys",)])
def test_tasks_in_a_chat(task: str) -> None:
    ctx = TASKS[task](wrapped_with("bpe", CHATML), seed=1, chat=True)
    assert ctx.text.startswith("<|im_start|>user\n") and "<|im_start|>assistant\n" in ctx.text
    if task == "retrieval_prompt": assert ctx.spans["query"].stop == len(ctx)


def test_different_seeds_differ(lm: LongModel) -> None:
    for task in ("variable_tracking", "kv_json", "threads", "ancestral_chain", "passkeys"):
        assert TASKS[task](lm, seed=1).text != TASKS[task](lm, seed=2).text


def test_own_wording(tok: PreTrainedTokenizerFast) -> None:
    mine = Wording("The sign at the mill says {value}.", "\nWhat does the sign at the mill say?", " It says", value="the market is closed")
    ctx = needle_context(tok, 300, 70, wording=mine)
    assert text_of(ctx, "answer") == "themarketisclosed" and ctx.completion == " the market is closed."
