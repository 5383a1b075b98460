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
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return d | kw


def gpt2() -> PreTrainedModel:
    """Learned positions, fused qkv (`Conv1D`), no grouped heads."""
    from transformers import GPT2Config

    return _build(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=POSITIONS,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


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

    return _build(
        Gemma2Config(
            **_base(
                head_dim=16,
                sliding_window=8,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=30.0,
                query_pre_attn_scalar=12,
                num_hidden_layers=4,
            )
        )
    )


def gemma3() -> PreTrainedModel:
    """Local and global layers with different rotary bases, windows of 12 tokens."""
    from transformers import Gemma3TextConfig

    return _build(
        Gemma3TextConfig(
            **_base(
                head_dim=16,
                sliding_window=12,
                query_pre_attn_scalar=16,
                num_hidden_layers=4,
                layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            )
        ),
        qk_norm=0.6,
    )  # gemma adds one to it


def gpt_oss() -> PreTrainedModel:
    """Learned sinks (rows sum to less than one), windows in every other layer, a mixture of experts."""
    from transformers import GptOssConfig

    return _build(
        GptOssConfig(
            **_base(
                head_dim=16,
                sliding_window=8,
                num_local_experts=4,
                num_experts_per_tok=2,
                num_hidden_layers=4,
                rope_parameters=dict(
                    rope_type="yarn",
                    rope_theta=10_000.0,
                    factor=4.0,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    truncate=False,
                    original_max_position_embeddings=POSITIONS // 4,
                ),
            )
        )
    )


def phi3() -> PreTrainedModel:
    """Fused qkv and rotary positions on part of each head."""
    from transformers import Phi3Config

    return _build(
        Phi3Config(
            **_base(
                sliding_window=None,
                original_max_position_embeddings=POSITIONS,
                partial_rotary_factor=0.5,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
            )
        )
    )


def gpt_neox() -> PreTrainedModel:
    """Partial rotary positions, parallel residual, fused interleaved qkv."""
    from transformers import GPTNeoXConfig

    kw = _base()
    del kw["num_key_value_heads"]
    return _build(GPTNeoXConfig(**kw, rotary_pct=0.25))


def opt() -> PreTrainedModel:
    """Learned positions counted from the attention mask, with an offset of two."""
    from transformers import OPTConfig

    return _build(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            ffn_dim=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            init_std=0.2,
            word_embed_proj_dim=WIDTH,
            dropout=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def mixtral() -> PreTrainedModel:
    """A sparse mixture of experts, no window."""
    from transformers import MixtralConfig

    return _build(
        MixtralConfig(
            **_base(
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=None,
                head_dim=16,
            )
        )
    )


def deepseek_v3() -> PreTrainedModel:
    """Multi-head latent attention: queries and keys are wider than the values."""
    from transformers import DeepseekV3Config

    return _build(
        DeepseekV3Config(
            **_base(
                num_key_value_heads=HEADS,
                moe_intermediate_size=32,
                n_routed_experts=4,
                n_shared_experts=1,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                kv_lora_rank=32,
                q_lora_rank=32,
                qk_rope_head_dim=8,
                qk_nope_head_dim=16,
                v_head_dim=16,
            )
        )
    )


def bert() -> PreTrainedModel:
    """A bidirectional encoder with learned positions."""
    from transformers import BertConfig

    return _build(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,
            pad_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        auto="AutoModel",
    )


def modernbert() -> PreTrainedModel:
    """A bidirectional encoder with rotary positions and two-sided windows of 16 tokens (8 each way)."""
    from transformers import ModernBertConfig

    return _build(
        ModernBertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,
            local_attention=16,
            global_attn_every_n_layers=3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            reference_compile=False,
        ),
        auto="AutoModel",
    )


ZOO: dict[str, Callable[[], PreTrainedModel]] = dict(
    gpt2=gpt2,
    llama=llama,
    mistral=mistral,
    qwen3=qwen3,
    gemma2=gemma2,
    gemma3=gemma3,
    gpt_oss=gpt_oss,
    phi3=phi3,
    gpt_neox=gpt_neox,
    opt=opt,
    mixtral=mixtral,
    deepseek_v3=deepseek_v3,
    bert=bert,
    modernbert=modernbert,
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


# ---- more of what people load in 2026: for the matrix (tests/matrix.py), which tries every feature on every model

PAIRS = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
LATENT = dict(num_key_value_heads=HEADS, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
EXPERTS = dict(
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
STATES = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)


def _more(name: str, **kw) -> Callable[[], PreTrainedModel]:
    "A model from the config class of that name; sizes are `_base`'s where `base` is not False"

    def make() -> PreTrainedModel:
        import transformers

        given = dict(kw)
        sizes = dict(
            max_position_embeddings=POSITIONS, n_positions=POSITIONS, max_seq_len=POSITIONS, vocab_size_per_layer_input=VOCAB
        )
        given |= {k: v for k, v in sizes.items() if k in given}  # as they are now: a probe needs words and more positions
        return _build(
            getattr(transformers, f"{name}Config")(
                **(_base(**given) if given.pop("base", True) else dict(vocab_size=VOCAB) | given)
            )
        )

    return make


MORE: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {  # name -> what is special, and what makes it
    "qwen2": ("biases on queries, keys and values", _more("Qwen2")),
    "qwen2_moe": (
        "a shared expert beside sparse ones",
        _more("Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    ),
    "qwen3_moe": (
        "sparse experts, normalised queries and keys",
        _more("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    ),
    "phi": ("partial rotary positions, parallel residual", _more("Phi", partial_rotary_factor=0.5)),
    "phimoe": ("sparse experts", _more("Phimoe", num_local_experts=4, num_experts_per_tok=2)),
    "falcon_alibi": (
        "ALiBi, one KV head",
        _more(
            "Falcon",
            base=False,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            new_decoder_architecture=False,
            multi_query=True,
            initializer_range=0.2,
        ),
    ),
    "falcon": (
        "grouped heads under names of its own",
        _more(
            "Falcon",
            base=False,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            initializer_range=0.2,
        ),
    ),
    "bloom": ("ALiBi", _more("Bloom", base=False, hidden_size=WIDTH, n_layer=2, n_head=4, initializer_range=0.2)),
    "mpt": (
        "ALiBi",
        _more("Mpt", base=False, d_model=WIDTH, n_layers=2, n_heads=4, max_seq_len=POSITIONS, initializer_range=0.2),
    ),
    "gptj": (
        "rotary positions, attention of its own",
        _more("GPTJ", base=False, n_positions=POSITIONS, n_embd=WIDTH, n_layer=2, n_head=4, rotary_dim=8, initializer_range=0.2),
    ),
    "gpt_neo": (
        "local layers, attention of its own",
        _more(
            "GPTNeo",
            base=False,
            hidden_size=WIDTH,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=POSITIONS,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            initializer_range=0.2,
            attention_dropout=0,
            resid_dropout=0,
            embed_dropout=0,
        ),
    ),
    "gpt_bigcode": (
        "one KV head",
        _more(
            "GPTBigCode",
            base=False,
            n_positions=POSITIONS,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            initializer_range=0.2,
            attn_pdrop=0,
            resid_pdrop=0,
            embd_pdrop=0,
        ),
    ),
    "codegen": (
        "attention of its own",
        _more(
            "CodeGen", base=False, n_positions=POSITIONS, n_embd=WIDTH, n_layer=2, n_head=4, rotary_dim=8, initializer_range=0.2
        ),
    ),
    "stablelm": ("partial rotary positions", _more("StableLm")),
    "starcoder2": ("a window in every layer", _more("Starcoder2", sliding_window=8)),
    "olmo2": ("norms behind the layers", _more("Olmo2")),
    "olmo3": ("windows in every other layer", _more("Olmo3", num_hidden_layers=4, sliding_window=8, layer_types=PAIRS)),
    "granite": ("a scale of its own", _more("Granite", attention_multiplier=0.3)),
    "granitemoe": ("sparse experts", _more("GraniteMoe", num_local_experts=4, num_experts_per_tok=2)),
    "cohere": ("parallel residual, normalised queries", _more("Cohere", use_qk_norm=True)),
    "cohere2": (
        "windows, and layers without positions",
        _more("Cohere2", num_hidden_layers=4, sliding_window=8, sliding_window_pattern=2, head_dim=16),
    ),
    "gemma": ("embeddings scaled", _more("Gemma", head_dim=16)),
    "gemma3n": (
        "keys and values shared between layers, sizes per layer",
        _more(
            "Gemma3nText",
            num_hidden_layers=4,
            head_dim=16,
            num_kv_shared_layers=2,
            layer_types=PAIRS,
            sliding_window=12,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=16,
            activation_sparsity_pattern=[0.0] * 4,
            laurel_rank=8,
        ),
    ),
    "gemma4": (
        "head sizes that differ by layer",
        _more(
            "Gemma4Text",
            num_hidden_layers=4,
            head_dim=16,
            global_head_dim=32,
            num_kv_shared_layers=0,
            layer_types=PAIRS,
            sliding_window=12,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=0,
        ),
    ),
    "gemma4_shared": (
        "keys and values shared between layers",
        _more(
            "Gemma4Text",
            num_hidden_layers=4,
            head_dim=16,
            global_head_dim=16,
            num_kv_shared_layers=2,
            layer_types=PAIRS,
            sliding_window=12,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=16,
        ),
    ),
    "glm4": ("norms on both sides", _more("Glm4", head_dim=16)),
    "glm4_moe": (
        "sparse experts",
        _more(
            "Glm4Moe",
            head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
        ),
    ),
    "exaone4": (
        "windows, and layers without positions",
        _more("Exaone4", num_hidden_layers=4, sliding_window=8, sliding_window_pattern=2, head_dim=16),
    ),
    "smollm3": (
        "layers without positions",
        _more("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4),
    ),
    "llama4": (
        "chunked attention, layers without positions",
        _more(
            "Llama4Text",
            num_hidden_layers=4,
            head_dim=16,
            intermediate_size_mlp=128,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=16,
            no_rope_layers=[1, 1, 1, 0],
            interleave_moe_layer_step=2,
        ),
    ),
    "deepseek_v2": ("latent attention", _more("DeepseekV2", **EXPERTS, **LATENT, head_dim=8)),
    "deepseek_v32": (
        "latent attention with a sparse indexer",
        _more("DeepseekV32", **EXPERTS, **LATENT, index_n_heads=2, index_head_dim=16, index_topk=8),
    ),
    "minicpm3": ("latent attention", _more("MiniCPM3", **LATENT)),
    "ernie4_5": ("rotary pairs side by side", _more("Ernie4_5", head_dim=16)),
    "seed_oss": ("head size of its own", _more("SeedOss", head_dim=16)),
    "hunyuan": ("norm after the rotation", _more("HunYuanDenseV1", head_dim=16)),
    "apertus": ("normalised queries and keys", _more("Apertus")),
    "arcee": ("a squared activation", _more("Arcee")),
    "nemotron": ("partial rotary positions", _more("Nemotron", partial_rotary_factor=0.5)),
    "dbrx": (
        "clipped queries, sparse experts",
        _more(
            "Dbrx",
            base=False,
            d_model=WIDTH,
            n_heads=4,
            n_layers=2,
            max_seq_len=POSITIONS,
            attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8),
            ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
        ),
    ),
    "diffllama": ("two softmax maps a layer, subtracted", _more("DiffLlama", head_dim=16)),
    "helium": ("rotary pairs side by side", _more("Helium", head_dim=16)),
    "doge": ("a mask made from values", _more("Doge")),
    "bitnet": ("norms inside the layer", _more("BitNet")),
    "persimmon": ("fused queries, keys and values", _more("Persimmon", num_key_value_heads=None)),
    "xglm": (
        "sinusoidal positions, attention of its own",
        _more(
            "XGLM",
            base=False,
            max_position_embeddings=POSITIONS,
            d_model=WIDTH,
            ffn_dim=128,
            num_layers=2,
            attention_heads=4,
            init_std=0.2,
            dropout=0,
            attention_dropout=0,
            activation_dropout=0,
        ),
    ),
    "biogpt": (
        "learned positions",
        _more(
            "BioGpt",
            base=False,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            activation_dropout=0,
            layerdrop=0,
        ),
    ),
    "jamba": (
        "state layers; attention in layers 1 and 3",
        _more(
            "Jamba",
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            use_mamba_kernels=False,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
    ),
    "bamba": (
        "state layers; attention in layers 1 and 3",
        _more("Bamba", num_hidden_layers=4, attn_layer_indices=[1, 3], **STATES),
    ),
    "qwen3_next": (
        "linear attention and output gates; softmax in layers 1 and 3",
        _more(
            "Qwen3Next",
            num_hidden_layers=4,
            head_dim=16,
            layer_types=LINEAR,
            **DELTA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
    ),
    "qwen3_5": (
        "linear attention and output gates; softmax in layers 1 and 3",
        _more("Qwen3_5Text", num_hidden_layers=4, head_dim=16, layer_types=LINEAR, **DELTA),
    ),
    "lfm2": (
        "convolutions; attention in layers 1 and 3",
        _more("Lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, block_multiple_of=16, block_ff_dim=128),
    ),
    "falcon_h1": (
        "a state stream beside the heads of every layer",
        _more(
            "FalconH1",
            head_dim=16,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=16,
        ),
    ),
    "zamba2": (
        "one attention block shared by several layers",
        _more(
            "Zamba2",
            base=False,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            num_attention_heads=4,
            num_key_value_heads=4,
            mamba_d_state=8,
            n_mamba_heads=4,
            mamba_headdim=32,
            mamba_ngroups=1,
            chunk_size=16,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,
            num_mem_blocks=1,
            use_mem_rope=True,
        ),
    ),
    "nemotron_h": (
        "state and MLP layers; attention in layers 1 and 3",
        _more(
            "NemotronH",
            num_hidden_layers=4,
            layers_block_type=["mamba", "attention", "mlp", "attention"],
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=16,
        ),
    ),
    "granite_hybrid": (
        "state layers; attention in layers 1 and 3",
        _more(
            "GraniteMoeHybrid",
            num_hidden_layers=4,
            layer_types=["mamba", "attention"] * 2,
            layers_block_type=["mamba", "attention"] * 2,
            num_local_experts=0,
            shared_intermediate_size=64,
            **STATES,
        ),
    ),
    "olmo_hybrid": (
        "linear attention; softmax in layers 1 and 3",
        _more("OlmoHybrid", num_hidden_layers=4, layer_types=LINEAR, **DELTA),
    ),
    "minimax": (
        "lightning attention; softmax in layers 1 and 3",
        _more(
            "MiniMax",
            num_hidden_layers=4,
            layer_types=LINEAR,
            num_local_experts=2,
            num_experts_per_tok=1,
            block_size=16,
            head_dim=16,
        ),
    ),
    "recurrent_gemma": (
        "recurrent layers; local attention in layer 2",
        _more(
            "RecurrentGemma",
            num_hidden_layers=3,
            lru_width=64,
            attention_window_size=16,
            block_types=["recurrent", "recurrent", "attention"],
        ),
    ),
    "vaultgemma": ("windows in every other layer", _more("VaultGemma", head_dim=16, sliding_window=8, num_hidden_layers=4)),
    "modernbert_decoder": (
        "two-sided windows turned causal",
        _more(
            "ModernBertDecoder",
            base=False,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,
            local_attention=16,
            global_attn_every_n_layers=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
    "ministral": (
        "windows in every other layer",
        _more("Ministral", num_hidden_layers=4, sliding_window=8, layer_types=PAIRS, head_dim=16),
    ),
    "flex_olmo": ("sparse experts", _more("FlexOlmo", num_experts=4, num_experts_per_tok=2)),
    "jetmoe": (
        "experts in the attention",
        _more(
            "JetMoe",
            base=False,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=16,
            intermediate_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,
        ),
    ),
    "mamba": ("no attention at all", _more("Mamba", base=False, hidden_size=WIDTH, num_hidden_layers=2, state_size=8)),
    "nanochat": ("a squared activation, soft-capped output", _more("NanoChat")),
}
EVERYTHING: dict[str, Callable[[], PreTrainedModel]] = ZOO | {name: make for name, (_, make) in MORE.items()}
