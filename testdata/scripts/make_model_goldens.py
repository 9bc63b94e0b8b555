"""Makes testdata/models: tiny random models and what the reference implementation computes for them.

Versions: Python 3.11, torch 2.15.0, transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6 (requirements.txt). CPU, one thread,
float32, eager attention and experts, deterministic. See testdata/README.md for the files.

    python testdata/scripts/make_model_goldens.py [NAME …]     # no name: everything

Weights are random with a standard deviation far above a usual initialisation, so that logits are not flat. A seed is taken only if no
discrete choice hangs on rounding: greedy tokens win by a margin, the router's last chosen expert leads the first rejected one by a gap
(also through ten training steps), and the same run in (mostly) float64 gives the same numbers to well below the tests' tolerances.
"""

import copy
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as moe_code

MODELS = Path(__file__).resolve().parent.parent / "models"
BATCH, LENGTH, PROMPT, NEW_TOKENS, STEPS = 2, 23, 6, 24, 10
DOCUMENTS = [8, 1, 14]  # lengths of the packed row's documents; one has nothing to predict
IGNORE = -100
ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
MTP_LAMBDA = 0.1
TOKEN_MARGIN, ROUTER_GAP, GATE_GAP = 5e-3, 5e-5, 2e-5
ROUTER_GAPS = {"moe_k6": 2e-5, "moe_gated_paragraphs": 2e-5}  # 16 scores around 30 lie close; one step of float32 there is 1.9e-6
CORRECTION_BIAS = ".moe_statics.e_score_correction_bias"

DENSE = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True)
MOE = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
           head_dim=8, max_position_embeddings=256, tie_word_embeddings=True, moe_intermediate_size=12, moe_num_experts=8, moe_k=2,
           moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1,
           router_aux_loss_coef=0.0, output_router_logits=False)
