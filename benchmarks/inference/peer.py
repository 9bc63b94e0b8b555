"""One peer that runs in Python, on one model: a JSON line with its speeds, or with --first-token nothing but one token and the end.

    peer.py --peer transformers-f32 --model FOLDER --threads 2 --prefill 512 --decode 128 --batch 1,8,16

Every timing is of token ids drawn at random. Decoding starts after PROMPT tokens in each stream and picks the likeliest token.
"""

import argparse
import json
import os
import statistics
import time

import numpy

PROMPT = 8
FIRST_TOKEN_PROMPT = 16
PREFILLS = 3


class Transformers:
    def __init__(self, dtype):
        import torch
        import transformers

        transformers.logging.disable_progress_bar()
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def load(self, model, threads):
        from transformers import AutoModelForCausalLM

        self.torch.set_num_threads(threads)
        self.torch.set_grad_enabled(False)
        self.network = AutoModelForCausalLM.from_pretrained(model, dtype=self.dtype, local_files_only=True).eval()

    def start(self, ids, _room):
        """Takes the prompts `ids` [b, t]; what was there before is forgotten."""
        out = self.network(self.torch.from_numpy(ids), use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def step(self):
        """Takes the likeliest token of each stream."""
        out = self.network(self.next, past_key_values=self.cache, use_cache=True)
        self.next = out.logits[:, -1:].argmax(-1)


class OpenVino:
    def __init__(self):
        import openvino

        self.openvino = openvino
        self.versions = {"openvino": openvino.__version__}

    def load(self, model, threads):
        core = self.openvino.Core()
        network = core.read_model(os.path.join(model, "openvino_model.xml"))
        self.keep_last_position(network)
        # Pinned threads would keep to cores that something else may be using; no other side pins.
        chosen = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        self.inputs = {name for entry in network.inputs for name in entry.get_names()}
        self.request = core.compile_model(network, "CPU", chosen).create_infer_request()

    @staticmethod
    def keep_last_position(network):
        """Cuts the input of the head down to the last position, as OpenVINO GenAI does."""
        import openvino.opset13 as op

        node = network.output("logits").get_node()
        while node.get_type_name() != "MatMul":
            node = node.input_value(0).get_node()
        one, end = numpy.array([1], numpy.int64), numpy.array([numpy.iinfo(numpy.int64).max], numpy.int64)
        node.input(0).replace_source_output(op.slice(node.input_value(0), -one, end, one, one).output(0))
        network.validate_nodes_and_infer_types()

    def infer(self, ids):
        streams, tokens = ids.shape
        given = {
            "input_ids": ids,
            "attention_mask": numpy.ones((streams, self.past + tokens), numpy.int64),
            "position_ids": numpy.tile(numpy.arange(self.past, self.past + tokens, dtype=numpy.int64), (streams, 1)),
            "beam_idx": numpy.arange(streams, dtype=numpy.int32),
        }
        self.request.infer({name: value for name, value in given.items() if name in self.inputs}, share_inputs=True)
        self.past += tokens
        self.next = self.request.get_tensor("logits").data[:, -1].argmax(-1)[:, None]

    def start(self, ids, _room):
        self.request.reset_state()
        self.past = 0
        self.infer(ids)

    def step(self):
        self.infer(self.next)


class OnnxRuntime:
    def __init__(self):
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        self.versions = {"onnxruntime-genai": onnxruntime_genai.__version__}

    def load(self, model, threads):
        config = self.genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.network = self.genai.Model(config)

    def start(self, ids, room):
        streams, tokens = ids.shape
        parameters = self.genai.GeneratorParams(self.network)
        length = tokens + room
        parameters.set_search_options(batch_size=streams, max_length=length, min_length=length, do_sample=False)
        self.generator = self.genai.Generator(self.network, parameters)
        self.generator.append_tokens(ids.astype(numpy.int32))

    def step(self):
        self.generator.generate_next_token()


PEERS = {
    "transformers-f32": lambda: Transformers("float32"),
    "transformers-bf16": lambda: Transformers("bfloat16"),
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
}


def seconds(call, *arguments):
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, default=30000, help="ids are drawn below it")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 16])
    parser.add_argument("--first-token", action="store_true")
    options = parser.parse_args()

    random = numpy.random.default_rng(0)
    ids = lambda streams, tokens: random.integers(3, options.vocabulary, (streams, tokens))
    peer = PEERS[options.peer]()
    load = seconds(peer.load, options.model, options.threads)
    if options.first_token:
        peer.start(ids(1, FIRST_TOKEN_PROMPT), 8)
        print("token", flush=True)
        os._exit(0)  # taking an interpreter down is no part of a first token

    # The first warms caches and pages.
    prefill = [options.prefill / seconds(peer.start, ids(1, options.prefill), 8) for _ in range(PREFILLS + 1)][1:]
    decode = {}
    for streams in options.batch:
        for steps in (2, options.decode):
            peer.start(ids(streams, PROMPT), steps + 8)
            peer.step()
            elapsed = seconds(lambda: [peer.step() for _ in range(steps)])
        decode[streams] = streams * options.decode / elapsed
    print(json.dumps({"load_s": load, "prefill": statistics.median(prefill), "decode": decode, "versions": peer.versions}))


if __name__ == "__main__":
    main()
