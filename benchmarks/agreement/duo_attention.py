"""DuoAttention (mit-han-lab/duo-attention, arXiv 2410.10819): its training forward, its loss and the gradient of it, its choice of heads.

python benchmarks/agreement/duo_attention.py --repo CHECKOUT
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from common import Comparison, apart, arguments, commit_of, functions, smollm2

LLAMA, STREAM, UTILS, LOSS = "duo_attn/patch/llama.py", "duo_attn/patch/streaming_attn.py", "duo_attn/utils.py", "duo_attn/loss.py"
TOKENS, SINK, RECENT = 1900, 64, 128


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, dropout_p: float) -> torch.Tensor:
    "flash_attn_func's result, by PyTorch"
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)


def two_way(repo: Any, lm: Any, gates: torch.Tensor, n: int) -> None:
    "Put their forward into every attention layer of the model, as enable_llama_duo_attention_training does"
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    stream = functions(repo / STREAM, "generate_streaming_mask", "streaming_attn_sdpa", torch=torch)
    forward = functions(
        repo / LLAMA,
        "llama_duo_attention_forward_two_way",
        torch=torch,
        apply_rotary_pos_emb=apply_rotary_pos_emb,
        change=[("return attn_output, attn_weights, past_key_value", "return attn_output, attn_weights")],
    )
    mask = stream.generate_streaming_mask(n, SINK, RECENT, "cpu")
    for layer, gate in zip(lm.hf.model.layers, gates, strict=True):
        s = layer.self_attn
        s.num_heads, s.num_key_value_heads, s.hidden_size = lm.n_heads, lm.n_kv_heads, lm.hf.config.hidden_size
        vars(s).update(
            rotary_emb=lm.hf.model.rotary_emb,
            full_attn_func=full,
            streaming_attn_func=stream.streaming_attn_sdpa,
            streaming_mask=mask,
            full_attention_heads=gate,
        )
        s.forward = MethodType(forward.llama_duo_attention_forward_two_way, s)


def main() -> None:
    from longlens.probes.heads.duo_gates import GateSettings, _frozen, _gate_loss, _passkey_text
    from longlens.probes.heads.patterns import choose, read_duo

    a = arguments(__doc__, "mit-han-lab/duo-attention")
    lm = smollm2(a)
    ids, at = _passkey_text(lm, TOKENS, seed=0)
    asked = torch.arange(int(at[0]) - 20, len(ids))  # as theirs: from the first question on, questions and answers
    gates = torch.rand(lm.n_layers, lm.n_kv_heads, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    settings = GateSettings(sink=SINK, recent=RECENT)
    with _frozen(lm):
        parts = _gate_loss(lm, gates, (ids, asked + 1), settings)  # longlens looks at the states in front of the tokens it is given
        (gradient,) = torch.autograd.grad(sum(parts), [gates])
        usual, _ = _gate_loss(lm, gates.detach(), (ids, at), settings)
        two_way(a.repo, lm, gates, len(ids))
        states = lm.hf.model(ids[None].repeat(2, 1), use_cache=False).last_hidden_state
        distil = (states[0, asked] - states[1, asked]).float().pow(2).mean(-1).sum() / len(asked)
        penalty = settings.penalty * functions(a.repo / LOSS, "l1_loss").l1_loss(torch.cat(list(gates)).float())
        (wanted,) = torch.autograd.grad(distil + penalty, [gates])
    c = Comparison(
        "duo_attention",
        "DuoAttention",
        f"mit-han-lab/duo-attention at {commit_of(a.repo)}, `{LLAMA}`, `{STREAM}`, `{LOSS}`, `{UTILS}`",
        "`llama_duo_attention_forward_two_way` in every attention layer of SmolLM2, with its mask and `streaming_attn_sdpa`; PyTorch's "
        "attention in place of flash-attn; the lines of `train.py` that make the loss are written again.",
    )
    on = f"passkeys, {len(ids)} tokens, the last {len(asked)} of them labelled; random gates, sink {SINK}, recent {RECENT}"
    c.add("distillation loss", on, f"{distil:.6f}", f"{parts[0]:.6f}", apart(distil.item(), parts[0].item()))
    c.add("penalty", on, f"{penalty:.6f}", f"{parts[1]:.6f}", apart(penalty.item(), parts[1].item()))
    c.add(
        "distillation loss with the labels of each",
        on.replace(f"the last {len(asked)} of them", "some"),
        f"{distil:.6f}",
        f"{usual:.6f}",
        apart(distil.item(), usual.item()),
        "by design: the code labels questions, answers and what stands between them, and compares the states at these "
        f"tokens; longlens takes the states in front of the {len(at)} tokens of the passkeys, from which they are foretold",
    )
    c.add(
        "gradient of the loss by every gate",
        on,
        f"largest {wanted.abs().max():.6f}",
        f"largest {gradient.abs().max():.6f}",
        apart(wanted, gradient),
    )
    sparsify = functions(a.repo / UTILS, "sparsify_attention_heads", np=np).sparsify_attention_heads
    for folder in sorted((a.repo / "attn_patterns").glob("*/*")):
        pattern = read_duo(folder)
        for share in (0.5, 0.75):
            np.random.seed(42)
            heads, _ = sparsify(pattern.array.copy(), sparsity=share)
            mine = choose(pattern, sparsity=share)["full"].to_numpy().reshape(heads.shape)
            c.add(
                f"heads with the whole cache, {share:.0%} without",
                f"the published gates of {folder.parent.name}",
                f"{heads.sum():.0f} heads",
                f"{mine.sum()} heads",
                f"{(mine != (heads > 0)).sum()} of {mine.size} differ",
            )
    c.not_run.append(
        "the training itself, 2,000 steps on texts of up to 32,000 tokens, which takes GPUs: loss and gradient of a step are compared"
    )
    c.write()


if __name__ == "__main__":
    main()
