"""Attaching refuses what it may not take the place of: attention of the user's own, masks sliced by the model, holes in a mask."""
from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from zoo import EVERYTHING, ZOO, token_ids

import longlens as ll
from longlens.attention import hf_interface
from longlens.attention.hf_interface import UnsupportedModel, attach, attachments


def flatter(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float | None = None, **kw: Any) -> Any:
    "Attention with logits divided by four"
    return sdpa_attention_forward(module, q, k, v, mask, scaling=(scaling or q.shape[-1] ** -.5) / 4, **kw)


@functools.wraps(sdpa_attention_forward)
def wrapped(*args: Any, **kw: Any) -> Any: return flatter(*args, **kw)


@functools.wraps(sdpa_mask)
def wrapped_mask(*args: Any, **kw: Any) -> Any: return sdpa_mask(*args, **kw)


@pytest.fixture
def registries() -> Iterator[None]:
    "What a test registers is taken off again"
    books = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = [dict(b) for b in books]
    yield
    for book, old in zip(books, before, strict=True):
        book.clear()
        book.update(old)


def refused(hf: PreTrainedModel, *words: str, way_out: str = 'set_attn_implementation("eager")') -> None:
    "Neither captures nor interventions start, and nothing is left behind"
    before = hf.config._attn_implementation
    for block in (lambda: ll.capture(hf, ll.Entropy()), lambda: ll.temperature(hf, 1.0), lambda: attach(hf)):
        with pytest.raises(UnsupportedModel) as e, block(): pass
        for word in (type(hf).__name__, way_out, *words): assert word in str(e.value)
    assert hf.config._attn_implementation == before and not attachments()


# ---- attention of the user's own

def test_an_attention_that_the_user_registered_is_refused_by_name(registries: None) -> None:
    AttentionInterface.register("flat", flatter)
    AttentionMaskInterface.register("flat", sdpa_mask)
    hf = ZOO["llama"]()
    hf.set_attn_implementation("flat")
    refused(hf, "'flat'", "flatter")
    hf.set_attn_implementation("sdpa")
    with ll.capture(hf, ll.Entropy()), torch.no_grad(): hf(token_ids(10))


@pytest.mark.parametrize("around", [wrapped, functools.partial(sdpa_attention_forward), flatter])
def test_a_stock_attention_that_was_wrapped_is_refused(registries: None, around: Any) -> None:
    hf = ZOO["llama"]()
    with attach(hf): pass  # a check that was passed before does not count
    AttentionInterface.register("sdpa", around)
    refused(hf, "'sdpa'", "attention function")
    hf.set_attn_implementation("eager")
    with attach(hf): pass
    AttentionInterface.register("eager", around)
    refused(hf, "'eager'", "attention function")


def test_a_wrapped_mask_function_and_an_instance_of_a_registry_are_found(registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    hf = ZOO["llama"]()
    AttentionMaskInterface.register("sdpa", wrapped_mask)
    refused(hf, "'sdpa'", "mask function")
    AttentionMaskInterface.register("sdpa", sdpa_mask)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", wrapped)
    refused(hf, "'sdpa'", "attention function")


def pictures_and_text() -> PreTrainedModel:
    "A model of several parts"
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
    small: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=ZOO["llama"]().config, image_token_id=5)).eval()


def test_an_attention_of_one_part_of_a_model_is_refused(registries: None) -> None:
    AttentionInterface.register("flat", flatter)
    hf = pictures_and_text()
    with attach(hf): assert hf_interface._short_input(hf, hf_interface._configs(hf)) is not None
    for part in ("text_config", "vision_config"):
        hf.set_attn_implementation({part: "flat"})
        refused(hf, "'flat'")
        hf.set_attn_implementation("sdpa")


@pytest.mark.parametrize("impl", ["sdpa", "eager", "flash_attention_2", "flex_attention", "paged|eager"])
def test_transformers_own_are_known(impl: str) -> None:
    hf = ZOO["llama"]()
    assert all(known for _, _, known in hf_interface._registered(hf, impl))
    assert hf_interface._registered(hf, impl)  # a mask function at least


# ---- the comparison

def test_a_patched_attention_is_found_by_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama
    hf, plain = ZOO["llama"](), modeling_llama.eager_attention_forward
    hf.set_attn_implementation("eager")

    def patched(module: Any, q: torch.Tensor, *args: Any, **kw: Any) -> Any: return plain(module, q * 1.5, *args, **kw)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", patched)
    refused(hf, "inside and outside", "differ by", way_out="TransformerBridge")


@pytest.mark.parametrize("name", ["gpt_oss", "jamba", "gemma3n", "bert"])
def test_models_that_can_be_measured_are_run_and_pass(name: str) -> None:
    hf = EVERYTHING[name]()
    given = hf_interface._short_input(hf, hf_interface._configs(hf))
    assert given is not None and hf_interface._output(hf, given) is not None
    with attach(hf): pass


@pytest.mark.parametrize("name", ["deepseek_v32", "doge"])
def test_models_that_slice_their_mask_are_refused(name: str) -> None:
    refused(EVERYTHING[name](), "slices or changes its attention mask itself", way_out="TransformerBridge")


