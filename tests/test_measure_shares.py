"""`kvevict budgets`: measured shares against a choice written out in plain Python, the files, errors in one line."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from kvevict import cli, measure_shares
from kvevict.hf.reconstruct import repeat_scores
from kvevict.policies import Fixed, Shares
from kvevict.policies.shares import config_hash

S = 60


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):  # attention that differs by layer
            layer.self_attn.q_proj.weight.mul_(20.0 * (i + 1))
    return model


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")  # the ops' kernels are tested elsewhere


def pieces(count):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 60, (S,), generator=generator) for _ in range(count)]


def test_shares_are_the_mean_of_what_heads_keep_of_the_best_tokens(model):
    prompt, keeps, calls = torch.tensor([7, 8, 9]), (0.7, 0.9), []
    table = measure_shares.measure(model, pieces(2), prompt, keeps, lambda: calls.append(None))
    assert len(calls) == 2 and table.shape == (2, 3, 2) and table.dtype == torch.float32
    expected = torch.zeros(2, 3, 2)
    for piece in pieces(2):
        rows = [row for layer in repeat_scores(model, piece[None], prompt) for row in layer[0].tolist()]
        for k, n in enumerate((42, 54)):
            free = [(-row[i], h, i) for h, row in enumerate(rows) for i in range(4, S - 32)]
            for h in range(6):
                expected[k].view(-1)[h] += 36 / S / 2
            for _, h, _ in sorted(free)[: 6 * (n - 36)]:
                expected[k].view(-1)[h] += 1 / S / 2
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-5)
    assert expected[0].max() > expected[0].min() + 0.1  # heads differ
    torch.testing.assert_close(table.mean((1, 2)), torch.tensor(keeps))


def test_layers_of_unlike_heads_are_refused(model, monkeypatch):
    unlike = [torch.rand(1, 2, S), torch.rand(1, 4, S)]
    monkeypatch.setattr("kvevict.hf.reconstruct.repeat_scores", lambda *_: unlike)
    with pytest.raises(ValueError, match=r"layers of \[2, 4\] KV heads"):
        measure_shares.measure(model, pieces(1), torch.tensor([7]), (0.7,))


def test_the_favoured_tenth_by_hand():
    table = torch.full((10, 2), 0.1)
    table[3, 1], table[7, 0] = 0.6, 1.0
    assert measure_shares.favoured(table) == (2, pytest.approx(1.6 / 3.4))
    assert measure_shares.favoured(torch.tensor([[0.1, 0.3]])) == (1, pytest.approx(0.75))


def test_the_command_writes_shares_that_fit_the_model(model, tmp_path, monkeypatch, capsys):
    """The whole command, on a tiny model in SmolLM2's place."""

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [ord(c) % 60 for c in text]}

    monkeypatch.setattr(measure_shares.models, "load", lambda name, device: (model, tokenizer))
    (tmp_path / "more").mkdir()
    texts = [tmp_path / "b.txt", tmp_path / "more/b.txt"]
    for text, words in zip(texts, ("in the beginning ", "once upon a time "), strict=True):
        text.write_text(words * 140)
    out, report = tmp_path / "tiny.safetensors", tmp_path / "tiny.report"
    found = measure_shares.run("tiny", texts, 2, S, [0.9, 0.7, 0.9], "cpu", out, report)
    shares = Shares.load(out)
    assert shares.keeps == (0.7, 0.9) and torch.equal(shares.table, found.table)
    assert shares.metadata["config"] == config_hash(model.config) and shares.metadata["model"] == "tiny"
    assert shares.metadata["texts"] == "2 pieces each of b.txt, b.txt (2)" and shares.metadata["tokens"] == str(S)
    said = json.loads((tmp_path / "tiny.json").read_text())
    torch.testing.assert_close(torch.tensor(said["table"]), shares.table, rtol=0, atol=1e-5)
    assert str(tmp_path) not in out.read_bytes().decode(errors="ignore") + json.dumps(said)
    assert said["keeps"] == [0.7, 0.9] and (tmp_path / "tiny.png").stat().st_size > 10_000
    assert "most favoured of 6 heads" in " ".join(capsys.readouterr().out.split())
    texts[1].write_text("too short")
    with pytest.raises(measure_shares.models.Unavailable, match=r"b\.txt \(2\): the text has 9 tokens"):
        measure_shares.run("tiny", texts, 2, S, [0.9], "cpu", out, report)
    counts = Fixed(out, 0.8).per_head(3, 2, 100, protected=36)
    assert sum(map(sum, counts)) == 480


@pytest.mark.parametrize(
    "arguments",
    [["--texts", "0"], ["--tokens", "0"], ["--keep", "0.01"], ["--keep", "nan"], ["--text", "none.txt"],
     ["--model", "/no/such/model"], ["--out", "/no/such/folder/x"], ["--device", "gpu9"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_options_end_in_one_line(arguments, tmp_path, capsys):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "w")]
    with pytest.raises(SystemExit) as ended:
        cli.app(["budgets", *arguments, *out, "--report", str(tmp_path / "r")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("kvevict budgets: ") and len(said.splitlines()) == 1
    assert arguments[0] in said or arguments[1] in said
    assert not list(tmp_path.iterdir())
