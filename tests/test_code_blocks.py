"""Every block of Python in the README and the docs runs, and every command names what there is."""

import pathlib
import re

import pytest
import torch
from conftest import DEVICE

import kvevict

pytest.importorskip("transformers")

import transformers
import typer
from test_hf_smollm2 import smollm2  # noqa: F401

from kvevict import cli
from kvevict.policies import LearnedKV

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")), REPOSITORY / "CONTRIBUTING.md"]
# In an environment, or processes, of their own, or of a size that a test chooses: their own tests.
ELSEWHERE = ("vllm.md", "distributed.md")


POOL = "transformers.generation.continuous_batching.initialization.resolve_max_memory_percent"


def blocks(language):
    for page in PAGES:
        found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for number, block in enumerate(found):
            yield pytest.param(
                block, id=f"{page.name}-{number}", marks=_elsewhere(page) if language == "python" else ()
            )


def _elsewhere(page):
    return pytest.mark.skipif(page.name in ELSEWHERE, reason="has tests of its own")


@pytest.mark.parametrize("block", list(blocks("python")))
def test_python(block, smollm2, monkeypatch, tmp_path):  # noqa: F811
    """With a model and what belongs to it at hand, as the text around a block says."""
    model, tokenizer = smollm2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 4)  # where a block leaves it open
    monkeypatch.setattr(POOL, lambda cb_config, **_: setattr(cb_config, "max_memory_percent", 0.02))  # workers share it
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: tokenizer)
    inputs = tokenizer("Moses went up to the mount of God. " * 8, return_tensors="pt").to(DEVICE)
    given = dict(
        model=model, tokenizer=tokenizer, inputs=inputs, prompts=inputs["input_ids"].tolist(),
        policy=LearnedKV.of_model(model.config),
        EvictingCache=__import__("kvevict.hf").hf.EvictingCache,
    )  # fmt: skip
    before = model.config._attn_implementation
    try:
        with torch.no_grad(), kvevict.backend("auto" if DEVICE == "cuda" else "reference"):
            exec(compile(block, "<block>", "exec"), given)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize(
    "page", [*PAGES, REPOSITORY / "CHANGELOG.md", REPOSITORY / "bench/NOTES.md"], ids=lambda page: page.name
)
def test_commands_in_sentences_and_tables(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make\s+([a-z-]+)", text)) <= set(targets)
    for module in re.findall(r"python\s+-m\s+(bench[.\w]*\w)", text):
        assert module == "bench" or (REPOSITORY / f"{module.replace('.', '/')}.py").exists(), module


def _lines(block):
    joined = block.replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in joined.splitlines()]


@pytest.mark.parametrize("block", list(blocks("bash")))
def test_commands(block):
    """Subcommands, options and make targets exist; the commands themselves are run by the tests of what they start."""
    commands = typer.main.get_command(cli.app).commands
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    for line in _lines(block):
        words = line.split()
        if "kvevict" in words[:3] and "-m" not in words[words.index("kvevict") :]:
            name, *rest = words[words.index("kvevict") + 1 :]
            options = {text for parameter in commands[name].params for text in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, line
        if "make" in words:
            assert words[words.index("make") + 1] in targets, line