def counting(hf: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "The lengths of all inputs of a model from now on"
    lengths, forward = [], hf.forward

    @functools.wraps(forward)
    def count(*args: Any, **kw: Any) -> Any:
        lengths.append((args[0] if args else kw["input_ids"]).shape[1])
        return forward(*args, **kw)
    monkeypatch.setattr(hf, "forward", count)
    return lengths


def test_a_model_is_checked_once_and_again_when_its_attention_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = ZOO["llama"]()
    lengths = counting(hf, monkeypatch)
    for _ in range(3):
        with attach(hf), attach(hf): pass
    assert lengths == [8, 8]
    hf.set_attn_implementation("eager")
    with attach(hf): pass
    with attach(hf.double()): pass
    with attach(hf), attach(hf.model): pass  # a part of what is attached to already
    assert lengths == [8] * 6


def test_what_was_found_is_forgotten_with_the_model() -> None:
    import gc
    hf, n = ZOO["llama"](), len(hf_interface._COMPARED)
    with attach(hf): pass
    assert len(hf_interface._COMPARED) == n + 1
    del hf
    gc.collect()
    assert len(hf_interface._COMPARED) <= n


def test_the_check_leaves_no_trace() -> None:
    hf, calls = ZOO["gemma2"](), []
    layer = hf.model.layers[0]
    first = layer.register_forward_hook(lambda *a: calls.append("first"))
    layer.register_forward_pre_hook(lambda *a: calls.append("before"))
    layer.register_forward_hook(lambda *a: calls.append("second"))
    state = torch.random.get_rng_state()
    with torch.inference_mode(), ll.capture(hf, ll.Entropy()) as seen:
        assert not calls and torch.equal(torch.random.get_rng_state(), state)
        hf(token_ids(20))
    assert calls == ["before", "first", "second"]
    assert seen.frame("entropy")["sample"].max() == 0
    first.remove()
    hf(token_ids(20)).logits.sum().backward()  # nothing made under inference mode is left
    assert calls[3:] == ["before", "second"]


def test_interventions_do_not_count_as_a_difference() -> None:
    hf = ZOO["llama"]()
    with torch.no_grad():
        plain = hf(token_ids(20)).logits
        with ll.temperature(hf, 3.0): hot = hf(token_ids(20)).logits
        with ll.temperature(hf, 1.0): same = hf(token_ids(20)).logits
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    assert (hot - plain).abs().max() > .1
    again = ZOO["llama"]()

    class Fail:
        def record(self, module: Any, op: Any) -> None: raise AssertionError("recorded")
        def before(self, call: Any) -> Any: raise AssertionError("changed")
        def after(self, call: Any, out: Any) -> Any: raise AssertionError("changed")
    with hf_interface.recording(again, Fail()), hf_interface.editing(again, again.model.layers[0].self_attn, Fail()), attach(again): pass


def test_half_precision_and_weights_elsewhere() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with attach(ZOO["gemma2"]().to(dtype)): pass
    with attach(ZOO["llama"]().to("meta")): pass


def test_autocast_does_not_reach_the_check() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), attach(ZOO["llama"]()): pass


# ---- holes

def masks(*zeros: int) -> torch.Tensor:
    keep = torch.ones(2, 30, dtype=torch.long)
    keep[1, list(zeros)] = 0
    return keep


@torch.no_grad()
def test_a_hole_in_a_mask_is_refused_where_something_records_or_changes() -> None:
    hf, ids, keep = ZOO["llama"](), token_ids(30, batch=2), masks(0, 12, 13)
    want = hf(ids, attention_mask=keep).logits
    with attach(hf): got = hf(ids, attention_mask=keep).logits
    torch.testing.assert_close(got[keep.bool()], want[keep.bool()], atol=1e-4, rtol=1e-4)
    text = r"mask of sample 1 has a hole at position 12.*Cut these tokens out.*scale_spans"
    with pytest.raises(UnsupportedModel, match=text), ll.capture(hf, ll.Entropy()): hf(ids, attention_mask=keep)
    with pytest.raises(UnsupportedModel, match=text), ll.temperature(hf, 2.0): hf(ids, attention_mask=keep)
    assert not attachments()


@torch.no_grad()
@pytest.mark.parametrize("zeros", [(0, 1), (28, 29), (0, 29), tuple(range(30))])
def test_padding_at_the_ends_is_no_hole(zeros: tuple[int, ...]) -> None:
    hf = ZOO["llama"]()
    with ll.capture(hf, ll.Entropy()) as seen: hf(token_ids(30, batch=2), attention_mask=masks(*zeros))
    assert len(seen.frame("entropy"))


@torch.no_grad()
def test_a_hole_that_a_sliding_cache_has_dropped_is_still_a_hole() -> None:
    from transformers import DynamicCache
    hf, ids = ZOO["mistral"](), token_ids(30, batch=2)
    cache = DynamicCache(config=hf.config)
    hf(ids[:, :25], attention_mask=masks(3)[:, :25], past_key_values=cache)
    with pytest.raises(UnsupportedModel, match="hole at position 3"), ll.capture(hf, ll.Entropy()):
        hf(ids[:, 25:], attention_mask=masks(3), past_key_values=cache)
