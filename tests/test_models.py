"""What the models notebook cannot show well: every architecture, files that are wrong, the network, other processes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import CAUSAL, VOCAB, ZOO, token_ids, zoo_model

from longlens.models.forward import LongModel
from longlens.models.load import load
from longlens.models.prefix import Prefix

N = 40  # several windows long


def model(name: str) -> LongModel:
    return LongModel(zoo_model(name), name=name)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    """Equal to `atol` of the largest number."""
    torch.testing.assert_close(a.float(), b.float(), atol=atol * max(1.0, float(b.abs().max())), rtol=0)


@pytest.fixture
def tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = ["<pad>", "<s>", "</s>", "<unk>"] + [chr(33 + i) for i in range(VOCAB - 5)] + [" "]
    tok = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture
def folder(tmp_path, tokenizer):
    path = tmp_path / "llama"
    zoo_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# every architecture


POSITIONS = {"gpt2": "learned", "opt": "learned"}


@pytest.mark.parametrize("name", CAUSAL)
def test_facts(name):
    lm = model(name)
    assert lm.positions == POSITIONS.get(name, "rotary")
    assert (lm.max_length, lm.vocab_size, lm.n_heads) == (512, 128, 4)
    assert name in repr(lm) and "\n" not in repr(lm)


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_of_chosen_positions(name):
    lm, ids = model(name), token_ids(N)
    with torch.no_grad():
        whole = lm.hf(ids).logits[0]
    close(lm.logits(ids[0]), whole)
    close(lm.logits(ids[0], [3, -1]), whole[[3, N - 1]])


@pytest.mark.parametrize("chunk", [7, 16, None])
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_is_the_whole_forward(name, chunk):
    lm, ids = model(name), token_ids(N)[0]
    p = lm.prefill(ids, chunk)
    assert len(p) == p.length == p.cache.get_seq_length() == N
    close(p.logits, lm.logits(ids, -1)[0])
    close(lm.prefill(ids, chunk, keep="window").logits, p.logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_crop_and_continue_is_a_fresh_run(name):
    lm, ids, other = model(name), token_ids(N)[0], token_ids(12, seed=1)[0]
    p = lm.prefill(ids, 7)
    before = [v.keys.clone() for v in p.cache.layers]
    for n in (1, 5, 23, N):
        fresh = lm.logits(torch.cat([ids[:n], other]))
        q = p.crop(n).extend(other, chunk=5)
        close(q.logits, fresh[-1])
        close(p.crop(n).logits_after(other, chunk=5), fresh[n:])
        close(p.crop(n).logits, fresh[n - 1])
        close(q.crop(n + 3).logits, fresh[n + 2])
    assert len(p) == N and all(torch.equal(v.keys, k) for v, k in zip(p.cache.layers, before, strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_cache_bytes_are_exact(name):
    lm = model(name)
    cache = lm.prefill(token_ids(N)[0]).cache
    assert lm.memory(N).cache == sum(v.keys.nbytes + v.values.nbytes for v in cache.layers)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(name, side):
    from longlens.models.tokens import Tokens

    lm = model(name)
    short, long = token_ids(11)[0], token_ids(N, seed=1)[0]
    out = lm([Tokens(short), Tokens(long)], padding=side).logits
    at = slice(0, 11) if side == "right" else slice(N - 11, N)
    close(out[0, at], lm.logits(short), atol=1e-4)
    close(out[1], lm.logits(long), atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_scores_agree(name):
    lm, answer = model(name), token_ids(4, seed=5)[0]
    prompts = [token_ids(n, seed=n)[0] for n in (N, 9, 21)]
    answers = [answer, answer[:1], answer[:2]]
    for p, a, many in zip(prompts, answers, lm.score_many(prompts, answers, batch_size=2), strict=True):
        s = lm.score(p, a)
        rows = lm.logits(torch.cat([p, a])).log_softmax(-1)[len(p) - 1 : -1]
        close(s.logprobs, rows[range(len(a)), a])
        close(many.logprobs, s.logprobs, atol=1e-4)
        close(lm.score(lm.prefill(p, 6), a).logprobs, s.logprobs)
        close(lm.score(p, a, chunk=6).logprobs, s.logprobs)
        assert s.total == pytest.approx(float(s.logprobs.sum())) and s.mean == pytest.approx(s.total / len(a))
        assert s.greedy.tolist() == (rows.argmax(-1) == a).tolist()


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_is_what_transformers_decodes(name):
    lm, ids = model(name), token_ids(20)[0]
    theirs = lm.hf.generate(ids[None], max_new_tokens=8, do_sample=False, attention_mask=torch.ones(1, 20))[0, 20:]
    ours = lm.generate_ids(ids, 8)
    assert theirs[: len(ours)].tolist() == ours.tolist()
    assert lm.generate_ids(lm.prefill(ids, 6), 8).tolist() == ours.tolist()


@pytest.mark.parametrize("name", CAUSAL)
def test_fork_is_independent_and_repeats(name):
    lm, ids = model(name), token_ids(N)[0]
    p = lm.prefill(ids)
    tails = token_ids(3, batch=2, seed=8)
    with torch.no_grad():
        out = lm.hf(tails, past_key_values=p.fork(2)).logits
    for row, tail in zip(out, tails, strict=True):
        close(row, p.logits_after(tail))
    assert p.cache.get_seq_length() == N


# positions whose frequencies depend on the length


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_frequencies_that_depend_on_the_length(kind):
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    base = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "initializer_range": 0.2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "longrope":
        rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32}
        hf = Phi3ForCausalLM(Phi3Config(**base, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope))
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
        hf = LlamaForCausalLM(LlamaConfig(**base, max_position_embeddings=32, rope_parameters=rope))
    lm, ids = LongModel(hf.eval(), allow_longer=True), token_ids(60)[0]
    short, whole = lm.logits(ids[:20], -1)[0], lm.logits(ids, -1)[0]
    p = lm.prefill(ids, 8)
    close(p.logits, whole)
    close(p.crop(20).logits, short)
    close(lm.prefill(ids[:20], 8).extend(ids[20:], 8).logits, whole)


# loading


def test_folder_without_network(folder, no_network):
    lm = load(folder, device="cpu")
    assert lm.name == "llama" and lm.dtype == torch.float32 and lm.tokenizer is not None
    close(lm.logits("abc"), LongModel(zoo_model("llama"), lm.tokenizer).logits("abc"))
    assert not no_network


def test_folder_string_relative(folder, monkeypatch, no_network):
    monkeypatch.chdir(folder.parent)
    assert load("llama", device="cpu").name == "llama"
    (folder.parent / "models").mkdir()
    for wrong in ("lama", "./lama", "models/llama", "llama/", "~/no such folder", "a/b/c"):
        if wrong != "llama/":
            with pytest.raises(FileNotFoundError, match="there is no folder"):
                load(wrong)
    assert not no_network


def test_the_name_of_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Reports call it needle-lm; a folder that is called so comes first"
    monkeypatch.chdir(tmp_path)
    assert load("needle-lm", device="cpu").name == load(device="cpu").name
    Path("needle-lm").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no config.json"): load("needle-lm")


def test_hub_id_offline_says_what_to_do(no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="download=False, and it is not on this machine. Fetch its folder"):
        load("no-such-org/no-such-model", download=False)
    assert not no_network


def test_hub_id_without_a_network(monkeypatch):
    import huggingface_hub

    def closed(*args, **kw):
        assert kw["local_files_only"] is False and "*.safetensors" not in kw["allow_patterns"]
        raise huggingface_hub.errors.LocalEntryNotFoundError("closed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", closed)
    with pytest.raises(OSError, match="no-such-org/no-such-model cannot be loaded: the network cannot be reached"):
        load("no-such-org/no-such-model")


def test_hub_id_that_is_on_this_machine(folder, no_network, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append(kw["allow_patterns"]) or str(folder))
    lm = load("org/letters", device="cpu", download=False)
    assert lm.name == "org/letters" and not no_network
    assert [("*.safetensors" in a, "*.bin" in a, "*.py" in a) for a in asked] == [(False, False, False), (True, False, False)]


def test_folder_without_tokenizer_takes_ids(folder):
    for f in folder.glob("*token*"):
        f.unlink()
    lm = load(folder, device="cpu")
    assert lm.tokenizer is None and "no tokenizer" in repr(lm)
    with pytest.raises(ValueError, match="takes token ids"):
        lm.logits("abc")
    with pytest.raises(ValueError, match="speaks in token ids"):
        lm.generate([5, 6])
    assert len(lm.generate_ids([5, 6], 3)) <= 3


def test_pickled_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pickled weights only.*save_pretrained"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no \\*.safetensors"):
        load(folder)


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for broken in (data[: len(data) // 2], data[:4], b"", b"\xff" * 100):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read, the file is damaged or cut off"):
            load(folder)


def test_missing_tensor_is_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    gone = dict(state)
    del gone["model.layers.1.mlp.up_proj.weight"]
    save_file(gone, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing or misshapen, first model.layers.1.mlp.up_proj.weight"):
        load(folder)
    save_file(state | {"model.norm.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(folder, value):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.self_attn.q_proj.weight"][0, 0] = value
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 of 4,096 numbers in the weight model.layers.0.self_attn.q_proj.weight"):
        load(folder)
    load(folder, check=False)


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        load(folder)


def test_remote_code_is_off(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="is not a causal language model.*load_encoder"):
        load(zoo_model(name))
    zoo_model(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a causal language model"):
        load(tmp_path)


def test_a_bert_with_a_language_head_is_still_an_encoder():
    from transformers import BertLMHeadModel

    with pytest.raises(ValueError, match="BertLMHeadModel is not a causal language model"):
        load(BertLMHeadModel(zoo_model("bert").config))


def test_dtype_and_device(folder):
    for dtype in ("bfloat16", "float16"):
        lm = load(folder, dtype=dtype, device="cpu")
        assert str(lm.dtype) == f"torch.{dtype}" and lm.logits("abc").dtype == torch.float32
        close(lm.prefill("abcdefgh", 3).logits, lm.logits("abcdefgh", -1)[0], atol=0.1)
        assert lm.prefill("abc").cache.layers[0].keys.dtype == lm.dtype
    assert load(folder, dtype=torch.float64, device="cpu").dtype == torch.float64
    with pytest.raises(ValueError, match="give one of them"):
        load(folder, device="cpu", device_map="auto")
    with pytest.raises(TypeError, match="device_map: this is for models that are read from files"):
        load(zoo_model("llama"), device_map="auto")


def test_device_map_passes_through(folder):
    pytest.importorskip("accelerate", reason="device_map needs accelerate: pip install accelerate")
    lm = load(folder, device_map={"": "cpu"})
    assert lm.device.type == "cpu" and len(lm.generate_ids([5, 6], 2)) <= 2
    lm = load(folder, device_map={"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                                  "model.rotary_emb": "cpu", "lm_head": "cpu"}, from_pretrained={"offload_folder": folder / "disk"})
    close(lm.logits([5, 6, 7]), LongModel(zoo_model("llama")).logits([5, 6, 7]))


# the bridge


@pytest.mark.parametrize("name", CAUSAL)
def test_bridge_shares_the_weights(name, no_network, tokenizer):
    pytest.importorskip("transformer_lens", reason="the bridge needs TransformerLens: pip install longlens[bridge]")
    lm, ids = LongModel(ZOO[name](), tokenizer, name), token_ids(N)
    attention, before = lm.config._attn_implementation, lm.logits(ids[0])
    with torch.no_grad():
        close(lm.bridge(ids)[0], before)
    ours = {p.data_ptr() for p in lm.hf.parameters()}
    assert ours <= {p.data_ptr() for p in lm.bridge.original_model.parameters()}
    assert lm.config._attn_implementation == attention and lm.bridge is lm.bridge
    assert torch.equal(lm.logits(ids[0]), before)
    assert not no_network


@pytest.mark.parametrize("name", CAUSAL)
def test_load_a_bridge(name, no_network):
    pytest.importorskip("transformer_lens", reason="the bridge needs TransformerLens: pip install longlens[bridge]")
    lm, ids = LongModel(ZOO[name](), None, name), token_ids(N)[0]
    back = load(lm.bridge)
    close(back.logits(ids), lm.logits(ids))
    assert {p.data_ptr() for p in back.hf.parameters()} == {p.data_ptr() for p in lm.hf.parameters()}
    assert back.config._attn_implementation == lm.config._attn_implementation
    with torch.no_grad():
        close(lm.bridge(ids[None])[0], lm.logits(ids))  # the bridge works as before


def test_bridge_of_a_tokenizer_without_a_first_token(no_network, tokenizer):
    pytest.importorskip("transformer_lens", reason="the bridge needs TransformerLens: pip install longlens[bridge]")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A")
    lm = LongModel(ZOO["llama"](), tokenizer)
    assert len(lm.tokens("abc")) == 3 and lm.bridge.cfg.tokenizer_prepends_bos is False
    assert lm.bridge.to_tokens("abc", prepend_bos=False)[0].tolist() == lm.tokens("abc").ids.tolist() and not no_network


def test_load_a_bridge_that_was_folded(tokenizer):
    pytest.importorskip("transformer_lens", reason="the bridge needs TransformerLens: pip install longlens[bridge]")
    lm = LongModel(ZOO["llama"](), tokenizer)
    lm.bridge.enable_compatibility_mode()
    with pytest.raises(ValueError, match="give the Hugging Face model that it was made from"):
        load(lm.bridge)


def test_missing_transformer_lens(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(ImportError, match=r"pip install longlens\[bridge\]"):
        _ = LongModel(ZOO["llama"]()).bridge


# limits and cost


def test_learned_positions_cannot_go_on():
    ids = token_ids(513)[0]
    for allow in (False, True):
        with pytest.raises(ValueError, match="513 tokens, and gpt2 was made for 512 positions: they are a learned table"):
            model("gpt2").logits(ids, allow_longer=allow)
    with pytest.raises(ValueError, match="allow_longer=True"):
        model("llama").logits(ids)
    assert model("llama").logits(ids, -1, allow_longer=True).shape == (1, 128)
    p = model("llama").prefill(ids, 128, allow_longer=True).extend([5])
    assert len(p) == 514
    with pytest.raises(ValueError, match="514 tokens"):
        model("llama").score(ids[:510], [3, 4, 5, 6])


def test_alibi_has_no_limit():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    lm = LongModel(BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2)))
    assert lm.positions == "alibi" and lm.max_length is None and "without limit" in repr(lm)
    ids = token_ids(N)[0]
    close(lm.prefill(ids, 7).logits, lm.logits(ids, -1)[0], atol=1e-4)


def test_a_cache_that_forgot_cannot_be_cropped():
    p = model("mistral").prefill(token_ids(N)[0], 7, keep="window")
    whole = model("mistral").prefill(token_ids(N)[0])
    assert sum(v.keys.nbytes for v in p.cache.layers) < sum(v.keys.nbytes for v in whole.cache.layers) / 2
    with pytest.raises(ValueError, match='prefill\\(..., keep="all"\\) can be cropped'):
        p.crop(10)
    close(p.extend([5, 6]).logits, model("mistral").logits(torch.cat([token_ids(N)[0], torch.tensor([5, 6])]), -1)[0])


def test_nothing_is_changed_by_an_error():
    hf = copy.deepcopy(zoo_model("llama"))
    p = LongModel(hf).prefill(token_ids(N)[0])
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN logits"):
        p.extend([5])
    assert isinstance(p, Prefix) and len(p) == p.cache.get_seq_length() == N


def test_memory_names_its_parts():
    need = model("llama").memory(512, chunk=64)
    assert need.total == need.weights + need.cache + need.activations + need.logits and need.fits
    assert "512 tokens x 1 in chunks of 64" in repr(need)
    assert model("llama").memory(512, 64).activations < model("llama").memory(512, 512).activations
    assert model("gpt_oss").memory(512, 64).activations > model("llama").memory(512, 64).activations
    assert model("llama").memory(512, cached=256).cache * 2 == need.cache


def test_importing_models_is_cheap():
    code = "import sys, longlens.models.load; print(sorted(m for m in ('transformers', 'transformer_lens', 'sklearn') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