CONFIGS = {
    "dense_tied": DENSE,
    # Nothing is a multiple of anything; head_dim is not hidden_size / heads.
    "dense_untied_gqa": DENSE | dict(hidden_size=36, intermediate_size=50, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                                     num_hidden_layers=3, tie_word_embeddings=False),
    "dense_bias_mqa": DENSE | dict(use_bias=True, num_attention_heads=3, num_key_value_heads=1, head_dim=10, rope_theta=10000.0),
    "moe_k2": MOE,
    "moe_k3_no_shared": MOE | dict(moe_k=3, moe_num_experts=12, moe_num_shared_experts=0, moe_layer_start_index=2, num_hidden_layers=4,
                                   tie_word_embeddings=False, moe_intermediate_size=10),
    "moe_k6": MOE | dict(moe_k=6, moe_num_experts=16, moe_intermediate_size=8, head_dim=None),
    "moe_interval2": MOE | dict(num_hidden_layers=6, moe_layer_interval=2, moe_layer_end_index=4, intermediate_size=24),
    "moe_bias_mqa": MOE | dict(use_bias=True, num_key_value_heads=1, moe_num_shared_experts=1),
    "moe_odd": MOE | dict(vocab_size=103, hidden_size=36, intermediate_size=50, head_dim=10, num_attention_heads=6, num_key_value_heads=3,
                          moe_num_experts=5, moe_intermediate_size=7, moe_num_shared_experts=1, moe_layer_start_index=0,
                          tie_word_embeddings=False),
    "moe_mtp": MOE | dict(num_hidden_layers=2, num_nextn_predict_layers=1),
    # Mechanisms that the released models do not have, under the key of our own.
    "dense_local": DENSE | dict(num_key_value_heads=2, num_hidden_layers=3, ernie_rs={
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 5}),
    "moe_local": MOE | dict(ernie_rs={"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 3}),
    "dense_gated": DENSE | dict(num_key_value_heads=2, ernie_rs={"context_gate": {"threshold": 0.5}}),
    "moe_gated_local": MOE | dict(num_hidden_layers=2, ernie_rs={
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "context_gate": {"threshold": 0.4}}),
    # Paragraphs have 32 tokens at least, so these rows are longer (LENGTHS).
    "dense_paragraphs": DENSE | dict(num_key_value_heads=2, num_hidden_layers=3, ernie_rs={
        "layer_types": ["sliding_attention", "paragraph_attention", "paragraph_attention"], "sliding_window": 5,
        "paragraphs": {"end_tokens": list(range(10, 25)), "min_tokens": 32, "max_tokens": 40}}),
    "moe_gated_paragraphs": MOE | dict(ernie_rs={
        "layer_types": ["full_attention", "paragraph_attention", "sliding_attention"], "sliding_window": 4,
        "paragraphs": {"end_tokens": [7, 70], "min_tokens": 33, "max_tokens": 45}, "context_gate": {"threshold": 0.4}}),
}
# Length of the rows and of the prompt, and of the packed row's documents, where they are not the usual ones.
LENGTHS = {"dense_paragraphs": (90, 70, [37, 1, 52]), "moe_gated_paragraphs": (80, 66, [79, 1])}
PACKED_GRADIENTS = {"dense_untied_gqa", "moe_k2"}


class Rejected(Exception):
    """The seed makes a golden on which rounding could decide."""


def require(condition, message):
    if not condition:
        raise Rejected(message)


# ---------------------------------------------------------------------------------------------------------------- models


class Mtp(torch.nn.Module):
    """Multi-token prediction, depth 1, which transformers leaves out. Input i combines embed(token i+1) with h_i; predicts token i+2.

    x = W[2H→H]·concat(norm_e(embed(t+1)), norm_h(h)), h after the model's final norm; one dense decoder block, causal, positions from 0;
    then the shared final norm and the shared head.
    """

    def __init__(self, config):
        super().__init__()
        one = torch.nn.ModuleList
        self.mtp_emb_norm = one([moe_code.Ernie4_5_MoeRMSNorm(config.hidden_size, config.rms_norm_eps)])
        self.mtp_hidden_norm = one([moe_code.Ernie4_5_MoeRMSNorm(config.hidden_size, config.rms_norm_eps)])
        self.mtp_linear_proj = one([torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.use_bias)])
        dense = copy.deepcopy(config)
        dense.moe_layer_start_index = config.num_hidden_layers  # so that layer 0 is dense whatever the model's rule
        self.mtp_block = one([moe_code.Ernie4_5_MoeDecoderLayer(dense, 0)])

    def forward(self, model, hidden, next_ids):
        e, h = self.mtp_emb_norm[0](model.model.embed_tokens(next_ids)), self.mtp_hidden_norm[0](hidden)
        x = self.mtp_linear_proj[0](torch.cat([e, h], -1))
        t = x.shape[1]
        rope = model.model.rotary_emb(x, torch.arange(t)[None])
        mask = torch.full((t, t), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
        x = self.mtp_block[0](x, attention_mask=mask, position_embeddings=rope)
        return model.lm_head(model.model.norm(x))


class ContextGate(torch.nn.Module):
    """Gates over heads: d_t = 1 - cos(x_t, m_t), m_t = decay * m_(t-1) + x_t; g = sigmoid(W x + u d + b), nothing below the threshold."""

    def __init__(self, config):
        super().__init__()
        heads = config.num_attention_heads
        self.weight = torch.nn.Parameter(torch.zeros(heads, config.hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(heads))
        self.density = torch.nn.Parameter(torch.zeros(heads))
        self.decay = torch.nn.Parameter(torch.zeros(1))  # its logit
        self.threshold = config.ernie_rs["context_gate"]["threshold"]
        self.gap = float("inf")

    def forward(self, x):
        t = x.shape[1]
        back = torch.arange(t)[:, None] - torch.arange(t)[None]
        weights = torch.where(back >= 0, torch.sigmoid(self.decay) ** back.clamp(min=0), torch.zeros((), dtype=x.dtype))
        m = weights @ x
        d = 1 - F.cosine_similarity(x, m, dim=-1)
        g = torch.sigmoid(x @ self.weight.T + d[..., None] * self.density + self.bias)
        self.gap = min(self.gap, (g - self.threshold).abs().min().item())
        return g + (torch.where(g >= self.threshold, g, torch.zeros_like(g)) - g).detach()  # straight through


class ParagraphPool(torch.nn.Module):
    """Vectors that weigh the tokens of a paragraph for its summary."""

    def __init__(self, config):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(config.num_key_value_heads, config.head_dim))


def paragraphs_of(ids, rule):
    """The number of each token's paragraph."""
    numbers, number, length = [], 0, 0
    for token in ids.tolist():
        numbers.append(number)
        length += 1
        if length >= rule["max_tokens"] or length >= rule["min_tokens"] and token in rule["end_tokens"]:
            number, length = number + 1, 0
    return torch.tensor(numbers)


def paragraph_attention(self, hidden_states, position_embeddings, attention_mask=None, **_):
    """Causal attention inside a paragraph, and to one summary of each earlier one: its keys (before rotation) and values, weighted by
    softmax(u k / sqrt(d)), the key then rotated as the paragraph's last token is."""
    batch, t, _ = hidden_states.shape
    heads = lambda projection: projection(hidden_states).view(batch, t, -1, self.head_dim).transpose(1, 2)
    q, k, v = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
    (cos, sin), rotate = position_embeddings, sys.modules[type(self).__module__].apply_rotary_pos_emb
    scale, outs = self.head_dim**-0.5, []
    for row in range(batch):
        number = paragraphs_of(self.ids[row], self.rule)
        last = torch.tensor([(number == n).nonzero().max() for n in range(number.max() + 1)])
        turn = lambda x, at: rotate(x[None], x[None], cos[:1, at], sin[:1, at])[0][0]
        own = number[None] == torch.arange(len(last))[:, None]  # [paragraphs, t]
        weights = ((k[row] * self.paragraph_pool.weight[:, None]).sum(-1)[:, None] * scale).masked_fill(~own, -torch.inf).softmax(-1)
        keys = torch.cat([turn(weights @ k[row], last), turn(k[row], torch.arange(t))], 1)
        values = torch.cat([weights @ v[row], v[row]], 1)
        group = q.shape[1] // k.shape[1]
        scores = turn(q[row], torch.arange(t)) @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
        causal = torch.ones(t, t, dtype=torch.bool).tril() & (number[:, None] == number[None])
        seen = torch.cat([torch.arange(len(last))[None] < number[:, None], causal], 1)
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values.repeat_interleave(group, 0)).transpose(0, 1).flatten(1))
    return self.o_proj(torch.stack(outs)), None


