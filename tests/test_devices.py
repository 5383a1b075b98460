"""Layers on several devices, and weights elsewhere, as far as a machine with one CPU can tell: two devices are played, disks are real."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from matrix import off
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import longlens as ll

CPU = torch.device("cpu")
MIXES = (Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_)    # may read from the CPU, on real devices too


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor): yield x
    elif isinstance(x, (list, tuple)):
        for y in x: yield from tensors(y)
    elif isinstance(x, dict):
        for y in x.values(): yield from tensors(y)


class Played(TorchFunctionMode):
    "Tensors say that they are on a device where they were put, and operations on tensors of two devices are errors, as on real ones"

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[int, tuple[weakref.ref, torch.device]] = {}
        self.moved = 0

    def of(self, x: Tensor) -> torch.device:
        found = self.where.get(id(x))
        return found[1] if found and found[0]() is x else CPU

    def put(self, x: Any, device: torch.device) -> Any:
        for t in tensors(x): self.where[id(t)] = weakref.ref(t), device
        return x

    def target(self, func: Callable, args: tuple, kwargs: dict) -> torch.device | None:
        "The device that a call names, if it names one"
        if func is Tensor.cpu: return CPU
        if (asked := kwargs.get("device")) is not None: return torch.device(asked)
        if func is not Tensor.to: return None
        if isinstance(args[1] if len(args) > 1 else None, Tensor): return self.of(args[1])
        return next((torch.device(a) for a in args[1:] if isinstance(a, (torch.device, str))), None)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__: return self.of(args[0])
        if func in (Tensor.is_cuda.__get__, Tensor.is_meta.__get__): return False
        given, device = list(tensors((args, kwargs))), self.target(func, args, kwargs)
        real = {k: v for k, v in kwargs.items() if k != "device"}
        if func is Tensor.to and device is not None:
            rest = [a for a in args[1:] if not isinstance(a, (torch.device, str))]
            out = func(args[0], *rest, **real) if rest or set(real) - {"non_blocking"} else args[0].view_as(args[0])
            self.moved += device != self.of(args[0])
            return self.put(out if out is not args[0] else out.view_as(out), device)
        places = {self.of(t) for t in given if t.ndim or self.of(t) != CPU}
        if func in MIXES: places = {self.of(args[0])}
        if len(places) > 1 and device is None and "__get__" not in getattr(func, "__qualname__", ""):
            name = getattr(func, "__name__", func)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, places))}")
        out = func(*args, **(real if device is not None else kwargs))
        place = device or next(iter(places), CPU)
        return out if place == CPU and not given else self.put(out, place)


@contextmanager
def on_two_devices(hf: nn.Module) -> Iterator[Played]:
    "The first half of a Llama on one played device, the second on another; what goes over is moved as accelerate moves it"
    from accelerate.utils import send_to_device
    devices, hooks = [torch.device("xpu", i) for i in (0, 1)], []
    with Played() as mode:
        for name, m in hf.named_modules():
            device = devices[int(".layers.1" in f".{name}" or name in ("lm_head", "model.norm"))]
            for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)): mode.put(t, device)
            if name in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head", "model.rotary_emb"):
                def move(m: nn.Module, args: tuple, kw: dict, device: torch.device = device) -> tuple:
                    return send_to_device(args, device), send_to_device(kw, device)
                move.__module__ = "accelerate.hooks"    # whose hooks longlens leaves on where it compares
                hooks.append(m.register_forward_pre_hook(move, with_kwargs=True, prepend=True))
        try: yield mode
        finally:
            for h in hooks: h.remove()


STATISTICS = (ll.Entropy(), ll.Support(), ll.SinkMass(2), ll.Distance(), ll.Received(), ll.ValueNorm(), ll.ResidualNorm(),
              ll.Rows(queries=[7, 20], top=3), ll.SpanMass({"a": (2, 9)}))


@torch.no_grad()
def measured(hf: Any, padded: bool, chunks: bool) -> dict[str, Any]:
    ids = zoo.token_ids(30, batch=2)
    keep = torch.ones_like(ids)
    if padded: keep[0, :5] = 0
    with ll.capture(hf, *STATISTICS) as seen:
        if chunks:
            first = hf(ids[:, :18], attention_mask=keep[:, :18], use_cache=True)
            hf(ids[:, 18:], attention_mask=keep, past_key_values=first.past_key_values)
        else: hf(ids, attention_mask=keep, use_cache=False)
    return seen.frames


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("chunks", [False, True], ids=["at once", "in chunks"])
def test_layers_on_two_devices(padded: bool, chunks: bool) -> None:
    "The same numbers, and no operation that mixes devices"
    pytest.importorskip("accelerate")
    want, hf = measured(zoo.ZOO["llama"](), padded, chunks), zoo.ZOO["llama"]()
    with on_two_devices(hf) as mode: got = measured(hf, padded, chunks)
    assert mode.moved > 3
    for name, frame in want.items():
        for a, b in zip(got[name], frame, strict=True):
            if b.dtype.is_numeric(): assert off(a.to_torch().double().nan_to_num(), b.to_torch().double().nan_to_num()) < 1e-4
            else: assert a.equals(b)


def test_a_mix_of_devices_is_an_error_here_too() -> None:
    with Played() as mode:
        a, b = torch.ones(3).to("xpu:0"), torch.ones(3).to(torch.device("xpu", 1))
        assert a.device != b.device and (a + 1).device == a.device and torch.zeros(2, device=a.device).device == a.device
        with pytest.raises(RuntimeError, match="same device"): a + b
        assert (a + b.to(a.device)).device == a.device and mode.moved == 3
