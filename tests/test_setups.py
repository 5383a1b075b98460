"""Models as people really set them up: with adapters, quantised, compiled, or with weights elsewhere. Right numbers, or a clear refusal."""
from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from matrix import off, patterns
from torch import nn
from transformers import PreTrainedModel

import longlens as ll
from longlens.attention import hf_interface
from longlens.attention.hf_interface import UnsupportedModel

N = 30


def entropies(P: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.special.entr(P[layer][0].double()).sum(-1).mean(-1) for layer in sorted(P)])


@torch.no_grad()
def check(hf: Any, inner: PreTrainedModel | None = None, close: float = 1e-4) -> None:
    "Statistics, logits in a block that changes nothing, continued prefixes, and a silenced head"
    ids, lm = zoo.token_ids(N), ll.load(hf)
    plain = hf(input_ids=ids, use_cache=False).logits
    with ll.capture(lm, ll.Entropy()) as seen: inside = lm(ids).logits
    assert off(inside, plain) < close
    got = seen.frame("entropy").sort("layer", "head")["entropy"].to_torch().double()
    assert off(got, entropies(patterns(inner or hf, ids)).flatten()) < close
    assert off(lm.prefill(ids[0, :20]).logits_after(ids[0, 20:]), plain[0, 20:].float()) < close
    with ll.ablate(lm, [(0, 1)]): assert off(lm(ids).logits, plain) > 1e-3
    assert torch.equal(lm.generate_ids(ids[0].tolist(), 1), plain[0, -1:].argmax(-1))
    assert off(hf(input_ids=ids, use_cache=False).logits, plain) < close


# ---- adapters

