"""Trains a model directory on given batches in PyTorch and prints losses, times and memory as one line of JSON: the peers' side of
compare.py, with the same arguments and the same line as crates/ernie-train/examples/training_speed.rs.

eager, compile: the dense network written by hand as one would for speed. transformers: the released code, for mixtures of experts.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

# Ours has the same; the comparison of losses fails when it does not.
LR, BETAS, EPS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 1e-8, 0.1


def rotate(x, cos, sin):
    """Rotary positions as in ERNIE: neighbours are the pairs. `x` is [b, n, t, d], the angles are [t, d/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


class RmsNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, hidden, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(hidden, hidden) for _ in range(4))

    def forward(self, x, cos, sin):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(hidden, width), linear(hidden, width), linear(width, hidden)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, eps = c["hidden_size"], c["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(h, eps), RmsNorm(h, eps)
        self.self_attn, self.mlp = Attention(h, c["head_dim"]), Mlp(h, c["intermediate_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Twin(nn.Module):
    """Returns the mean cross-entropy. Names of modules are those of the checkpoint."""

    def __init__(self, c):
        super().__init__()
        h, d = c["hidden_size"], c["head_dim"]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c["vocab_size"], h),
            "layers": nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            "norm": RmsNorm(h, c["rms_norm_eps"]),
        })
        self.lm_head = linear(h, c["vocab_size"])
        frequencies = c["rope_parameters"]["rope_theta"] ** (-torch.arange(0, d, 2).float() / d)
        angles = torch.outer(torch.arange(c["max_position_embeddings"]).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids, targets):
        x, (cos, sin) = self.model["embed_tokens"](ids), (table[: ids.shape[1]] for table in (self.cos, self.sin))
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        return F.cross_entropy(self.lm_head(self.model["norm"](x)).flatten(0, 1), targets.flatten())


class Released(nn.Module):
    """transformers' network with the loss of the twin."""

    def __init__(self, directory, experts):
        super().__init__()
        import transformers

        transformers.logging.disable_progress_bar()
        chosen = {} if experts == "default" else {"experts_implementation": experts}
        self.network = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, **chosen)
        self.experts = self.network.config._experts_implementation

    def forward(self, ids, targets):
        logits = self.network(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load(arguments):
    if arguments.peer == "transformers":
        return Released(arguments.model, arguments.experts)
    twin = Twin(json.loads((arguments.model / "config.json").read_text(encoding="utf-8")))
    twin.load_state_dict(load_file(arguments.model / "model.safetensors"))
    return twin


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["eager", "compile", "transformers"], required=True)
    parser.add_argument("--experts", default="default", help="experts_implementation of transformers")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    for name in ("rows", "length", "warm", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clip", type=float, default=0.0)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    rss_of_imports = peak_rss_mib()
    model = load(arguments).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    loss_of = torch.compile(model) if arguments.peer == "compile" else model
    batches = numpy.memmap(arguments.ids, dtype="<u4", mode="r").reshape(-1, arguments.rows, arguments.length + 1)
    if len(batches) < arguments.warm + arguments.steps:
        parser.error(f"{arguments.ids} holds {len(batches)} batches, --warm and --steps need {arguments.warm + arguments.steps}")

    losses, seconds = [], []
    for step in range(arguments.warm + arguments.steps):
        start = time.perf_counter()
        tokens = torch.from_numpy(batches[step].astype(numpy.int64))
        loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        if arguments.clip > 0:
            torch.nn.utils.clip_grad_norm_(trained, arguments.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)

    print(json.dumps({
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": arguments.rows * arguments.length / statistics.median(seconds[arguments.warm:]),
        "peak_rss_mib": peak_rss_mib(),
        "rss_of_imports_mib": rss_of_imports,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "experts": getattr(model, "experts", None),
    }))


if __name__ == "__main__":
    main()
