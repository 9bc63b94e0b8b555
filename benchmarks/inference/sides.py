"""How each side is run on a model: ours, and each peer that setup.sh made ready."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import quiet
from models import MODELS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Every stream's prompt before decoding, as in peer.py.
PROMPT = 8
FIRST_TOKEN_IDS = ",".join(str(3 + 61 * i) for i in range(16))
PREFILLS = 3


class Failed(Exception):
    """Why a side has no figures for a model."""


class Side:
    """One program with its form of the weights. `measure` gives the figures of one round by name."""

    def __init__(self, name, options):
        self.name, self.options, self.models = name, options, options.cache / "models"
        self.environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.prepare()

    def prepare(self):
        """What is done once, whatever the models."""

    def check(self, model):
        """Raises Failed unless the side can run on the model."""

    def process(self, command):
        run = quiet.run(command, self.environment, self.options.weight, self.options.patience)
        if run.status != 0:
            last = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
            raise Failed(f"{Path(str(command[0])).name} ended with status {run.status}: {last[:300]}")
        return run

    def measure(self, model):
        figures = self.speeds(model)
        first = [self.process(self.first_token_command(model)) for _ in range(self.options.first_tokens)]
        if first:
            figures["first_token_s"] = sorted(run.wall_s for run in first)[len(first) // 2]
        figures["others"] = max([figures["others"], *(run.others for run in first)])
        return figures

    def from_bench(self, run, result):
        """The figures of a process that printed the JSON of `ernie bench` or peer.py's."""
        speed = lambda value: value["tokens_per_s"] if isinstance(value, dict) else value
        figures = {"prefill": speed(result["prefill"])}
        figures |= {f"decode_{streams}": speed(value) for streams, value in result["decode"].items()}
        return figures | {"load_s": result["load_s"], "peak_rss_mib": run.peak_rss_mib, "others": run.others}