def with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    hf = zoo.ZOO["llama"]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(hf, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()


def test_an_adapter_takes_part() -> None:
    adapted, ids = with_adapter(), zoo.token_ids(N)
    with torch.no_grad(): assert off(adapted(input_ids=ids).logits, zoo.zoo_model("llama")(input_ids=ids).logits) > 1e-2
    check(adapted, adapted.base_model.model)
    check(adapted.merge_and_unload())


def test_an_adapter_that_is_disabled_takes_no_part() -> None:
    adapted = with_adapter()
    with adapted.disable_adapter(), torch.no_grad():
        assert off(ll.load(adapted).logits(zoo.token_ids(N)[0]), zoo.zoo_model("llama")(zoo.token_ids(N)).logits[0]) < 1e-4


def test_learned_tokens_in_front_of_a_text_are_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(zoo.ZOO["llama"](), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with pytest.raises(ValueError, match="learned tokens in front of every text"): ll.load(adapted)


def test_a_folder_with_an_adapter_names_the_way_out(tmp_path: Path) -> None:
    with_adapter().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PEFT adapter: merge it into its model and save that"): ll.load(tmp_path)


# ---- quantised

class Packed(nn.Module):
    "A linear layer as libraries of quantisation have it: 4-bit weights in bytes, and no floating-point weight"

    def __init__(self, dense: nn.Linear):
        super().__init__()
        w = dense.weight.detach()
        self.scale = nn.Parameter(w.abs().amax(1, keepdim=True) / 7, requires_grad=False)
        q = (w / self.scale).round().clamp(-8, 7).to(torch.int16) + 8
        self.weight = nn.Parameter((q[:, ::2] * 16 + q[:, 1::2]).to(torch.uint8).reshape(-1, 1), requires_grad=False)
        self.bias, self.in_features, self.out_features = dense.bias, dense.in_features, dense.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.weight.reshape(self.out_features, -1).to(torch.int16)
        w = torch.stack([packed // 16, packed % 16], -1).reshape(self.out_features, -1).to(x) - 8
        return nn.functional.linear(x, w * self.scale, self.bias)


def packed(hf: PreTrainedModel) -> PreTrainedModel:
    for layer in hf.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, m in list(part.named_children()):
                if isinstance(m, nn.Linear): setattr(part, name, Packed(m))
    return hf


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_weights(name: str) -> None: check(packed(zoo.ZOO[name]()))


@pytest.mark.filterwarnings("ignore")
def test_torch_quantises_linear_layers() -> None:
    "Activations are rounded by what a call holds, so that chunks and whole texts differ a little, with or without longlens"
    hf = zoo.ZOO["llama"]()
    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    hf.model = torch.ao.quantization.quantize_dynamic(hf.model, {nn.Linear}, dtype=torch.qint8)
    ids = zoo.token_ids(N)
    with torch.no_grad():
        plain = hf(input_ids=ids, use_cache=False).logits
        with ll.capture(hf, ll.Entropy()) as seen: inside = hf(input_ids=ids, use_cache=False).logits
        want = entropies(patterns(hf, ids)).flatten()
    assert float((inside - plain).abs().median() / plain.abs().max()) < 0.02
    assert float((seen.frame("entropy").sort("layer", "head")["entropy"].to_torch().double() - want).abs().median()) < 0.05


# ---- compiled

@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")    # said by torch
def test_a_compiled_model_is_measured_as_it_is_written() -> None:
    "Without a compiler: what torch.compile wraps is found, and attention is refused or measured, never missed"
    hf = zoo.ZOO["llama"]()
    ids = zoo.token_ids(N)
    with torch.no_grad(): plain = hf(input_ids=ids, use_cache=False).logits
    hf.compile(backend="eager")
    with torch.no_grad(), ll.capture(hf, ll.Entropy()) as seen: inside = hf(input_ids=ids, use_cache=False).logits
    assert off(inside, plain) < 1e-4
    got = seen.frame("entropy").sort("layer", "head")["entropy"].to_torch().double()
    assert off(got, entropies(patterns(zoo.ZOO["llama"](), ids)).flatten()) < 1e-4


# ---- elsewhere

def on_cpu(hf: PreTrainedModel, folder: Path) -> Any:
    from accelerate import cpu_offload
    return cpu_offload(hf, execution_device=torch.device("cpu"))


def on_disk(hf: PreTrainedModel, folder: Path) -> Any:
    from accelerate import disk_offload
    return disk_offload(hf, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("away", [on_cpu, on_disk])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_elsewhere(name: str, away: Callable[[PreTrainedModel, Path], Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    hf = away(zoo.ZOO[name](), tmp_path)
    assert hf.get_input_embeddings().weight.is_meta
    check(hf, zoo.ZOO[name]())
    assert hf.get_input_embeddings().weight.is_meta


def test_weights_that_are_nowhere_are_refused() -> None:
    lm = ll.load(zoo.ZOO["llama"]().to("meta"))
    for run in (lambda: lm(zoo.token_ids(5)[0]), lambda: lm.logits(zoo.token_ids(5)[0])):
        with pytest.raises(ValueError, match="on the meta device, which holds no numbers"): run()


# ---- the comparison when attaching

def test_a_comparison_of_libraries_code_is_one_short_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    side, whole = hf_interface._side_by_side, hf_interface._outputs_apart
    monkeypatch.setattr(hf_interface, "_side_by_side", lambda *a: found.append(side(*a)) or found[-1])
    monkeypatch.setattr(hf_interface, "_outputs_apart", lambda *a: found.append("whole") or whole(*a))
    for name, calls in (("llama", 1), ("gemma2", 2), ("jamba", 1), ("gemma4", 2), ("bert", 1)):
        with hf_interface.attach(zoo.EVERYTHING[name]()): pass
        assert found[-1] != "whole" and found[-1].calls == calls and not found[-1].untried, name
    gc.collect()
    with hf_interface.attach(packed(zoo.ZOO["llama"]())): pass
    assert found[-1] == "whole"    # a layer that is not of the libraries


def test_an_attention_that_is_patched_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama
    hf, plain = zoo.ZOO["llama"](), modeling_llama.eager_attention_forward
    hf.set_attn_implementation("eager")
    with hf_interface.attach(hf): pass

    def patched(module: Any, q: torch.Tensor, *args: Any, **kw: Any) -> Any: return plain(module, q * 1.5, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(modeling_llama, "eager_attention_forward", patched)
        with pytest.raises(UnsupportedModel, match="numbers differ by .* in LlamaAttention"), hf_interface.attach(hf): pass
    with hf_interface.attach(hf): pass
    attention, own = hf.model.layers[1].self_attn, type(hf.model.layers[1].self_attn).forward
    attention.forward = lambda *a, **k: tuple(2 * x if i == 0 else x for i, x in enumerate(own(attention, *a, **k)))
    with hf_interface.attach(hf): pass    # a change around the attention, which is the same inside and outside


@torch.no_grad()
def test_gemma4_leaves_no_query_out() -> None:
    hf, ids = zoo.EVERYTHING["gemma4_shared"](), zoo.token_ids(N)
    P = patterns(hf, ids)
    with ll.capture(ll.load(hf), ll.Entropy()) as seen: last = ll.load(hf)(ids, logits_to_keep=1).logits
    assert last.shape[1] == 1 and off(last, hf(input_ids=ids, use_cache=False).logits[:, -1:]) < 1e-4
    assert off(seen.frame("entropy").sort("layer", "head")["entropy"].to_torch().double(), entropies(P).flatten()) < 1e-4
    with pytest.raises(TypeError, match="logits_to_keep as a tensor of positions"), ll.capture(hf, ll.Entropy()): hf(ids, logits_to_keep=1)


# ---- over several devices, and in 4 bits

def test_layers_here_and_on_disk(tmp_path: Path) -> None:
    "As device_map leaves a model that does not fit: some layers in memory, some on disk"
    accelerate = pytest.importorskip("accelerate")
    hf, place = zoo.ZOO["llama"](), {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
                                     "model.rotary_emb": "cpu", "lm_head": "cpu"}
    hf = accelerate.dispatch_model(hf, place, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert hf.model.layers[1].mlp.up_proj.weight.is_meta and not hf.model.layers[0].mlp.up_proj.weight.is_meta
    check(hf, zoo.ZOO["llama"]())


@pytest.mark.filterwarnings("ignore")    # of bitsandbytes, about faster kernels
def test_four_bits_of_bitsandbytes(tmp_path: Path) -> None:
    "NF4 on the CPU; the reference is the quantised model with eager attention"
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (tried with 0.50.2: docs/devices.md)")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    zoo.ZOO["llama"]().save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits, device_map="cpu")
    assert hf.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    check(hf)
