"""Training the learned scorer on a tiny model, and the command line's train."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from kvevict import models, train
from kvevict.policies import Learned, LearnedKV
from kvevict.policies.training import collect, fit, spearman


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def texts(count, length=160):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 100, (length,), generator=generator) for _ in range(count)]


def test_spearman_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x.exp()) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 4 / (4 * 15))


def test_targets_are_the_attention_of_later_queries(model):
    """Against the weights that eager attention returns."""
    ids = texts(1)[0][None]
    samples = collect(model, ids, future=60, layers=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for sample, weights in zip(samples, attentions, strict=True):
        assert sample.hidden.shape == (100, 32)
        torch.testing.assert_close(sample.mass, weights[0, :, -60:, :100].mean((0, 1)), rtol=1e-4, atol=1e-7)


def test_fit_learns_and_is_repeatable(model, tmp_path):
    options = dict(tokens=120, future=40, epochs=30, patience=30)
    calls = []
    fitted = fit(model, texts(12), progress=lambda *call: calls.append(call), **options)
    assert [len(curve) for curve in fitted.losses] == [30, 30] and len(fitted.policy.layers) == 2
    assert all(curve[-1][0] < curve[0][0] for curve in fitted.losses)
    mean = {name: sum(values) / 2 for name, values in fitted.spearman.items()}
    assert mean["learned"] > max(mean["recency"], mean["random"]) + 0.1
    assert calls[0] == ("reading", 1, 12) and calls[-1] == ("training", 60, 60)
    again = Learned.fit(model, texts(12), **options)
    assert all(torch.equal(a, b) for x, y in zip(fitted.policy.layers, again.layers, strict=True)
               for a, b in zip(x, y, strict=True))  # fmt: skip
    assert model.config._attn_implementation == "sdpa" and not any(m._forward_pre_hooks for m in model.modules())
    stopped = fit(model, texts(12), tokens=120, future=40, epochs=50, patience=1, layers=1)
    assert len(stopped.policy.layers) == 1 and len(stopped.losses[0]) < 50
    train.draw(fitted, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_fit_names_what_is_wrong(model):
    for arguments, options, match in [
        (texts(1), {}, "texts has 1"), (texts(3), dict(held_out=3), "held_out is 3"),
        (["in the beginning"] * 2, {}, "tokenizer is None"), (texts(2), dict(tokens=200), r"texts\[0\] has 160"),
        (texts(2), dict(tokens=100, future=10, layers=3), "layers is 3"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Learned.fit(model, arguments, **options)


def test_slices_are_apart_and_behind_the_demo():
    pieces = train.slices(torch.arange(5000), 3, 900)
    assert [piece[0].item() for piece in pieces] == [2000, 3000, 4000] and all(len(piece) == 900 for piece in pieces)
    with pytest.raises(models.Unavailable, match="5000 tokens"):
        train.slices(torch.arange(5000), 4, 900)


def command(*arguments):
    environment = os.environ | {"KVEVICT_BACKEND": "reference"}  # the interpreter would take minutes
    return subprocess.run(
        [sys.executable, "-m", "kvevict", "train", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    "arguments",
    [["--tokens", "700"], ["--model", "/no/such/model"], ["--features", "mlp", "--epochs", "0"],
     ["--features", "other"]], ids=" ".join,
)  # fmt: skip
def test_bad_options_end_in_one_line(arguments, tmp_path):
    done = command(*arguments, "--out", str(tmp_path / "w"), "--report", str(tmp_path / "r"))
    assert done.returncode == 2 and done.stderr.startswith("kvevict train: "), done.stderr
    assert arguments[-2] in done.stderr or arguments[-1] in done.stderr


def test_smollm2_two_layers(tmp_path):
    """The command itself: a real model, a few short pieces, two layers."""
    done = command("--features", "mlp", "--tokens", "1024", "--length", "256", "--future", "64", "--layers", "2",
                   "--epochs", "4", "--out", str(tmp_path / "w.safetensors"),
                   "--report", str(tmp_path / "report"))  # fmt: skip
    if "cannot download" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    result = json.loads(pathlib.Path(tmp_path / "report.json").read_text())
    assert len(Learned.load(tmp_path / "w.safetensors").layers) == 2
    assert result["spearman"]["learned"] > max(result["spearman"]["recency"], result["spearman"]["random"])
    assert (tmp_path / "report.png").exists()


@pytest.mark.slow  # two readings of every text
def test_smollm2_keys_and_values(tmp_path):
    """In tokens that are too few for a good scorer, but enough to rank better than KeyDiff."""
    done = command("--tokens", "300", "--length", "150", "--out", str(tmp_path / "w.safetensors"),
                   "--report", str(tmp_path / "report"))  # fmt: skip
    if "cannot download" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    result = json.loads(pathlib.Path(tmp_path / "report.json").read_text())
    policy = LearnedKV.load(tmp_path / "w.safetensors")
    assert policy.weights.shape == (30, 3, 132) and policy.metadata["tokens"] == "150"
    assert result["spearman"]["learned"] > result["spearman"]["keydiff"]
    assert (tmp_path / "report.png").exists()
