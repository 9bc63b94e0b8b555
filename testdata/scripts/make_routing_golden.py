"""Makes testdata/routing/golden.json: how tokens are steered to the experts of their domain, and the loss that pulls the router there.

    pip install numpy==2.4.6
    python testdata/scripts/make_routing_golden.py

The formulas, in float64 (see crates/ernie-model/src/steering.rs):

    p = softmax(logits);  S = topk(p + bias + strength * f), f 1 for the experts of the token's domain;  w = p[S] / max(sum p[S], norm_min)
    pull = mean over tokens of KL(q || p), q even over the experts of the token's domain; 0 for a token whose domain has none

Their gradient, pull by logits, is (p - q) / tokens for a steered token; the script checks it against differences. Logits and biases are multiples of
1/64, and no two scores that decide are nearer than GAP, so that rounding to float32 changes no choice.
"""

import json
from pathlib import Path

import numpy as np

NO_DOMAIN = 65535
GAP = 1e-3
CASES = [  # seed, experts, top k, norm_min, strength, experts of each domain, domain of each token
    (1, 6, 2, 1e-12, 0.25, [[2, 3], [0], []], [0, 1, 2, 0, 1, NO_DOMAIN, 0, 7, 1, 0]),
    (2, 8, 3, 0.7, 0.05, [[7], [1, 2, 4, 6]], [0, 0, 1, NO_DOMAIN, 1, 1, 0]),
]


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def mask(table, domains, experts):
    """f of each token, [t, e]."""
    f = np.zeros((len(domains), experts))
    for token, domain in enumerate(domains):
        f[token, table[domain] if domain < len(table) else []] = 1
    return f


def choose(logits, bias, f, strength, k):
    """The chosen experts [t, k], best first, and how far apart the scores of the first k + 1 are at least."""
    scores = softmax(logits) + bias + strength * f
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order[:, : k + 1], axis=1)
    return order[:, :k], -np.diff(ranked, axis=1).max()


def pull(logits, f):
    total = 0.0
    for p, row in zip(softmax(logits), f):
        favoured = row > 0
        if favoured.any():
            q = 1 / favoured.sum()
            total += (q * np.log(q / p[favoured])).sum()
    return total / len(logits)


def pull_gradient(logits, f):
    count = f.sum(axis=1, keepdims=True)
    return np.where(count > 0, softmax(logits) - f / np.maximum(count, 1), 0) / len(logits)


def differences(function, x, step=1e-6):
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[place] += step
        below[place] -= step
        out[place] = (function(above) - function(below)) / (2 * step)
    return out


def case(seed, experts, k, norm_min, strength, table, domains):
    f = mask(table, domains, experts)
    random = np.random.default_rng(seed)
    while True:
        logits = np.round(random.normal(0, 1.2, (len(domains), experts)) * 64) / 64
        bias = np.round(random.normal(0, 0.06, experts) * 64) / 64
        indices, gap = choose(logits, bias, f, strength, k)
        free, _ = choose(logits, bias, f, 0, k)
        changed = (np.sort(indices) != np.sort(free)).any(axis=1)
        # Steering must change some choices, and leave some.
        if gap > GAP and 2 <= changed.sum() < (f.sum(axis=1) > 0).sum():
            break
    chosen = np.take_along_axis(softmax(logits), indices, axis=1)
    weights = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), norm_min)
    gradient = pull_gradient(logits, f)
    assert np.abs(gradient - differences(lambda x: pull(x, f), logits)).max() < 1e-8
    rounded = lambda x: [[round(float(value), 9) for value in row] for row in x]
    return {
        "experts": experts, "top_k": k, "norm_min": norm_min, "strength": strength, "experts_of_domain": table, "domains": domains,
        "bias": bias.tolist(), "logits": logits.tolist(), "indices": indices.tolist(), "weights": rounded(weights),
        "pull": round(float(pull(logits, f)), 9), "pull_gradient": rounded(gradient),
    }


def main():
    path = Path(__file__).resolve().parent.parent / "routing" / "golden.json"
    path.parent.mkdir(exist_ok=True)
    cases = [json.dumps(case(*settings)) for settings in CASES]
    path.write_text("[\n" + ",\n".join(cases) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