def add_mechanisms(model, own):
    """What the released networks do not have, hung into transformers' own layers."""

    def narrow(_, arguments, named):
        """Attention to the last `sliding_window` tokens, the token itself included, by a narrower mask."""
        mask = named["attention_mask"]
        queries, keys = mask.shape[-2:]
        back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
        named["attention_mask"] = mask.masked_fill(back >= own["sliding_window"], torch.finfo(mask.dtype).min)
        return arguments, named

    def keep_input(attention, arguments, named):
        attention.o_proj.gates = attention.context_gate(named["hidden_states"])

    def multiply(projection, arguments):
        heads, gates = arguments[0], projection.__dict__.pop("gates")
        return (heads.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]).flatten(-2)

    def keep_ids(decoder, arguments, named):
        for layer in decoder.layers:
            layer.self_attn.ids = named["input_ids"]

    model.model.register_forward_pre_hook(keep_ids, with_kwargs=True)
    for index, layer in enumerate(model.model.layers):
        if own.get("layer_types", [])[index:index + 1] == ["sliding_attention"]:
            layer.self_attn.register_forward_pre_hook(narrow, with_kwargs=True)
        if own.get("layer_types", [])[index:index + 1] == ["paragraph_attention"]:
            layer.self_attn.paragraph_pool = ParagraphPool(model.config)
            layer.self_attn.rule = own["paragraphs"]
            layer.self_attn.forward = MethodType(paragraph_attention, layer.self_attn)
        if "context_gate" in own:
            layer.self_attn.context_gate = ContextGate(model.config)
            layer.self_attn.register_forward_pre_hook(keep_input, with_kwargs=True)
            layer.self_attn.o_proj.register_forward_pre_hook(multiply)


def gate_gap(model):
    """How near the threshold any gate has been."""
    return min([m.gap for m in model.modules() if isinstance(m, ContextGate)], default=float("inf"))


