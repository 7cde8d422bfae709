"""The demo's command line, and the demo itself on a tiny model with random weights."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

import kvevict
import kvevict.hf  # its attention
from kvevict import cli, demo, models
from kvevict.policies import NAMED, Fixed, LearnedKV


@pytest.mark.parametrize(
    "arguments",
    [["--device", "nonsense"], ["--model", "/no/such/model"], ["--text", "/no/such/text"], ["--keep", "1.5"],
     ["--output", "/no/such/folder/a.png"], ["--policy", "nonsense"], ["--shares", "nonsense"],
     ["--device", "meta", "--interpret"]],
    ids="".join,
)  # fmt: skip
def test_bad_options_end_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.app(["demo", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("kvevict demo: ") and arguments[1] in said
    assert len(said.strip().splitlines()) == 1


class Words:
    """A tokenizer: one token per character."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(c) % 100 for c in text]}

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_text_too_short():
    with pytest.raises(models.Unavailable, match="the text has 5 tokens"):
        demo.build_prompt(Words(), "short", 1000)
    with pytest.raises(models.Unavailable, match="--tokens is 9"):
        demo.build_prompt(Words(), "a" * 1000, 9)


def test_learned_is_the_packages_or_what_is_given(tmp_path):
    from transformers import LlamaConfig

    policies = demo.chosen_policies(["all"], None)
    assert set(policies) == {"recommended", *NAMED} and demo.chosen_policies(["learned"], None) == {}
    demo.add_learned(policies, LlamaConfig(), required=False)
    assert "learned" not in policies
    with pytest.raises(models.Unavailable, match="kvevict train"):
        demo.add_learned(policies, LlamaConfig(), required=True)
    with pytest.raises(models.Unavailable, match="without weights"):
        demo.chosen_policies(["learned"], tmp_path / "none")
    LearnedKV(weights=torch.ones(1, 1, 36), inv_freq=torch.ones(8)).save(tmp_path / "given")
    assert isinstance(demo.chosen_policies(["all"], tmp_path / "given")["learned"], LearnedKV)


@torch.no_grad()
def test_demo_on_a_tiny_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = demo.build_prompt(Words(), "in the beginning " * 40, 400)
    assert ids.shape == (1, 400)
    model.set_attn_implementation("kvevict")
    caches = {}
    with kvevict.backend("reference"):  # the interpreter is slow; it evicts below
        for name, policy in NAMED.items():
            cache = caches[name] = demo.read(model, ids, policy, lambda n: None)
            whole, _ = demo.ask(model, Words(), cache, ids)
            everything, _, _ = demo.evicted(cache, 1.0)
            assert demo.ask(model, Words(), everything, ids)[0] == pytest.approx(whole, abs=1e-4)

    # The same loss and answer without any cache: positions and mask are right.
    question, answer = Words()(demo.QUESTION)["input_ids"], Words()(demo.ANSWER)["input_ids"]
    logits = model(torch.cat([ids, torch.tensor([question + answer])], 1)).logits[0].log_softmax(-1)
    truth = -logits[-len(answer) - 1 : -1].gather(-1, torch.tensor(answer)[:, None]).mean().item()
    with kvevict.backend("reference"):
        loss, said = demo.ask(model, Words(), cache, ids)
    assert loss == pytest.approx(truth, abs=1e-4)
    text = torch.cat([ids, torch.tensor([question])], 1)
    for _ in range(len(answer) + 1):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    assert said == Words().decode(text[0, 400 + len(question) :].tolist())

    rows = [demo.Row("whole cache", 1.0, 400, demo.held_bytes(cache), 0.0, loss, "", [])]
    for name in ("keydiff", "hybrid"):
        half, indices, seconds = demo.evicted(caches[name], 0.5)
        assert len(indices) == 2 and indices[0].shape == (1, 2, 200)
        assert demo.held_bytes(half) * 2 == demo.held_bytes(cache)
        with kvevict.backend("reference"):
            loss, answer = demo.ask(model, Words(), half, ids)
        rows.append(demo.Row(name, 0.5, 200, demo.held_bytes(half), seconds, loss, answer, indices))
    with kvevict.backend("reference"):
        uneven, indices, _ = demo.evicted(caches["keydiff"], Fixed(torch.tensor([[1.0, 3.0], [2.0, 0.5]]), 0.3))
        rows.insert(1, demo.Row("keydiff", 0.3, 120, demo.held_bytes(uneven), 0.0, 3.0, "", indices))
        assert sum(int((x >= 0).sum()) for x in indices) == 2 * 2 * 120
        assert 4 * 120 * 64 <= demo.held_bytes(uneven) <= 4 * (120 + 16) * 64
        with pytest.raises(models.Unavailable, match="--shares is heads: expected none"):
            demo.shared_out("heads", model, 0.3)
        assert demo.shared_out("none", model, 0.3) == 0.3
    place = demo.place_of_fact(Words(), 400)
    assert ids[0, slice(*place)].tolist() == Words()(demo.FACT)["input_ids"]
    for count in (3, 4):  # one policy: every share of it; several: one share of each
        demo.draw(rows[:count], 400, place, "a title", tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 10_000
