"""Our 8-bit engine against transformers: the same rounded weights in f32, every linear layer's input rounded per token to max|x|/127, and, where
compressed-tensors can load the directory, against that too.

    python testdata/scripts/check_quantised.py DIR ERNIE [ids]

DIR is a directory that `ernie quantize` wrote, ERNIE the program. Needs torch, transformers and compressed-tensors (versions: requirements.txt).
transformers 5.24 with compressed-tensors 0.20 loads dense models with a head of their own. It cannot load a tied head (its lm_head is not quantised
but shares the embedding's bytes) nor routed experts (it joins them to one tensor before they are decompressed).
"""
import json
import subprocess
import sys

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM


def rounded(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(x / scale) * scale, torch.zeros_like(x))


def reference(directory):
    """transformers' network with dequantised weights, its linear layers rounding what they are given."""
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    weights = {}
    with safe_open(f"{directory}/model.safetensors", "pt") as file:
        for name in file.keys():
            if not name.endswith("_scale"):
                weight = file.get_tensor(name).float()
                scale = name + "_scale"
                weights[name] = weight * file.get_tensor(scale) if scale in file.keys() else weight
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(name != "lm_head.weight" for name in missing):
        raise SystemExit(f"weights that do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("mlp.gate"):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]), *inputs[1:]))
    return model


def main():
    directory, ernie = sys.argv[1:3]
    ids = [int(i) for i in (sys.argv[3] if len(sys.argv) > 3 else "1,5,7,9,33,21,4").split(",")]
    command = [ernie, "logits", "--model", directory, "--ids", ",".join(map(str, ids)), "--last", str(len(ids)), "--kv-cache", "f32"]
    ours = np.array(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["logits"], dtype=np.float32)
    with torch.no_grad():
        expected = reference(directory)(torch.tensor([ids])).logits[0].numpy()
    print(f"the same rounding in transformers: largest difference {np.abs(ours - expected).max():.2e}, logits up to {np.abs(expected).max():.2f}")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            other = loaded(torch.tensor([ids])).logits[0].numpy()
    except (RuntimeError, ValueError, AttributeError) as error:
        print(f"compressed-tensors does not load it: {str(error).splitlines()[0]}")
        return
    agree = (other.argmax(-1) == ours.argmax(-1)).mean()
    print(f"compressed-tensors: largest difference {np.abs(ours - other).max():.2e}, the likeliest token is the same at {agree:.0%} of positions")


if __name__ == "__main__":
    main()
