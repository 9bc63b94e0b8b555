"""A checkpoint as OpenVINO's network with 8-bit weights and a cache of keys and values as state: openvino_export.py CHECKPOINT FOLDER."""

import sys

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

checkpoint, folder = sys.argv[1:]
quantization = OVWeightQuantizationConfig(bits=8, sym=False)
OVModelForCausalLM.from_pretrained(checkpoint, export=True, quantization_config=quantization, compile=False).save_pretrained(folder)
