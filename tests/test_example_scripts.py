"""Every example does what it says: in this process, with the small model read once, where it needs one."""

import io
import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest
from conftest import DEVICE

pytest.importorskip("transformers")

from test_hf_smollm2 import smollm2  # noqa: F401

import kvevict
from kvevict import demo, models

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *arguments, stdin=""): the lines that an example prints."""

    def run(name, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with kvevict.backend("auto" if DEVICE == "cuda" else "reference"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        said = capsys.readouterr()
        run.errors = said.err.splitlines()
        return said.out.splitlines()

    return run


@pytest.fixture
def small(smollm2, monkeypatch):  # noqa: F811
    """The small model in place of the one that an example would load."""
    model, _ = smollm2
    monkeypatch.setattr(models, "load", lambda name=models.SMOLLM2, device=DEVICE: smollm2)
    before = model.config._attn_implementation
    yield
    model.set_attn_implementation(before)


def test_transformers_generate(run, small):
    whole, cut = run("transformers_generate.py", "--characters", 1200, "--device", DEVICE)
    assert "Kowalski" in whole and "Kowalski" in cut
    (kept, seen), (cut_kept, cut_seen) = (
        [int(word) for word in line.split() if word.isdigit()] for line in (whole, cut)
    )
    assert kept == seen == cut_seen
    decoded = 4  # of five new tokens, the last is not in the cache
    assert cut_kept == int(0.25 * (seen - decoded) + 0.5) + decoded


def test_a_long_document_is_asked_from_its_file(run, small, tmp_path, monkeypatch):
    text = models.sample_text()[:600]
    (tmp_path / "document.txt").write_text(text + demo.FACT + text[::-1][:100])
    cache = tmp_path / "cache"
    (said,) = run(
        "long_document.py", "read", "--file", tmp_path / "document.txt", "--folder", cache, "--device", DEVICE
    )
    kept, tokens = (int(word) for word in said.split() if word.isdigit())
    assert abs(kept - tokens / 2) <= 1
    (tmp_path / "document.txt").unlink()
    questions = (demo.QUESTION, "\n\nIn the beginning")
    lines = "\n".join(run("long_document.py", "ask", "--folder", cache, "--device", DEVICE, *questions))
    first, second = lines.split("\n\nIn the beginning")
    assert "Kowalski" in first and second


def test_a_chat_stays_within_its_budget(run, small):
    run(
        "chat.py",
        "--budget",
        48,
        "--reply",
        6,
        "--device",
        DEVICE,
        stdin="Hello. Who was Moses?\nAnd Aaron?\nAnd?\n" * 2,
    )
    turns = [[int(word) for word in line.strip(" []").split() if word.isdigit()] for line in run.errors]
    assert len(turns) == 6 and turns[-1][0] > 130
    assert all(held <= 48 + 64 + 30 for _, held in turns)  # interval, and a turn that is read whole


def test_a_policy_of_ones_own(run, small):
    plain, phrases = run("custom_policy.py", "--tokens", 240, "--keep", 0.5, "--device", DEVICE)
    assert plain.startswith("KeyDiff: 120 tokens") and phrases.startswith("Phrases: 120 tokens")
    assert "Kowalski" in phrases


def test_an_engine_of_ones_own(run):
    (line,) = run("custom_kernel_loop.py", "--steps", 50, "--budget", 24, "--interval", 8)
    assert line.startswith("50 tokens, 3 evictions, 26 held by each layer")


def test_vllm_is_started_with_settings_that_it_takes(tmp_path):
    from kvevict.vllm.settings import Settings

    fake = tmp_path / "vllm"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    environment = dict(PATH=f"{tmp_path}:/usr/bin:/bin", POLICY="keydiff")
    for arguments in ([], ["a/model", "--port", "8001"]):
        command = ["sh", str(EXAMPLES / "serve_vllm.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        serve, model, option, config, *rest = json.loads(done.stdout)
        assert (serve, option, rest) == ("serve", "--additional-config", arguments[1:])
        assert model == (arguments or ["HuggingFaceTB/SmolLM2-135M-Instruct"])[0]
        settings = Settings(**json.loads(config)["kvevict"])
        assert (settings.policy, settings.budget) == ("keydiff", 1024)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """From the top, in a kernel of its own, on a text of 400 tokens: no cell fails, and every plot is drawn."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as people run it
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    (sizes,) = [cell for cell in notebook.cells if "TOKENS = 800" in cell.source]
    sizes.source = sizes.source.replace("TOKENS = 800", "TOKENS = 400")
    done = client.NotebookClient(notebook, timeout=300, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    text = "".join(output.get("text", "") for output in outputs)
    assert "Kowalski" in text and "the same memory: True" in text and "cache 16.0 GiB, then 4.0 GiB" in text
