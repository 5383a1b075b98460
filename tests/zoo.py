"""Small random models, one for each attention feature that a probe can meet.

Every model has 2 to 4 layers, a vocabulary of 128 tokens, at least 512 positions and seeded float32 weights.
The weights are scaled up so that attention is peaked (a fresh initialisation attends almost uniformly,
and a test on it would pass with a wrong mask); windows are 8 to 16 tokens, so that short inputs cross them.

    from zoo import ZOO, CAUSAL, zoo_model, token_ids
    model = ZOO["gemma2"]()              # a fresh transformers.PreTrainedModel on the CPU, in eval mode
    ids = token_ids(40, batch=2)         # seeded ids, (2, 40)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

VOCAB, WIDTH, HEADS, KV_HEADS, LAYERS, POSITIONS = 128, 64, 4, 2, 2, 512
SEED = 1234


def _build(config, auto: str = "AutoModelForCausalLM", qk_norm: float | None = None) -> PreTrainedModel:
    """A seeded model from `config`; `qk_norm`: where queries and keys are normalised, the weight of that norm."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for pname, p in model.named_parameters():
                if pname.endswith("sinks"):
                    p.normal_(0.0, 1.5)  # learned sinks start empty: give them real mass
                elif pname.endswith("bias") and p.ndim == 1:
                    p.normal_(0.0, 0.1)  # biases start at zero, which would hide a bias that is left out
                elif qk_norm is not None and "_norm.weight" in pname and ("q_norm" in pname or "k_norm" in pname):
                    p.normal_(qk_norm, 0.2)
    return model.eval()


def _base(**kw) -> dict:
    """The settings that most decoder configs share."""
    d = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=POSITIONS,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )
    return d | kw


def gpt2() -> PreTrainedModel:
    """Learned positions, fused qkv (`Conv1D`), no grouped heads."""
    from transformers import GPT2Config

    return _build(GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))


def llama() -> PreTrainedModel:
    """Rotary positions and grouped-query heads: the plain case."""
    from transformers import LlamaConfig

    return _build(LlamaConfig(**_base()))


def mistral() -> PreTrainedModel:
    """A sliding window of 8 tokens in every layer."""
    from transformers import MistralConfig

    return _build(MistralConfig(**_base(sliding_window=8, head_dim=16)))


def qwen3() -> PreTrainedModel:
    """Queries and keys normalised per head, and a head size that is not width / heads."""
    from transformers import Qwen3Config

    return _build(Qwen3Config(**_base(head_dim=24)), qk_norm=1.6)


def gemma2() -> PreTrainedModel:
    """Soft-capped attention logits, windows in every other layer, a query scale of its own."""
    from transformers import Gemma2Config

    return _build(Gemma2Config(**_base(
        head_dim=16, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=30.0,
        query_pre_attn_scalar=12, num_hidden_layers=4,
    )))


def gemma3() -> PreTrainedModel:
    """Local and global layers with different rotary bases, windows of 12 tokens."""
    from transformers import Gemma3TextConfig

    return _build(Gemma3TextConfig(**_base(
        head_dim=16, sliding_window=12, query_pre_attn_scalar=16, num_hidden_layers=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )), qk_norm=0.6)  # gemma adds one to it


def gpt_oss() -> PreTrainedModel:
    """Learned sinks (rows sum to less than one), windows in every other layer, a mixture of experts."""
    from transformers import GptOssConfig

    return _build(GptOssConfig(**_base(
        head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=4,
        rope_parameters=dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0,
                             truncate=False, original_max_position_embeddings=POSITIONS // 4),
    )))


def phi3() -> PreTrainedModel:
    """Fused qkv and rotary positions on part of each head."""
    from transformers import Phi3Config

    return _build(Phi3Config(**_base(
        sliding_window=None, original_max_position_embeddings=POSITIONS, partial_rotary_factor=0.5,
        resid_pdrop=0.0, embd_pdrop=0.0,
    )))


def gpt_neox() -> PreTrainedModel:
    """Partial rotary positions, parallel residual, fused interleaved qkv."""
    from transformers import GPTNeoXConfig

    kw = _base()
    del kw["num_key_value_heads"]
    return _build(GPTNeoXConfig(**kw, rotary_pct=0.25))


def opt() -> PreTrainedModel:
    """Learned positions counted from the attention mask, with an offset of two."""
    from transformers import OPTConfig

    return _build(OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS, init_std=0.2, word_embed_proj_dim=WIDTH, dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))


def mixtral() -> PreTrainedModel:
    """A sparse mixture of experts, no window."""
    from transformers import MixtralConfig

    return _build(MixtralConfig(**_base(
        num_local_experts=4, num_experts_per_tok=2, sliding_window=None, head_dim=16,
    )))


def deepseek_v3() -> PreTrainedModel:
    """Multi-head latent attention: queries and keys are wider than the values."""
    from transformers import DeepseekV3Config

    return _build(DeepseekV3Config(**_base(
        num_key_value_heads=HEADS, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    )))


def bert() -> PreTrainedModel:
    """A bidirectional encoder with learned positions."""
    from transformers import BertConfig

    return _build(BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=POSITIONS, initializer_range=0.2, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ), auto="AutoModel")


def modernbert() -> PreTrainedModel:
    """A bidirectional encoder with rotary positions and two-sided windows of 16 tokens (8 each way)."""
    from transformers import ModernBertConfig

    return _build(ModernBertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=HEADS, max_position_embeddings=POSITIONS, initializer_range=0.2,
        local_attention=16, global_attn_every_n_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, reference_compile=False,
    ), auto="AutoModel")


ZOO: dict[str, Callable[[], PreTrainedModel]] = dict(
    gpt2=gpt2, llama=llama, mistral=mistral, qwen3=qwen3, gemma2=gemma2, gemma3=gemma3, gpt_oss=gpt_oss, phi3=phi3,
    gpt_neox=gpt_neox, opt=opt, mixtral=mixtral, deepseek_v3=deepseek_v3, bert=bert, modernbert=modernbert,
)
ENCODERS = ("bert", "modernbert")
CAUSAL = tuple(name for name in ZOO if name not in ENCODERS)


@functools.cache
def zoo_model(name: str) -> PreTrainedModel:
    """The shared copy of a zoo model: for tests that only read it."""
    return ZOO[name]()


def token_ids(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Seeded random token ids without the special ones, (batch, n)."""
    return torch.randint(3, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))