class Ernie(Side):
    """Ours. Weights of 8 bits are quantised from the checkpoint anew each time: the form on disk is this commit's."""

    def prepare(self):
        self.program = self.options.ernie
        self.has_weights_flag = "--weights" in self.help("bench")

    def help(self, command):
        done = subprocess.run([self.program, command, "--help"], capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    @property
    def scheme(self):
        return self.name.removeprefix("ernie-")

    def folder(self, model):
        return self.models / (model if self.scheme == "f32" else f"{model}-ernie-{self.scheme}")

    def check(self, model):
        if not self.help("bench"):
            raise Failed("this build has no `ernie bench`")
        if self.scheme == "f32":
            return
        if not self.help("quantize"):
            raise Failed("this build has no `ernie quantize`")
        shutil.rmtree(self.folder(model), ignore_errors=True)
        done = subprocess.run([self.program, "quantize", self.models / model, self.folder(model), "--scheme", self.scheme],
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"ernie quantize: {done.stderr.strip()}")

    def weights(self):
        return ["--weights", "f32"] if self.scheme == "f32" and self.has_weights_flag else []

    def speeds(self, model):
        o = self.options
        run = self.process([self.program, "bench", "--model", self.folder(model), "--pp", o.prefill, "--tg", o.decode, "--batch",
                            ",".join(map(str, o.batch)), "--threads", o.threads, "--json", *self.weights()])
        result = json.loads(run.stdout)
        shares = {"prefill": result["prefill"].get("share_of_limit")}
        shares |= {f"decode_{streams}": value.get("share_of_limit") for streams, value in result["decode"].items()}
        figures = self.from_bench(run, result)
        # The process also measures the machine's limits, with memory of its own: what it says of the model alone is what counts.
        figures["peak_rss_mib"] = result["peak_rss_mib"] or figures["peak_rss_mib"]
        return figures | {"limits": result["limits"], "share_of_limit": shares}

    def first_token_command(self, model):
        return [self.program, "generate", "--model", self.folder(model), "--max-tokens", 1, "--temperature", 0, "--threads",
                self.options.threads, "--ids", FIRST_TOKEN_IDS]


class Peer(Side):
    """Of setup.sh's making; what it could not make has its reason in a file."""

    # Its name in setup.sh, its form of a model, and why it has none of mixtures of experts.
    group, form, dense_only = None, None, None

    def check(self, model):
        if self.dense_only and "moe_num_experts" in MODELS[model]:
            raise Failed(self.dense_only)
        if not all(path.exists() for path in self.needed(model)):
            reason = self.options.cache / "skipped" / self.group
            raise Failed(reason.read_text().strip() if reason.exists() else "not there: run benchmarks/inference/setup.sh")

    def needed(self, model):
        return [self.path(model)]

    def path(self, model):
        return self.models / self.form.format(model)


class PythonPeer(Peer):
    environment_folder = "torch"

    def command(self, model):
        python = self.options.cache / self.environment_folder / "bin" / "python"
        return [python, HERE / "peer.py", "--peer", self.name, "--model", self.path(model), "--threads", self.options.threads]

    def needed(self, model):
        return [self.path(model), self.options.cache / self.environment_folder / f"installed-requirements-{self.requirements}.txt"]

    def speeds(self, model):
        o = self.options
        run = self.process([*self.command(model), "--prefill", o.prefill, "--decode", o.decode, "--batch", ",".join(map(str, o.batch))])
        result = json.loads(run.stdout.splitlines()[-1])
        return self.from_bench(run, result) | {"versions": result["versions"]}

    def first_token_command(self, model):
        return [*self.command(model), "--first-token"]


class Transformers(PythonPeer):
    group, form, requirements = "transformers", "{}", "torch"


class OpenVino(PythonPeer):
    group, form, requirements, environment_folder = "openvino", "{}-openvino", "openvino", "openvino"
    dense_only = "its exporter knows no ERNIE; of a mixture of experts there is no Llama of equal sizes"


class OnnxRuntime(PythonPeer):
    group, form, requirements = "onnxruntime", "{}-onnxruntime", "onnxruntime"
    dense_only = "its model builder knows ERNIE's dense models only"


class LlamaCpp(Peer):
    """llama-bench for prefill and one stream, llama-batched-bench for several; each warms itself."""

    group, form = "llama.cpp", "{}-q8_0.gguf"

    def prepare(self):
        self.bin = self.options.cache / "llama.cpp" / "build" / "bin"
        source = next(iter((self.options.cache / "llama.cpp").glob("llama_cpp_python-*/")), None)
        self.versions = {"llama.cpp": f"of llama-cpp-python {source.name.split('-')[-1]}"} if source else {}

    def bench(self, model, *flags):
        return [self.bin / "llama-bench", "-m", self.path(model), "-t", self.options.threads, "-o", "jsonl", *flags]

    def speeds(self, model):
        o = self.options
        figures, runs = {"versions": self.versions}, []
        runs.append(self.process(self.bench(model, "-p", o.prefill, "-n", 0, "-r", PREFILLS)))
        figures["prefill"] = median_of(runs[-1].stdout)
        if 1 in o.batch:
            runs.append(self.process(self.bench(model, "-p", 0, "-n", o.decode, "-r", 1)))
            figures["decode_1"] = median_of(runs[-1].stdout)
        several = [n for n in o.batch if n > 1]
        if several:
            run = self.process([self.bin / "llama-batched-bench", "-m", self.path(model), "-t", o.threads, "-tb",
                                o.threads, "-c", max(several) * (PROMPT + o.decode), "-npp", PROMPT, "-ntg", o.decode, "-npl",
                                ",".join(map(str, several)), "--output-format", "jsonl", "-lv", 4])  # 4 tells the load time
            runs.append(run)
            for line in run.stdout.splitlines():
                if line.startswith("{"):
                    result = json.loads(line)
                    figures[f"decode_{result['pl']}"] = result["speed_tg"]
            if match := re.search(r"load time =\s*([\d.]+) ms", run.stdout + run.stderr):
                figures["load_s"] = float(match[1]) / 1e3
        return figures | {"peak_rss_mib": max(run.peak_rss_mib for run in runs), "others": max(run.others for run in runs)}

    def first_token_command(self, model):
        return self.bench(model, "-p", 16, "-n", 0, "-r", 1, "--no-warmup")


def median_of(stdout):
    """The median of the repetitions of the one test that llama-bench printed."""
    samples = sorted(json.loads(stdout.splitlines()[-1])["samples_ts"])
    return samples[len(samples) // 2]


OURS = {"ernie-w8a8": Ernie, "ernie-f32": Ernie}
PEERS = {
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "transformers-f32": Transformers,
    "transformers-bf16": Transformers,
}


def build():
    """Our program, as this checkout has it."""
    command = ["cargo", "build", "--quiet", "--release", "--locked", "--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if built.returncode != 0:
        sys.exit("our program does not build")
    messages = map(json.loads, built.stdout.splitlines())
    return next(message["executable"] for message in messages if message.get("executable"))
