"""Training the learned scorer on a tiny model, and the command line's train."""

import json
import os
import pathlib
import subprocess
import sys

import numpy
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from kvevict import cli, models, train
from kvevict.hf.fit import FEATURES, fit
from kvevict.hf.reconstruct import repeat_scores
from kvevict.policies import Scorer, model_wide
from kvevict.policies.training import Ridge, network, spearman


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


def test_the_regression_is_that_of_the_whole_table():
    """Sums over pieces against the normal equations of all rows, standardised, in numpy."""
    generator = numpy.random.default_rng(0)
    x = generator.normal(size=(2, 90, 5)) * numpy.array([1, 10, 0.1, 1, 3]) + 2
    x[..., 3] = x[..., 0] * 2 + 0.01 * x[..., 3]  # two features that say the same
    y = x @ numpy.array([1.0, -0.2, 3.0, 0.5, 0.0]) + generator.normal(size=(2, 90))
    sums = Ridge()
    for piece in (slice(0, 40), slice(40, 90)):
        sums.add(torch.from_numpy(x[:, piece]), torch.from_numpy(y[:, piece]))
    for h in range(2):
        z = (x[h] - x[h].mean(0)) / x[h].std(0)
        slope = numpy.linalg.solve(z.T @ z / 90 + 0.01 * numpy.eye(5), z.T @ (y[h] - y[h].mean()) / 90) / x[h].std(0)
        expected = [*slope, y[h].mean() - x[h].mean(0) @ slope]
        numpy.testing.assert_allclose(sums.weights(0.01)[h], expected, rtol=1e-4)


def test_features_that_heads_share_give_each_its_own_weights():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 60, 4, generator=generator), torch.randn(3, 60, generator=generator)
    shared, apart = Ridge(), Ridge()
    shared.add(x, y)
    apart.add(x.expand(3, -1, -1), y)
    assert shared.square.shape[0] == 1
    torch.testing.assert_close(shared.weights(0.1), apart.weights(0.1))


def test_a_network_learns_what_no_line_can_and_is_repeatable():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 16, generator=generator)
    y = torch.stack([x[:, 0].abs() * 5 - 9, x[:, 1] * 0.1])
    state = torch.get_rng_state()
    w1, b1, w2, b2 = network(x[:5000], y[:, :5000], x[5000:], y[:, 5000:], 40)
    assert torch.equal(state, torch.get_rng_state()) and w1.shape == (8, 16) and w2.shape == (2, 8)
    found = ((x[5000:] @ w1.T + b1).clamp(min=0) @ w2.T + b2).T
    left = (found - y[:, 5000:]).square().mean(1) / y[:, 5000:].var(1)
    assert (left < 0.3).all(), left  # a line would leave all of |x|
    again = network(x[:5000], y[:, :5000], x[5000:], y[:, 5000:], 40)
    assert all(torch.equal(a, b) for a, b in zip(again, (w1, b1, w2, b2), strict=True))


