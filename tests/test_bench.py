"""The benchmark itself: its schema, its gate, its comparison, and the launches that the README promises."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from conftest import HAS_GPU
from launches import launches

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import kvevict
from bench import compare, measure, report
from bench.cases import ALL
from bench.traffic import counted
from kvevict.paged import paged_decode_attention, paged_keydiff_compact

pytestmark = pytest.mark.skipif(HAS_GPU, reason="counts in Triton's interpreter")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`python -m bench`, in this process, where the interpreter is fast."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["bench", "--quick", "--out", str(out)])
        runpy.run_module("bench", run_name="__main__")
    assert ended.value.code == 0
    return out


def test_quick_run_writes_what_the_schema_says(quick):
    result = json.loads((quick / "bench.json").read_text())
    assert result["schema"] == 2 and result["kind"] == "counted, not timed" and result["device"] == "cpu"
    assert set(result) == {"schema", "kind", "device", "ceilings", "versions", "caption", "rows"}
    assert set(result["ceilings"]) == {"bandwidth", "operations", "source"}
    assert {row["case"] for row in result["rows"]} == {case.name for case in ALL}
    for row in result["rows"]:
        assert set(row) == {"case", "label", "point", "agrees", "floor_bytes", "operations", "bytes", "launches",
                            "fills", "share", "predicted_seconds", "kernels", "cpu_reference", "peers"}  # fmt: skip
        assert row["agrees"] is True and 0 < row["share"] <= 1 and row["launches"] >= 1
        assert row["predicted_seconds"] > 0 and row["cpu_reference"]["seconds"] > 0
        assert sum(row["kernels"].values()) == pytest.approx(row["bytes"] / 3.35e12)
        for peer in row["peers"].values():
            assert set(peer) == {"missing"} or peer["low"] <= peer["seconds"] <= peer["high"]
    text = (quick / "bench.md").read_text()
    assert text.startswith("counted, not timed") and "flash_colreduce is not importable here" in text
    for name in ("roofline", "speedup", "time", "stages"):
        assert (quick / f"{name}.png").stat().st_size > 10_000


def test_twice_the_bytes_fail_the_gate(quick):
    rows = json.loads((quick / "bench.json").read_text())["rows"]
    assert measure.gate(rows, ALL) == []
    for row in rows:
        (wrong,) = measure.gate([row | dict(bytes=2 * row["bytes"])], ALL)
        where = f"{row['case']} at {row['label']}"
        assert wrong.startswith(f"{where}: asks for ") and "floors, allowed are" in wrong
        assert measure.gate([row | dict(agrees=False)], ALL) == [f"{where}: differs from the reference"]


def test_a_wrong_op_is_found():
    case = next(case for case in ALL if case.name == "topk_indices")
    point = case.points(False, True)[0]
    assert measure.agrees(case, point, "cpu")
    worst = replace(case, run=lambda point, scores: case.run(point, -scores if kvevict_backend() else scores))
    assert not measure.agrees(worst, point, "cpu")


def kvevict_backend():
    from kvevict.backends import pick

    return pick(torch.device("cpu")).__name__.endswith("triton")


def test_compare_flags_changes_beyond_the_spread(tmp_path, capsys):
    def result(**rows):
        rows = [dict(case=case, label="S1", **figures) for case, figures in rows.items()]
        return dict(schema=2, kind="timed", device="X", rows=rows)

    before = result(a=dict(seconds=1.0, low=0.9, high=1.1), b=dict(seconds=1.0, low=0.9, high=1.1), c=dict(bytes=10))
    after = result(a=dict(seconds=1.15, low=1.05, high=1.2), b=dict(seconds=1.5, low=1.4, high=1.6), c=dict(bytes=20))
    assert compare.changes(before, after) == [("b", "S1", "seconds", 1.5), ("c", "S1", "bytes", 2.0)]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, written in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(written))
    assert compare.main(paths) == 1 and compare.main(paths[::-1]) == 0 and compare.main([paths[0]] * 2) == 0
    assert "worse: b S1: seconds × 1.500" in capsys.readouterr().out
    paths[1].write_text(json.dumps(after | dict(kind=report.COUNTED)))
    with pytest.raises(SystemExit, match="expected the same kind"):
        compare.main(paths)


@pytest.mark.parametrize(
    ("S", "options", "launches", "fills"),
    [(512, {}, 3, 0), (1024, {}, 4, 1), (8192, {}, 4, 1), (16384, {}, 8, 1), (512, dict(heads="shared"), 3, 0),
     (512, dict(preserve_order=False), 4, 0), (512, dict(inplace=False), 3, 0), (512, dict(heads="adaptive"), 5, 1)],
    ids=str,
)  # fmt: skip
def test_launches_of_keydiff_compact(S, options, launches, fills):
    """Of rows too long for one program a GPU selects in one launch; the interpreter takes five, a round each. What is
    filled is the sum of unit keys, beside rows of one program."""
    keys, values = (torch.randn(1, 2, S, 16) for _ in range(2))
    with kvevict.backend("triton"), counted() as traffic:
        kvevict.keydiff_compact(keys, values, keep=0.5, **options)
    assert (traffic.launches, traffic.fills) == (launches, fills)


def test_inputs_are_restored_between_rounds(monkeypatch):
    """A cache that was compacted in place has its kept rows in front: fewer would move in the next run."""
    monkeypatch.setattr(measure, "L2", 0)
    (case,) = [case for case in ALL if case.name == "keydiff_compact"]
    point = replace(case.points(False, True)[0], S=64, D=16)
    inputs = measure.Inputs(case, point, "cpu")
    before = [x.clone() for x in inputs.sets[0]]
    for each in inputs.sets:
        case.run(point, *each)
        assert not torch.equal(each[0], before[0])
    inputs.restore()
    assert all(torch.equal(x, y) for each in inputs.sets for x, y in zip(each, before, strict=True))


def test_launches_of_paged_calls_with_their_checks():
    cache = torch.randn(2, 8, 16, 2, 16)
    table, lengths = torch.arange(8, dtype=torch.int32).view(2, 4), torch.tensor([60, 33])
    query = torch.randn(2, 4, 1, 16)
    for expected in (3, 2):  # table and lengths are checked in one launch, and not again while they stay the same
        with kvevict.backend("triton"), counted() as traffic:
            paged_decode_attention(query, *cache, table, lengths)
        assert (traffic.launches, traffic.fills) == (expected, 0)


@pytest.mark.parametrize("options, expected", [
    (dict(keep=0.5), 5),  # count, score, select, move, free blocks
    (dict(keep=torch.tensor([20, 10])), 5),
    (dict(keep=0.5, to="tail"), 5),
    (dict(keep=20, to="tail", preserve_order=False), 7),
], ids=str)  # fmt: skip
def test_launches_of_paged_keydiff_compact(options, expected):
    """Torch's own as well. A new table costs 11 more: whether it is in range, and no block is shared."""
    cache = torch.randn(2, 8, 16, 2, 16)
    table, lengths = torch.arange(8, dtype=torch.int32).view(2, 4), torch.tensor([60, 33])
    for more in (11, 0):
        with kvevict.backend("triton"), launches() as names:
            paged_keydiff_compact(*cache, table, lengths, **options)
        assert len(names) == expected + more, names


