"""The configurations that are compared: network, batch, how long a run is, and the arithmetic one token costs."""

from dataclasses import dataclass

VOCABULARY = 8192
HEAD_SIZE = 64


@dataclass(frozen=True)
class Experts:
    count: int
    width: int
    chosen: int
    shared: int
    first_layer: int


@dataclass(frozen=True)
class Config:
    hidden: int
    layers: int
    intermediate: int
    rows: int
    length: int
    # Steps before the timed ones, and timed steps: 15 to 25 seconds a run on two server cores of 2023.
    warm: int
    steps: int
    peers: tuple[str, ...] = ("eager", "compile")
    experts: Experts | None = None

    @property
    def heads(self):
        return self.hidden // HEAD_SIZE

    def is_moe_layer(self, layer):
        return self.experts is not None and layer >= self.experts.first_layer

    def flops_per_token(self):
        """Model arithmetic, forward and backward: 6 per parameter of the matrices a token meets (of the experts the chosen ones; the
        head, not the embedding), and per layer 3.5 times a causal forward, whose two products see half of the positions on average
        (FlashAttention-2, arXiv 2307.08691, section 4.1). What an implementation computes twice to save memory is not counted again.
        """
        parameters = self.hidden * VOCABULARY
        for layer in range(self.layers):
            parameters += 4 * self.hidden**2
            if self.is_moe_layer(layer):
                e = self.experts
                parameters += e.count * self.hidden + 3 * self.hidden * e.width * (e.chosen + e.shared)
            else:
                parameters += 3 * self.hidden * self.intermediate
        return 6 * parameters + 3.5 * 4 * (self.length / 2) * self.hidden * self.layers

    def huggingface(self):
        """config.json of the model."""
        config = {
            "architectures": ["Ernie4_5ForCausalLM"],
            "model_type": "ernie4_5",
            "dtype": "float32",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": HEAD_SIZE,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": self.length,
            "tie_word_embeddings": False,
            "use_bias": False,
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if self.experts is not None:
            config |= {
                "architectures": ["Ernie4_5_MoeForCausalLM"],
                "model_type": "ernie4_5_moe",
                "moe_num_experts": self.experts.count,
                "moe_intermediate_size": self.experts.width,
                "moe_k": self.experts.chosen,
                "moe_num_shared_experts": self.experts.shared,
                "moe_layer_start_index": self.experts.first_layer,
                "moe_layer_end_index": self.layers - 1,
                "moe_layer_interval": 1,
                "router_aux_loss_coef": 0.0,
                "output_router_logits": False,
            }
        return config


CONFIGS = {
    "S": Config(hidden=256, layers=6, intermediate=768, rows=8, length=256, warm=3, steps=27),
    "M": Config(hidden=512, layers=8, intermediate=1536, rows=4, length=512, warm=2, steps=6),
    # Written by hand, a mixture of experts would be a peer of our own making: it is transformers' that people train with.
    "E": Config(hidden=512, layers=8, intermediate=1536, rows=4, length=512, warm=2, steps=5, peers=("transformers",),
                experts=Experts(count=8, width=512, chosen=2, shared=1, first_layer=1)),
    "L": Config(hidden=512, layers=8, intermediate=1536, rows=1, length=4096, warm=1, steps=2),
}