@pytest.mark.parametrize("features", FEATURES)
def test_fit_predicts_what_it_has_not_seen(features, model, monkeypatch):
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    pieces, prompt = texts(8), torch.tensor([5, 6, 7])
    found = fit(model, pieces, prompt, features=features, held_out=2, epochs=40, metadata={"model": "tiny"})
    assert len(found.correlation["learned"]) == 2 and sum(found.correlation["learned"]) / 2 > 0.2
    told = found.policy.metadata
    assert told["features"] == features and told["model"] == "tiny" and float(told["correlation"]) > 0.2
    found.policy.check(model.config, 2, 2, 8)
    scores = [repeat_scores(model, piece[None], prompt) for piece in pieces[:-2]]
    assert found.policy.shares.keeps == (0.25, 0.5)  # a tenth of 160 tokens is fewer than are protected
    for keep, table in zip((0.25, 0.5), found.policy.shares.table, strict=True):
        counts = torch.zeros(2, 2)
        for of_text in scores:
            kept = model_wide(of_text, keep, sink=4, recent=32)
            counts += torch.stack([(x[0] >= 0).sum(-1) for x in kept]) / 160 / len(scores)
        torch.testing.assert_close(table, counts)
    again = fit(model, pieces, prompt, features=features, held_out=2, epochs=40)
    assert all(torch.equal(x, again.policy.tensors()[name]) for name, x in found.policy.tensors().items())
    assert model.config._attn_implementation == "sdpa" and not any(m._forward_pre_hooks for m in model.modules())


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
     ["--features", "other"], ["--facts", "100"]], ids=" ".join,
)  # fmt: skip
def test_bad_options_end_in_one_line(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.app(["train", *arguments, "--out", str(tmp_path / "w"), "--report", str(tmp_path / "r")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("kvevict train: ") and len(said.splitlines()) == 1
    assert arguments[-2] in said or arguments[-1] in said
    assert not list(tmp_path.iterdir())


def characters(text, add_special_tokens):
    return {"input_ids": [ord(c) % 100 for c in text]}


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """The whole command, on a tiny model, by what `--out` says."""
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    monkeypatch.setattr(models, "load", lambda name, device: (model, characters))
    monkeypatch.setattr(models, "sample_text", lambda: "in the beginning " * 300)
    monkeypatch.chdir(tmp_path)

    def command(out, model_name=str(tmp_path), text=(), facts=None, features="kv"):
        return train.run(model_name, list(text), features, 400, 100, 1, facts, "cpu", out, None)

    return command


def test_out_may_be_a_folder_and_tells_no_path(run, tmp_path):
    run("made/")
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == [
        "kvevict-train.json", "kvevict-train.png", "scorer.safetensors"
    ]  # fmt: skip
    told = Scorer.load("made/scorer.safetensors").metadata
    assert told["model"] == tmp_path.name and told["texts"] == "3 pieces of the Pentateuch's first half"
    assert str(tmp_path) not in (tmp_path / "made/kvevict-train.json").read_text()
    (tmp_path / "text.txt").write_text("in the beginning " * 200)
    run(str(tmp_path / "made"), text=[tmp_path / "text.txt"])
    assert Scorer.load("made/scorer.safetensors").metadata["texts"] == "3 pieces of text.txt"


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder/scorer.safetensors").mkdir(parents=True)
    for out in ("file/", "none/file", "none/folder/", "folder/"):
        with pytest.raises(models.Unavailable, match=r"^cannot (write|make the folder) (file|none|folder)"):
            run(out)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(models.Unavailable, match="cannot write s: no permission"):
        run("s")


def test_the_scorer_is_there_when_the_questions_fail(run, model, tmp_path, monkeypatch):
    from kvevict import evaluate

    def fails(*_):
        assert model.config._attn_implementation == "kvevict"
        raise ValueError("no")

    monkeypatch.setattr(evaluate, "run_context", fails)
    before = model.config._attn_implementation
    with pytest.raises(models.Unavailable, match="--facts: no; the scorer is written, without them: s"):
        run("s", facts=900)
    assert "facts" not in Scorer.load("s").metadata and model.config._attn_implementation == before


def test_models_without_rope_or_a_layer_that_grows_are_refused_in_words_of_theirs(run, monkeypatch):
    import transformers

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2))
    monkeypatch.setattr(models, "load", lambda *_: (gpt2, characters))
    with pytest.raises(models.Unavailable, match="GPT2LMHeadModel has no RoPE: expected h or mlp"):
        run("s")
    config = transformers.MistralConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=2, sliding_window=8)  # fmt: skip
    monkeypatch.setattr(models, "load", lambda *_: (transformers.MistralForCausalLM(config), characters))
    with pytest.raises(models.Unavailable, match="MistralForCausalLM has no layer that grows with the text"):
        run("s", features="h")


@pytest.mark.slow  # two readings of every text
@pytest.mark.parametrize("features, count", [("kv", 30 * 3 * 132), ("h", 30 * 3 * 576)])
def test_smollm2(features, count, tmp_path):
    """The command itself. In tokens that are too few for a good scorer, but enough to rank better than KeyDiff."""
    done = command("--features", features, "--tokens", "800", "--length", "400", "--facts", "600",
                   "--out", str(tmp_path / "w.safetensors"), "--report", str(tmp_path / "report"))  # fmt: skip
    if "cannot download" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    result = json.loads(pathlib.Path(tmp_path / "report.json").read_text())
    policy = Scorer.load(tmp_path / "w.safetensors")
    assert next(iter(policy.tensors().values())).numel() == count and policy.metadata["tokens"] == "400"
    assert policy.shares.table.shape == (3, 30, 3)
    assert json.loads(policy.metadata["facts"]) == result["facts"] and result["facts"]["questions"] == 48
    assert result["facts"]["loss"]["1.0"] < result["facts"]["loss"]["0.25"] < result["facts"]["loss"]["0.1"]
    assert result["spearman"]["learned"] > result["spearman"]["keydiff"]
    assert (tmp_path / "report.png").exists()