def remembers(model):
    """Whether a layer needs all of a text's states for the next token's, which transformers' cache does not keep."""
    return any(isinstance(m, (ContextGate, ParagraphPool)) for m in model.modules())


def build(settings):
    settings = {k: v for k, v in settings.items() if v is not None}
    if "rope_theta" in settings:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    moe = "moe_k" in settings
    config = (Ernie4_5_MoeConfig if moe else Ernie4_5Config)(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = (Ernie4_5_MoeForCausalLM if moe else Ernie4_5ForCausalLM)(config)
    assert model.config._attn_implementation == "eager"
    if getattr(config, "num_nextn_predict_layers", 0):
        model.mtp = Mtp(config)
    if own := getattr(config, "ernie_rs", None):
        add_mechanisms(model, own)
    return model.float().train()  # the family has no dropout


def fill(model, seed):
    """Random weights, drawn in the order of the parameters' names."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda p, mean, std: p.data.copy_(mean + std * torch.randn(p.shape, generator=g))
    for name, p in sorted(model.named_parameters()):
        if name.endswith(CORRECTION_BIAS):
            normal(p, 30.0, 0.03)  # as in the released 21B model: a large level, a small spread
        elif "norm" in name:
            normal(p, 1.0, 0.1)
        elif name.endswith(".bias"):
            normal(p, 0.0, 0.1)
        elif "embed_tokens" in name or "lm_head" in name:
            normal(p, 0.0, 0.3)
        elif name.endswith("mlp.gate.weight"):
            normal(p, 0.0, 0.1)
        elif "paragraph_pool" in name:
            normal(p, 0.0, 1.0)
        else:
            normal(p, 0.0, 0.2)
    return g


def released(tensors):
    """From the names in memory, where transformers 5 stacks the experts, to those of the released checkpoints."""
    out = {}
    for name, t in tensors.items():
        name = name.replace("mlp.gate.moe_statics", "mlp.moe_statics").replace("mtp.mtp_", "model.mtp_")
        prefix, _, stacked = name.partition(".mlp.experts.")
        if stacked == "gate_up_proj":
            for e, both in enumerate(t):
                gate, up = both.chunk(2, 0)
                out[f"{prefix}.mlp.experts.{e}.gate_proj.weight"] = gate
                out[f"{prefix}.mlp.experts.{e}.up_proj.weight"] = up
        elif stacked == "down_proj":
            for e, down in enumerate(t):
                out[f"{prefix}.mlp.experts.{e}.down_proj.weight"] = down
        else:
            assert not stacked, name
            out[name] = t
    return {n: t.detach().clone().contiguous() for n, t in out.items()}


def parameters(model):
    return released(dict(model.named_parameters()))  # tied parameters appear once


def gradients(model):
    return released({n: p.grad for n, p in model.named_parameters() if p.requires_grad})


# ------------------------------------------------------------------------------------------------------------- computing


@contextmanager
def watch_routers(model):
    """Collects, for every routed token: the gap between the last chosen and the first rejected score, the chosen experts, those
    that would be chosen without the correction bias."""
    seen = {"gap": [float("inf")], "chosen": [], "without_bias": []}

    def hook(router, _, output):
        p = F.softmax(output[0].float(), dim=1, dtype=torch.float)
        scores = router.moe_statics(p).detach()
        top = scores.sort(dim=-1, descending=True).values
        seen["gap"].append((top[:, router.top_k - 1] - top[:, router.top_k]).min().item())
        seen["chosen"] += output[2].sort(-1).values.tolist()
        seen["without_bias"] += p.topk(router.top_k, -1).indices.sort(-1).values.tolist()

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, moe_code.Ernie4_5_MoeTopKRouter)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cross_entropy(logits, targets, reduction="mean"):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction=reduction)


def forward(model, tokens):
    """Loss and its parts for tokens [batch, length + 1]."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    out = {"logits": logits, "loss": cross_entropy(logits, tokens[:, 1:])}
    if hasattr(model, "mtp"):
        out["mtp_logits"] = model.mtp(model, hidden[:, :-1], tokens[:, 1:-1])
        out["main_loss"], out["mtp_loss"] = out["loss"], cross_entropy(out["mtp_logits"], tokens[:, 2:])
        out["loss"] = out["main_loss"] + MTP_LAMBDA * out["mtp_loss"]
    return out


def loss_and_gradients(model, tokens):
    model.zero_grad(set_to_none=True)
    out = forward(model, tokens)
    out["loss"].backward()
    return {k: v.detach() for k, v in out.items()}, gradients(model)


def packed(model, row, documents):
    """Documents run apart, then laid side by side: what attention that never crosses a document must give."""
    model.zero_grad(set_to_none=True)
    targets, logits = [], []
    for document in row.split(documents):
        targets.append(torch.cat([document[1:], torch.tensor([IGNORE])]))
        logits.append(model(input_ids=document[None], use_cache=False).logits[0])
    targets, logits = torch.cat(targets), torch.cat(logits)
    loss = cross_entropy(logits, targets)
    loss.backward()
    token_losses = cross_entropy(logits, targets, reduction="none")
    for p in model.parameters():  # the MTP block takes no part here
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    return targets, logits.detach(), token_losses.detach(), loss.item(), gradients(model)


@torch.no_grad()
def greedy(model, prompt):
    ids, margins = prompt.clone(), []
    for _ in range(NEW_TOKENS):
        top = model(input_ids=ids[None], use_cache=False).logits[0, -1].topk(2)
        margins.append((top.values[0] - top.values[1]).item())
        ids = torch.cat([ids, top.indices[:1]])
    return ids[len(prompt):].tolist(), min(margins)


def train(model, tokens):
    """Losses of the steps, each before its update, and the loss after the last one. The batch is always the same."""
    model = copy.deepcopy(model)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": ADAMW["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"], foreach=False)
    losses, gap = [], float("inf")
    for step in range(STEPS + 1):
        with watch_routers(model) as seen:
            out, _ = loss_and_gradients(model, tokens)
        losses.append(out["loss"].item())
        gap = min(gap, *seen["gap"])
        if step < STEPS:
            optimizer.step()
    require(gate_gap(model) > GATE_GAP, f"a gate within {gate_gap(model)} of its threshold")
    return losses, gap


def largest_relative(a, b):
    """Largest |a-b| over the tensors, each relative to its own largest entry."""
    worst = 0.0
    for name, x in a.items():
        scale = x.abs().max().item()
        difference = (x.double() - b[name].double()).abs().max().item()
        worst = max(worst, difference / scale if scale else (0.0 if difference == 0 else float("inf")))
    return worst


def golden(model, generator, name):
    vocab = model.config.vocab_size
    # Never the padding id 0, whose embedding gets no gradient in torch, nor the ids of begin and end.
    length, prompt_length, documents = LENGTHS.get(name, (LENGTH, PROMPT, DOCUMENTS))
    tokens = torch.randint(3, vocab, (BATCH, length + 1), generator=generator)
    prompt = torch.randint(3, vocab, (prompt_length,), generator=generator)
    moe = hasattr(model.config, "moe_k")
    smallest_gap = ROUTER_GAPS.get(name, ROUTER_GAP)

    # Cheap conditions first: most seeds fail.
    with watch_routers(model) as seen:
        with torch.no_grad():
            forward(model, tokens)
        require(min(seen["gap"]) > smallest_gap, f"router gap {min(seen['gap'])}")
        new_tokens, margin = greedy(model, prompt)
        require(2 not in new_tokens and len(set(new_tokens)) >= 6, f"dull greedy tokens {new_tokens}")
        require(margin > TOKEN_MARGIN, f"greedy margin {margin}")
        targets, packed_logits, packed_losses, packed_loss, packed_grads = packed(model, tokens[0, :-1], documents)
        require(min(seen["gap"]) > smallest_gap, f"router gap {min(seen['gap'])}")
    losses, training_gap = train(model, tokens)
    require(gate_gap(model) > GATE_GAP, f"a gate within {gate_gap(model)} of its threshold")
    require(training_gap > smallest_gap, f"router gap in training {training_gap}")
    changed = sum(a != b for a, b in zip(seen["chosen"], seen["without_bias"])) / max(1, len(seen["chosen"]))
    require(not moe or changed > 0.2, f"the correction bias changes only {changed} of the choices")
    out, grads = loss_and_gradients(model, tokens)
    token_losses = cross_entropy(out["logits"], tokens[:, 1:], reduction="none").reshape(BATCH, length)
    require(losses[-1] < losses[0] - 0.05, f"training does not learn: {losses}")
    require(out["logits"].std() > 0.5, "flat logits")

    # The library's own loss and its own generation agree with the above.
    library = model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    assert abs(library - out.get("main_loss", out["loss"]).item()) < 1e-5, (library, out["loss"])
    model.eval()
    generated = model.generate(prompt[None], attention_mask=torch.ones(1, prompt_length, dtype=torch.long), do_sample=False, max_new_tokens=NEW_TOKENS,
                               use_cache=not remembers(model))
    model.train()
    assert generated[0, prompt_length:].tolist() == new_tokens

    # Well conditioned: in float64 (norms, rope and router stay in float32 inside) the same to far below the tests' tolerances.
    wide = copy.deepcopy(model).double()
    wide_out, wide_grads = loss_and_gradients(wide, tokens)
    errors = {
        "logits": (wide_out["logits"] - out["logits"]).abs().max().item(),
        "gradients": largest_relative(grads, wide_grads),
        "adamw_losses": max(abs(a - b) for a, b in zip(losses, train(wide, tokens)[0])),
    }
    require(errors["logits"] < 2e-5 and errors["gradients"] < 5e-5 and errors["adamw_losses"] < 1e-5, f"badly conditioned: {errors}")

    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = sorted(released({n: p for n, p in trainable.items() if p.ndim >= 2}))
    vectors = sorted(released({n: p for n, p in trainable.items() if p.ndim < 2}))
    assert sorted(matrices + vectors) == sorted(grads)
    record = {
        "model": name,
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "ids": tokens[:, :-1].tolist(),
        "targets": tokens[:, 1:].tolist(),
        "loss": out["loss"].item(),
        "adamw": ADAMW | {"losses": losses[:-1], "loss_after": losses[-1], "decayed": matrices, "not_decayed": vectors,
                          "frozen": sorted(set(parameters(model)) - set(grads))},
        "greedy": {"prompt": prompt.tolist(), "tokens": new_tokens, "min_margin": margin},
        "packed": {"ids": tokens[0, :-1].tolist(), "lengths": documents, "targets": targets.tolist(), "loss": packed_loss},
        "float64_difference": errors,
    }
    if moe:
        record["router"] = {"min_gap": min(seen["gap"]), "min_gap_in_training": training_gap, "changed_by_correction_bias": changed}
    tensors = {"logits": out["logits"], "token_losses": token_losses, "packed.logits": packed_logits, "packed.token_losses": packed_losses}
    tensors |= {f"grad.{n}": g for n, g in grads.items()}
    if name in PACKED_GRADIENTS:
        tensors |= {f"packed.grad.{n}": g for n, g in packed_grads.items()}
    if "mtp_loss" in out:
        record["mtp"] = {"lambda": MTP_LAMBDA, "main_loss": out["main_loss"].item(), "mtp_loss": out["mtp_loss"].item(),
                         "targets": tokens[:, 2:].tolist()}
        tensors["mtp_logits"] = out["mtp_logits"]
    return record, tensors


# --------------------------------------------------------------------------------------------------------------- writing


def write_json(path, value):
    text = json.dumps(value, indent=1)
    path.write_text(text + "\n")


def write_golden(directory, record, tensors):
    lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items())  # one key a line keeps diffs readable
    (directory / "golden.json").write_text("{\n" + lines + "\n}\n")
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, directory / "golden.safetensors")


