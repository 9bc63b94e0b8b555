"""The models that are compared: config.json of each, shapes of its tensors. Weights are random: no speed here depends on their values."""

COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "use_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
}

MODELS = {
    # ERNIE-4.5-0.3B: 360.7 million weights.
    "D": COMMON | {
        "architectures": ["Ernie4_5ForCausalLM"],
        "model_type": "ernie4_5",
        "vocab_size": 103424,
        "num_hidden_layers": 18,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    # A mixture of experts that fits beside every peer: 663 million weights, of which a token meets 144 million.
    "M": COMMON | {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "vocab_size": 32768,
        "num_hidden_layers": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "moe_num_experts": 32,
        "moe_intermediate_size": 512,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 11,
        "moe_layer_interval": 1,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
    },
}

# Of equal sizes, for a peer that cannot read ERNIE's: the names of the tensors are the same, only the pairs that a rotation turns differ.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}


def llama_standin(config):
    if "moe_num_experts" in config:
        raise ValueError("a mixture of experts has no Llama of equal sizes")
    return {key: value for key, value in config.items() if key != "use_bias"} | LLAMA


def tensors(config):
    """Name, shape and dtype of each tensor, as the released checkpoints have them."""
    h, d = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d

    def swiglu(prefix, width):
        yield f"{prefix}.gate_proj.weight", (width, h), "BF16"
        yield f"{prefix}.up_proj.weight", (width, h), "BF16"
        yield f"{prefix}.down_proj.weight", (h, width), "BF16"

    yield "model.embed_tokens.weight", (config["vocab_size"], h), "BF16"
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (h,), "BF16"
        yield f"{prefix}.post_attention_layernorm.weight", (h,), "BF16"
        for projection, shape in ("q_proj", (q, h)), ("k_proj", (kv, h)), ("v_proj", (kv, h)), ("o_proj", (h, q)):
            yield f"{prefix}.self_attn.{projection}.weight", shape, "BF16"
        if layer < config.get("moe_layer_start_index", config["num_hidden_layers"]):
            yield from swiglu(f"{prefix}.mlp", config["intermediate_size"])
            continue
        experts, width = config["moe_num_experts"], config["moe_intermediate_size"]
        yield f"{prefix}.mlp.gate.weight", (experts, h), "F32"
        yield f"{prefix}.mlp.moe_statics.e_score_correction_bias", (1, experts), "F32"
        for expert in range(experts):
            yield from swiglu(f"{prefix}.mlp.experts.{expert}", width)
        yield from swiglu(f"{prefix}.mlp.shared_experts", width * config["moe_num_shared_experts"])
    yield "model.norm.weight", (h,), "BF16"