@pytest.mark.parametrize(
    ("name", "launches"),
    [("keydiff_scores", 1), ("key_norm_scores", 1), ("topk_indices", 1), ("pool_scores", 1), ("evict_slots", 1),
     ("attention_mass", 2), ("decode_attention", 2)],
)  # fmt: skip
def test_launches_of_short_calls(name, launches):
    keys, queries = torch.randn(1, 2, 200, 16), torch.randn(1, 4, 1, 16)
    scores = torch.randn(1, 2, 200)
    arguments = dict(
        keydiff_scores=(keys,), key_norm_scores=(keys,), topk_indices=(scores, 0.5), pool_scores=(scores, 5),
        evict_slots=(scores, 1), attention_mass=(queries, keys), decode_attention=(queries, keys, keys.clone()),
    )[name]  # fmt: skip
    with kvevict.backend("triton"), counted() as traffic:
        getattr(kvevict, name)(*arguments)
    assert (traffic.launches, traffic.fills) == (launches, 0)


def test_generate_runs_on_a_tiny_model(tmp_path):
    pytest.importorskip("transformers")
    from bench import generate

    with kvevict.backend("reference"):
        row = generate.measure(generate.build("cpu"), 300, 2, 3.35e12)
    assert row["whole_cache_bytes"] == 4 * 2 * 2 * 2 * 16 * 4 * (300 + 32)
    assert row["cut_cache_bytes"] == 4 * 2 * 2 * 2 * 16 * 4 * (75 + 32)
    assert 0 < row["eviction_share_of_prefill"] and row["planned_break_even_steps"] > 0


def test_overhead_measures_calls_without_kernels():
    from bench import overhead

    with kvevict.backend("reference"):
        calls = overhead.calls("cpu")
    stub = overhead.nothing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvevict.custom_ops.pick", lambda device: stub)
        assert all(0 < overhead.microseconds(call, calls=5, repeats=1) < 1e5 for call, _ in calls.values())
