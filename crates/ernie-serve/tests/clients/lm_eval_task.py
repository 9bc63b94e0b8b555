"""The accuracy that lm-evaluation-harness finds through a running server, and the one that plain requests for the same log-probabilities give:
lm_eval_task.py BASE_URL TOKENIZER_FOLDER [KEY]. Ends with an error if they differ. Run in the folder of two_choices.yaml; nothing but the server is
asked over a network."""

import json
import os
import sys
import urllib.request

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
base = sys.argv[1]
key = sys.argv[3] if len(sys.argv) > 3 else "none"
os.environ["OPENAI_API_KEY"] = key

import lm_eval
from lm_eval.tasks import TaskManager


def post(path, body):
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(base + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


with urllib.request.urlopen(urllib.request.Request(base + "/models", headers={"authorization": f"Bearer {key}"})) as reply:
    model = json.load(reply)["data"][0]["id"]


def score(context, continuation):
    """ln of the continuation's probability; both are encoded together, and the context's tokens are those that it has alone."""
    cut = post("/tokenize", {"prompt": context})["count"]
    answer = post("/completions", {"prompt": context + continuation, "max_tokens": 0, "echo": True, "logprobs": 0})
    return sum(answer["choices"][0]["logprobs"]["token_logprobs"][cut:])


with open("two_choices.jsonl") as lines:
    rows = [json.loads(line) for line in lines]
scores = [[score(row["question"], " " + choice) for choice in row["choices"]] for row in rows]
right = sum(max(range(2), key=pair.__getitem__) == row["answer"] for pair, row in zip(scores, rows))

# Prompts go as token ids, which transformers makes of the model's own files.
arguments = {"base_url": base + "/completions", "model": model, "tokenizer": sys.argv[2], "tokenizer_backend": "huggingface", "max_length": 512}
arguments["num_concurrent"] = 4
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=arguments,
    tasks=["two_choices"],
    task_manager=TaskManager(include_path=".", include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
)
accuracy = results["results"]["two_choices"]["acc,none"]
samples = sorted(results["samples"]["two_choices"], key=lambda sample: sample["doc_id"])
theirs = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
difference = max(abs(a - b) for ours, other in zip(scores, theirs) for a, b in zip(ours, other))
print(f"lm_eval {lm_eval.__version__}: accuracy {accuracy:.4f}, plain requests {right / len(rows):.4f}; largest difference of a score {difference:.2e}")
assert abs(accuracy - right / len(rows)) < 1e-9 and difference < 1e-3
