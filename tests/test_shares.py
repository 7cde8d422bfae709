"""Measured shares: interpolation, files, what tells one architecture from another."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kvevict.policies import Fixed, Shares, shares


def measured():
    table = torch.tensor([[[0.1, 0.3], [0.05, 0.15]], [[0.5, 0.7], [0.25, 0.55]]])
    return Shares((0.2, 0.6), table, {"model": "tiny", "config": "0123"})


def test_shares_are_linear_between_what_was_measured_and_constant_outside():
    found = measured()
    assert (found.layers, found.heads) == (2, 2)
    for keep, expected in [
        (0.2, [[0.1, 0.3], [0.05, 0.15]]), (0.3, [[0.2, 0.4], [0.1, 0.25]]), (0.5, [[0.4, 0.6], [0.2, 0.45]]),
        (0.6, [[0.5, 0.7], [0.25, 0.55]]), (0.01, [[0.1, 0.3], [0.05, 0.15]]), (1.0, [[0.5, 0.7], [0.25, 0.55]]),
    ]:  # fmt: skip
        torch.testing.assert_close(found.at(keep), torch.tensor(expected))
    torch.testing.assert_close(Shares((0.5,), found.table[:1]).at(0.9), found.table[0])


def test_a_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "tiny.safetensors"
    measured().save(path)
    found = Shares.load(path)
    assert found.keeps == (0.2, 0.6) and torch.equal(found.table, measured().table)
    assert found.metadata == {"model": "tiny", "config": "0123"}


def test_what_is_no_shares_is_refused(tmp_path):
    table = measured().table
    for keeps, wrong, match in [
        ((0.6, 0.2), table, "keeps is"), ((0.2, 0.2), table, "keeps is"), ((0.2, 1.5), table, "keeps is"),
        ((0.2,), table, "table has shape"), ((0.2, 0.6), table[0], "table has shape"),
        ((0.2, 0.6), table.double(), "table has dtype"), ((0.2, 0.6), table - 0.05, "table is"),
        ((0.2, 0.6), table / 0.0, "table is"), ((0.2, 0.6), table * float("nan"), "table is"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            Shares(keeps, wrong)
    path = tmp_path / "wrong.safetensors"
    with pytest.raises(FileNotFoundError):
        Shares.load(path)
    good = {"keeps": torch.tensor([0.2, 0.6], dtype=torch.float64), "table": table}
    for tensors, metadata in [
        (good, None), (good, {"format": "another"}), ({"table": table}, {"format": "kvevict shares"}),
        (good | {"table": -table}, {"format": "kvevict shares"}),
    ]:  # fmt: skip
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"wrong\.safetensors"):
            Shares.load(path)
    path.write_text("no tensors")
    with pytest.raises(ValueError, match=r"wrong\.safetensors holds no shares"):
        Shares.load(path)
    with pytest.raises(ValueError, match="name is 'gpt-9'"):
        Shares.named("gpt-9")


def config(**changes):
    facts = dict(model_type="llama", num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    facts |= dict(num_key_value_heads=2, vocab_size=100, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    return SimpleNamespace(**(facts | changes))


def test_the_hash_tells_architectures_apart_and_no_more():
    base = shares.config_hash(config())
    assert len(base) == 16
    same = [
        config(head_dim=16), config(head_dim=None), config(torch_dtype="bfloat16", use_cache=False),
        config(rope_parameters=None, rope_theta=1e4), config(rope_parameters={"rope_theta": 10000}),
        SimpleNamespace(get_text_config=lambda decoder: config()),
    ]  # fmt: skip
    assert {shares.config_hash(one) for one in same} == {base}
    other = [
        config(model_type="qwen3"), config(num_hidden_layers=3), config(hidden_size=128, head_dim=16),
        config(intermediate_size=97), config(num_attention_heads=8, head_dim=16), config(num_key_value_heads=4),
        config(vocab_size=101), config(head_dim=32), config(rope_parameters={"rope_theta": 1e6}),
        config(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 8.0}),
        config(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}),
        config(rope_parameters={"full_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}),
    ]  # fmt: skip
    assert len({base, *(shares.config_hash(one) for one in other)}) == 1 + len(other)
    older = config(rope_parameters=None, rope_theta=10000, rope_scaling={"type": "linear", "factor": 8})
    newer = config(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 8.0, "type": "linear"})
    assert {shares.config_hash(older), shares.config_hash(newer)} == {shares.config_hash(other[-3])}
    heads = config(num_key_value_heads=None)
    assert shares.config_hash(heads) == shares.config_hash(config(num_key_value_heads=4))


def test_shares_are_found_by_the_config(monkeypatch):
    known = Shares((0.2,), measured().table[:1], {"config": shares.config_hash(config())})
    monkeypatch.setattr(shares, "_packaged", lambda: {"another": measured(), "tiny": known})
    assert shares.find(config()) is known and shares.find(config(vocab_size=7)) is None
    assert Shares.named("tiny") is known


def test_the_package_carries_those_of_smollm2():
    """Found by the sizes that its config says; the best tokens were `keep` of all, and a few heads hold many."""
    smollm2 = config(num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                     num_key_value_heads=3, vocab_size=49152, rope_parameters={"rope_theta": 1e5})  # fmt: skip
    found = shares.find(smollm2)
    assert found is Shares.named("smollm2-135m") and (found.layers, found.heads) == (30, 3)
    torch.testing.assert_close(found.table.mean((1, 2)), torch.tensor(found.keeps), rtol=0, atol=1e-3)
    assert found.table.min() >= 36 / 1024 - 1e-6 and found.table.max() <= 1
    ten = found.at(0.25).flatten().topk(10).values.sum() / 90
    assert 0.38 < ten / 0.25 < 0.46
    counts = Fixed("smollm2-135m", 0.25).per_head(30, 3, 1024, protected=36)
    assert sum(map(sum, counts)) == 90 * 256 and min(map(min, counts)) >= 36