def fresh(name):
    directory = MODELS / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def write_model(model, directory, **options):
    """As save_pretrained writes it, checked against the released names, plus the MTP tensors that transformers does not know."""
    weights = parameters(model)
    mtp = {n: t for n, t in weights.items() if ".mtp_" in n}
    plain = copy.deepcopy(model)
    if mtp:
        del plain.mtp
    plain.save_pretrained(directory, **options)
    (directory / "generation_config.json").unlink(missing_ok=True)
    files = sorted(directory.glob("*.safetensors"))
    saved = {n: t for f in files for n, t in load_file(f).items()}
    expected = {n: t for n, t in weights.items() if n not in mtp}
    assert saved.keys() == expected.keys(), saved.keys() ^ expected.keys()
    assert all(torch.equal(saved[n], expected[n]) for n in expected)
    assert all(n.endswith(".mlp" + CORRECTION_BIAS) for n in saved if "statics" in n)
    if mtp:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights


def make(name):
    settings = CONFIGS[name]
    for seed in range(1, 400):
        model = build(settings)
        generator = fill(model, seed)
        try:
            record, tensors = golden(model, generator, name)
        except Rejected as reason:
            print(f"{name}: seed {seed}: {reason}", flush=True)
            continue
        directory = fresh(name)
        write_model(model, directory)
        write_golden(directory, {"seed": seed} | record, tensors)
        print(f"{name}: seed {seed}: loss {record['loss']:.4f} -> {record['adamw']['loss_after']:.4f}, {record.get('router')}", flush=True)
        return
    raise SystemExit(f"{name}: no seed will do")


