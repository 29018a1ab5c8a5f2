"""A small environment for `lacre model convert`: a venv whose `torch` and `transformers` are stand-ins.

Its converter reads real safetensors, whose tensors have GGUF's names, and writes a real GGUF file. Its transformers tokenizes
and computes with llama.cpp, from a second GGUF file in the checkpoint: `twin.gguf`, or one that differs on purpose. The same
holds for adapters and the stand-in for `peft`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

CONVERTER: Final = """
import argparse, json, sys
from pathlib import Path

import gguf
import numpy as np

asked = argparse.ArgumentParser()
asked.add_argument("model", type=Path)
asked.add_argument("--outfile", type=Path)
asked.add_argument("--outtype")
asked = asked.parse_args()
config = json.loads((asked.model / "config.json").read_text())
name = config["architectures"][0]
if name == "WritesHalf":
    asked.outfile.write_bytes(b"GGUF")
    raise SystemExit("RuntimeError: [enforce fail at inline_container.cc] disk")
if name == "WritesNothing":
    raise SystemExit(0)
if name == "OddTokenizer":
    print("WARNING:hf-to-gguf:** chkhsh:  " + "ab" * 32, file=sys.stderr)
    raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
if name == "NeedsMore":
    import mistral_common
if name != "LlamaForCausalLM":
    print(f"ERROR:hf-to-gguf:Model {name} is not supported", file=sys.stderr)
    raise SystemExit(1)
data = (asked.model / "model.safetensors").read_bytes()
length = int.from_bytes(data[:8], "little")
writer = gguf.GGUFWriter(asked.outfile, "llama")
for key, kind, value in config["gguf"]:
    writer.add_key_value(key, value, gguf.GGUFValueType(kind))
for name, tensor in json.loads(data[8 : 8 + length]).items():
    begin, end = (8 + length + at for at in tensor["data_offsets"])
    writer.add_tensor(name, np.frombuffer(data[begin:end], np.float32).reshape(tensor["shape"]))
print("Writing:  50%|#####     |", end="\\r", file=sys.stderr)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
ADAPTER_CONVERTER: Final = """
import argparse, json
from pathlib import Path

import gguf
import numpy as np

asked = argparse.ArgumentParser()
asked.add_argument("adapter", type=Path)
asked.add_argument("--base", type=Path)
asked.add_argument("--outfile", type=Path)
asked.add_argument("--outtype")
asked = asked.parse_args()
assert (asked.base / "config.json").is_file()
config = json.loads((asked.adapter / "adapter_config.json").read_text())
data = (asked.adapter / "adapter_model.safetensors").read_bytes()
length = int.from_bytes(data[:8], "little")
writer = gguf.GGUFWriter(asked.outfile, "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
for name, tensor in json.loads(data[8 : 8 + length]).items():
    begin, end = (8 + length + at for at in tensor["data_offsets"])
    name = name.removeprefix("base_model.model.")
    name = name.replace(".lora_A.weight", ".weight.lora_a").replace(".lora_B.weight", ".weight.lora_b")
    writer.add_tensor(name, np.frombuffer(data[begin:end], np.float32).reshape(tensor["shape"]))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
TORCH: Final = """
from contextlib import nullcontext as inference_mode

import numpy as np

float32 = np.float32
tensor = np.array
"""
TRANSFORMERS: Final = """
import os
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy as np


def _twin(folder):
    if "LACRE_SECRET" in os.environ or os.environ.get("HF_HUB_OFFLINE") != "1":
        raise OSError("it sees variables that are none of its business")
    return llama_cpp.Llama(str(Path(folder) / "twin.gguf"), n_ctx=256, logits_all=True, verbose=False)


class AutoTokenizer:
    def __init__(self, model):
        self.model = model

    @classmethod
    def from_pretrained(cls, folder, **_):
        return cls(_twin(folder))

    def __call__(self, text, add_special_tokens):
        return {"input_ids": self.model.tokenize(text.encode(), add_bos=add_special_tokens, special=False)}


class Tensor:
    def __init__(self, values):
        self.values = values

    def __getitem__(self, at):
        return Tensor(self.values[at])

    def float(self):
        return self

    def numpy(self):
        return self.values


class AutoModelForCausalLM:
    def __init__(self, model):
        self.model = model

    @classmethod
    def from_pretrained(cls, folder, **_):
        if (Path(folder) / "unknown-to-transformers").exists():
            raise ValueError("Unrecognized configuration class")
        return cls(_twin(folder))

    def eval(self):
        return self

    def __call__(self, ids):
        self.model.reset()
        self.model.eval(ids[0].tolist())
        return SimpleNamespace(logits=Tensor(self.model.scores[None, : len(ids[0])].copy()))
"""
PEFT: Final = """
from pathlib import Path

import llama_cpp


class PeftModel:
    @classmethod
    def from_pretrained(cls, model, folder):
        twin = str(Path(folder) / "twin.gguf")
        model.model = llama_cpp.Llama(model.model.model_path, n_ctx=256, logits_all=True, verbose=False, lora_path=twin)
        return model
"""


def fake_sources(folder: Path) -> Path:
    """A folder of llama.cpp with the converters alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (folder / "convert_lora_to_gguf.py").write_text(ADAPTER_CONVERTER)
    return folder


def fake_python(folder: Path, *modules: str) -> Path:
    """The interpreter of an environment with stand-ins for these modules: `torch`, `transformers`, `peft`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text(str(Path(gguf.__file__).parents[1]))
    for name, text in (("torch", TORCH), ("transformers", TRANSFORMERS), ("peft", PEFT)):
        if name in modules:
            (packages / f"{name}.py").write_text(text)
    return folder / "bin" / "python"


def fake_checkpoint(folder: Path, model: Path, twin: Path | None = None, *, architecture: str = "LlamaForCausalLM") -> Path:
    """A checkpoint of a GGUF model of 32-bit floats. twin: what transformers computes with; None: the model itself."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(model)
    own = [key for key in reader.fields if not key.startswith("GGUF.") and key != "general.architecture"]
    metadata = [(key, int(reader.fields[key].types[0]), reader.fields[key].contents()) for key in own]
    config = {"architectures": [architecture], "gguf": metadata}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors})
    shutil.copy(twin or model, folder / "twin.gguf")
    return folder


def fake_adapter(folder: Path, adapter: Path, base: Path, twin: Path | None = None, **members: Any) -> Path:
    """A folder of PEFT with the adapter of a GGUF file. base: a checkpoint. twin: what peft computes with; None: the adapter
    itself. members: of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for tensor in gguf.GGUFReader(adapter).tensors:
        name, _, half = tensor.name.rpartition(".weight.lora_")
        tensors[f"base_model.model.{name}.lora_{half.upper()}.weight"] = np.asarray(tensor.data)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | members))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    shutil.copy(twin or adapter, folder / "twin.gguf")
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    """32-bit floats, in the format's own layout: length of the head, head as JSON, data."""
    head, at = {}, 0
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(head).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
