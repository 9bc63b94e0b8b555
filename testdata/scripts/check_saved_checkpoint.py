"""Loads a checkpoint that ernie saved with transformers and compares logits.

    python testdata/scripts/check_saved_checkpoint.py DIR LOGITS.json

LOGITS.json is {"ids": [3, 5, …], "logits": [[…], …]}: one sequence and the logits of its last positions, one row each (the last K
positions if there are K rows). The model is evaluated in float32 with eager attention. Fails if transformers misses, ignores or
reshapes a tensor (multi-token-prediction tensors, which it never reads, apart), or if a logit differs by more than 1e-4.

Versions: requirements.txt.
"""

import json
import sys

import torch
import transformers

TOLERANCE = 1e-4


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    directory, logits_file = sys.argv[1:]
    with open(logits_file, encoding="utf-8") as file:
        ours = json.load(file)
    ids, got = torch.tensor([ours["ids"]]), torch.tensor(ours["logits"], dtype=torch.float32)
    if ids.ndim != 2 or got.ndim != 2 or not 1 <= len(got) <= ids.shape[1]:
        sys.exit(f"{logits_file}: expected N ids and 1 to N rows of logits, got shapes {list(ids.shape[1:])} and {list(got.shape)}")

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    faults = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    faults["unexpected_keys"] = [name for name in faults["unexpected_keys"] if "mtp" not in name]
    if any(faults.values()):
        sys.exit(f"{directory}: transformers does not load it as it is: {faults}")

    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0, -len(got):].float()
    if expected.shape != got.shape:
        sys.exit(f"logits: expected shape {list(expected.shape)}, got {list(got.shape)}")
    error = (expected - got).abs().max().item()
    good = error <= TOLERANCE  # false for NaN too
    print(f"{directory}: max |Δ logits| = {error:.3e} over {len(got)} positions ({'ok' if good else f'more than {TOLERANCE}'})")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