def reload(name, weights):
    """A model of this configuration with these weights, under released names, in float32."""
    model = build(CONFIGS[name])
    for parameter_name, p in model.named_parameters():
        prefix, _, stacked = parameter_name.partition(".mlp.experts.")
        experts = range(model.config.moe_num_experts) if stacked else ()
        expert = lambda e, part: weights[f"{prefix}.mlp.experts.{e}.{part}.weight"].float()
        if stacked == "gate_up_proj":
            value = torch.stack([torch.cat([expert(e, "gate_proj"), expert(e, "up_proj")]) for e in experts])
        elif stacked == "down_proj":
            value = torch.stack([expert(e, "down_proj") for e in experts])
        else:
            value = weights[parameter_name.replace("mlp.gate.moe_statics", "mlp.moe_statics")].float()
        p.data.copy_(value)
    return model


# -------------------------------------------------------------------------------------------------- copies in other forms


def released_config(name, **changes):
    """The configuration as the releases spell it: flat rope_theta, the remote code's architecture and extra keys."""
    config = json.loads((MODELS / name / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config.pop("transformers_version", None)
    if config["model_type"] == "ernie4_5":
        config["architectures"] = ["Ernie4_5_ForCausalLM"]
    else:
        experts = config["moe_num_experts"]
        config |= {"moe_use_aux_free": True, "moe_gate_act": "softmax", "moe_capacity": [experts] * 3, "moe_layer_end_index": -1}
    return config | changes


def paddle(source):
    """The layout of the -Paddle releases: prefix ernie., q|k|v and gate|up fused, matrices [in, out]."""
    weights = load_file(MODELS / source / "model.safetensors")
    out = {}
    for name, t in weights.items():
        for parts, fused in [(("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "up_gate_proj")]:
            part = next((p for p in parts if f".{p}." in name), None)
            if part == parts[0]:
                t = torch.cat([weights[name.replace(part, p)] for p in parts])
                name = name.replace(part, fused)
            elif part:
                t = None
        if t is None:
            continue
        linear = t.ndim == 2 and name.endswith(".weight") and "embed_tokens" not in name
        name = "ernie." + name.removeprefix("model.") if name.startswith("model.") else name
        out[name] = (t.T if linear else t).contiguous()
    directory = fresh(f"{source}_paddle")
    save_file(out, directory / "model.safetensors")
    write_json(directory / "config.json", released_config(source))
    write_json(directory / "golden.json", {"same_values_as": source})


def sharded(source):
    model = reload(source, load_file(MODELS / source / "model.safetensors"))
    total = sum(t.nbytes for t in parameters(model).values())
    for limit in range(total // 3 + 1, total // 2, 64):
        directory = fresh(f"{source}_sharded")
        write_model(model, directory, max_shard_size=limit)
        if len(list(directory.glob("model-*-of-00003.safetensors"))) == 3:
            assert (directory / "model.safetensors.index.json").exists()
            write_json(directory / "golden.json", {"same_values_as": source})
            return
    raise SystemExit("no limit gives three shards")


def rounded(source, label, dtype):
    """Weights in a 16-bit type, but router and correction bias in float32 as released; logits of the rounded weights in float32."""
    keep = lambda n: n.endswith("mlp.gate.weight") or n.endswith(CORRECTION_BIAS)
    weights = {n: t if keep(n) else t.to(dtype) for n, t in load_file(MODELS / source / "model.safetensors").items()}
    record = json.loads((MODELS / source / "golden.json").read_text())
    model = reload(source, weights)
    ids, targets = torch.tensor(record["ids"]), torch.tensor(record["targets"])
    prompt = torch.tensor(record["greedy"]["prompt"])
    with watch_routers(model) as seen, torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        tokens, margin = greedy(model, prompt)
    require(margin > TOKEN_MARGIN and min(seen["gap"]) > ROUTER_GAP and 2 not in tokens, f"{margin}, {min(seen['gap'])}, {tokens}")
    directory = fresh(f"{source}_{label}")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((MODELS / source / "config.json").read_text())
    write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    write_golden(directory, {
        "model": directory.name, "versions": record["versions"], "ids": record["ids"], "targets": record["targets"],
        "loss": cross_entropy(logits, targets).item(),
        "greedy": {"prompt": record["greedy"]["prompt"], "tokens": tokens, "min_margin": margin},
    }, {"logits": logits})


def vision_language_configs():
    """Configurations only, for parsing: transformers' nested form, and the flat form of the remote code with its lists."""
    text = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=256, moe_k=2, moe_num_experts=8, moe_num_shared_experts=2, moe_intermediate_size=[12, 4])
    vision = dict(depth=2, hidden_size=40, intermediate_size=160, num_heads=4, patch_size=14, spatial_merge_size=2)
    # Pairs for height, width and time: the released 22, 22, 20 of 64 in small.
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]}
    ids = dict(image_start_token_id=92, image_end_token_id=93, image_token_id=94, video_start_token_id=95, video_end_token_id=96,
               video_token_id=97)
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text | {"rope_parameters": rope, "head_dim": 8}, vision_config=vision, **ids)
    config.architectures = ["Ernie4_5_VLMoeForConditionalGeneration"]
    config.save_pretrained(fresh("vl_moe_nested"))
    flat = text | {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_moe_vl", "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "hidden_act": "silu", "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000, "rope_3d": True,
        "freq_allocation": 2, "tie_word_embeddings": True, "use_bias": False, "use_cache": True, "torch_dtype": "bfloat16",
        "moe_num_experts": [8, 8], "moe_layer_start_index": [1, 1], "moe_layer_end_index": [2, 1], "moe_layer_interval": 1,
        "moe_capacity": [8, 8, 8], "moe_gate": "topk", "moe_use_aux_free": True, "im_patch_id": 94, "spatial_conv_size": 2,
        "temporal_conv_size": 2, "image_start_token_id": 92, "image_end_token_id": 93, "video_start_token_id": 95,
        "video_end_token_id": 96,
        "vision_config": {"depth": 2, "embed_dim": 40, "hidden_size": 40, "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 4,
                          "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "model_type": "DFNRope_vision_transformer"},
    }
    write_json(fresh("vl_moe_flat") / "config.json", flat)


COPIES = {
    "dense_untied_gqa_paddle": lambda: paddle("dense_untied_gqa"),
    "dense_bias_mqa_paddle": lambda: paddle("dense_bias_mqa"),
    "moe_k2_paddle": lambda: paddle("moe_k2"),
    "moe_k2_sharded": lambda: sharded("moe_k2"),
    "moe_k2_bf16": lambda: rounded("moe_k2", "bf16", torch.bfloat16),
    "moe_k2_f16": lambda: rounded("moe_k2", "f16", torch.float16),
    "vl_moe": vision_language_configs,
}


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or [*CONFIGS, *COPIES]:
        if name in CONFIGS:
            make(name)
        else:
            COPIES[name]()
            print(name, flush=True)


if __name__ == "__main__":
    main()
