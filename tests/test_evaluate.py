"""`kvevict eval`: its cells are what they say, its errors are those of contexts, and it goes on where it was."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

import test_hf
import transformers
from test_quality import TEXT, Characters, tiny
from transformers import DynamicCache

import kvevict
from kvevict import cli, evaluate, models, tasks
from kvevict.hf import EvictingCache
from kvevict.policies import FAR, TOVA, AttentionMass, KeyDiff, Learned, Shares

NAMES = ("recommended", "keydiff", "snapkv", "kvzip")
BASE = ("recommended", "shared")
SHARES = Shares((0.5,), torch.tensor([[[0.9, 0.5], [0.4, 0.2]]]))  # two layers of two heads


def test_questions_ask_for_what_a_context_hides():
    context, asked = tasks.build(3, Characters(), TEXT, 1000)
    assert (context, asked) == tasks.build(3, Characters(), TEXT, 1000) and len(context) == 1000
    assert [one.task for one in asked] == [task for task in tasks.TASKS for _ in range(3)]
    assert len({tuple(one.question) for one in asked}) == 12
    words = Characters().decode(context)
    for task, question, answer in asked:
        said = Characters().decode(question + answer)
        if task == "fact":
            city = said.split("number of ")[-1].partition(" is")[0]
            assert f"The magic number of {city} is{Characters().decode(answer)}." in words
        elif task == "code":
            assert said.split("above:\n")[1] + "\n" in words
        else:
            assert said.split("\n")[-1] in words


def test_a_context_that_has_no_room_is_refused():
    with pytest.raises(ValueError, match="tokens is 300: expected 500 to"):
        tasks.build(0, Characters(), TEXT, 300)
    with pytest.raises(ValueError, match=r"tokens is 500: expected at least \d+, which is what is hidden"):
        tasks.build(0, Characters(), TEXT, 500)  # of single characters


def test_columns_keep_the_same_in_all():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(1, 2, 200, generator=generator) for _ in range(2)]
    counts = {
        column: [(x[0] >= 0).sum(-1).tolist() for x in evaluate.choices(scores, column, 0.5, SHARES, (4, 32))]
        for column in evaluate.COLUMNS
    }
    assert counts["each"] == counts["shared"] == [[100, 100], [100, 100]]
    assert counts["layer shares"] == [[140, 140], [60, 60]]  # as 0.7 to 0.3
    assert counts["head shares"] == [[180, 100], [80, 40]]
    assert sum(map(sum, counts["model-wide"])) == 400
    for column in ("shared", "layer shares"):
        assert all((x[:, 0] == x[:, 1]).all() for x in evaluate.choices(scores, column, 0.5, SHARES, (4, 32)))


@torch.no_grad()
def test_losses_are_those_of_plain_forwards():
    model = tiny()
    model.set_attn_implementation("kvevict")
    context, asked = tasks.build(0, Characters(), TEXT, 1000)
    with kvevict.backend("reference"):
        policies = evaluate.named(NAMES, model)
        results = evaluate.run_context(model, Characters(), context, asked, [0.5], evaluate.COLUMNS, SHARES, policies)
    assert {policy: set(columns) for policy, columns in results.items()} == {
        "whole": {"whole"}, **dict.fromkeys(NAMES, set(evaluate.COLUMNS))
    }  # fmt: skip
    cache = DynamicCache()
    model(torch.tensor([context]), past_key_values=cache)
    kept = [KeyDiff().compact(x.keys, x.values, keep=0.5, inplace=False)[:2] for x in cache.layers]
    for i, (_, question, answer) in enumerate(asked):
        target, positions = torch.tensor(answer)[:, None], torch.arange(1000, 1000 + len(question + answer))[None]
        for found, past in (
            (results["whole"]["whole"]["1.0"], [(x.keys[:, :, :1000], x.values[:, :, :1000]) for x in cache.layers]),
            (results["keydiff"]["each"]["0.5"], kept),
        ):
            ids = torch.tensor([question + answer])
            logits = model(ids, past_key_values=DynamicCache(past), position_ids=positions).logits[0].log_softmax(-1)
            loss = -logits[-len(answer) - 1 : -1].gather(-1, target).mean().item()
            assert found[i][0] == pytest.approx(loss, abs=1e-4)


def test_errors_are_of_contexts():
    """Two contexts of two questions: the paired differences are 1 and 3, and 0 and 0; by context 2 and 0."""

    def line(base, other):
        cells = {policy: {c: {"0.5": base} for c in evaluate.COLUMNS} for policy in NAMES}
        cells["keydiff"] = cells["keydiff"] | {"each": {"0.5": other}}
        return dict(tasks=["fact", "list"], results={"whole": {"whole": {"1.0": base}}, **cells})

    lines = [
        line([(1.0, True), (2.0, False)], [(2.0, False), (5.0, False)]),
        line([(4.0, True)] * 2, [(4.0, True)] * 2),
    ]
    rows = evaluate.summary(lines, BASE)
    row = next(row for row in rows if (row["policy"], row["column"]) == ("keydiff", "each"))
    assert (row["task"], row["loss"], row["hits"], row["questions"]) == ("all", 3.75, 0.5, 4)
    assert (row["difference"], row["over_whole"]) == (1.0, 1.0)
    assert row["difference_error"] == row["over_whole_error"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    # 2 of the whole cache's 3 right answers; 0 of 1 and 2 of 2 by context, off by -2/3 and +2/3, of 3/2 in the mean
    assert row["of_whole"] == pytest.approx(2 / 3)
    assert row["of_whole_error"] == pytest.approx(math.sqrt(8 / 9) / math.sqrt(2) / 1.5)
    table = evaluate.markdown(rows, "caption", BASE, False)
    assert "| keydiff | 3.75, 67% ± 44% (+1.00 ± 1.00) |" in table
    of_lists = [r for r in rows if r["task"] == "list" and (r["policy"], r["column"]) == ("keydiff", "each")]
    assert [(r["loss"], r["questions"], r["difference"]) for r in of_lists] == [(4.5, 2, 1.5)]
    assert "## list: 2 questions in 2 contexts" in table


def test_budgets_that_cannot_be_are_refused():
    assert evaluate.columns_of([], None) == ["each", "shared", "model-wide"]
    assert evaluate.columns_of(["model-wide", "head shares"], SHARES) == ["head shares", "model-wide"]
    with pytest.raises(models.Unavailable, match="--budgets has 'head shares' .none are known"):
        evaluate.columns_of(["head shares"], None)
    with pytest.raises(models.Unavailable, match="--budgets has 'fair': expected each, shared"):
        evaluate.columns_of(["fair"], SHARES)


@torch.no_grad()
def test_a_question_that_is_seen_is_part_of_what_is_cut():
    """With everything kept but one token, the loss is close to the whole cache's; and policies see the question."""
    model = tiny()
    model.set_attn_implementation("kvevict")
    context, asked = tasks.build(0, Characters(), TEXT, 1000)
    looked = []

    class Watched(KeyDiff):
        def scores(self, seen):
            looked.append(seen.keys.shape[2])
            return super().scores(seen)

    with kvevict.backend("reference"):
        policies = {"watched": Watched()}
        results = evaluate.run_context(
            model, Characters(), context, asked[:2], [0.999], ["each"], None, policies, seen=True
        )
        unseen = evaluate.run_context(model, Characters(), context, asked[:2], [0.5], ["each"], None, {}, seen=False)
    assert set(looked) == {1000 + len(one.question) - 1 for one in asked[:2]}
    whole, cut = results["whole"]["whole"]["1.0"], results["watched"]["each"]["0.999"]
    assert len(whole) == len(cut) == 2
    for a, b, c in zip(whole, unseen["whole"]["whole"]["1.0"], cut, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[0] == pytest.approx(c[0], abs=0.1)


def test_it_goes_on_where_it_was_and_refuses_what_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device: (tiny(), Characters()))
    monkeypatch.setattr(models, "sample_text", lambda: "in the beginning " * 300)
    out, done = tmp_path / "eval", []

    def read(model, tokenizer, context, asked, keeps, columns, shares, policies, seen):
        done.append(context)
        cells = {column: {str(keep): [(0.5 + len(done), True)] * len(asked) for keep in keeps} for column in columns}
        return {"whole": {"whole": {"1.0": [(0.5, True)] * len(asked)}}} | dict.fromkeys(policies, cells)

    monkeypatch.setattr(evaluate, "run_context", read)

    def run(contexts, keeps=(0.5,)):
        with kvevict.backend("reference"):
            return evaluate.run(
                "tiny", None, 1000, contexts, ["keydiff", "recency"], keeps, ["each"], None, None, False, "cpu", out
            )

    run(1)
    first = (out / "eval.jsonl").read_text()
    rows = run(2)
    both = (out / "eval.jsonl").read_text()
    assert both.startswith(first) and rows[0]["contexts"] == 2
    saved = json.loads((out / "eval.json").read_text())
    assert saved["base"] == ["keydiff", "each"] and len(saved["rows"]) == 5 * (1 + 2)
    assert (out / "eval.png").stat().st_size > 10_000 and "| recency |" in (out / "eval.md").read_text()
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    with pytest.raises(models.Unavailable, match="holds another evaluation"):
        run(2, keeps=(0.25,))
    assert run(1)[0]["contexts"] == 1 and (out / "eval.jsonl").read_text() == both  # as many as are asked for
    told = json.loads((out / "eval.json").read_text(), parse_constant=pytest.fail)  # strictly JSON, no NaN
    assert told["rows"][0]["over_whole_error"] is None

    def without(line):  # as older versions wrote it
        line["settings"] = {k: v for k, v in line["settings"].items() if k not in ("config", "packaged")}
        return json.dumps(line) + "\n"

    (out / "eval.jsonl").write_text(without(json.loads(first)) + both.splitlines()[1][:500])  # and was killed
    monkeypatch.setattr(evaluate, "check_served", lambda *_: None)
    done = []
    monkeypatch.setattr(
        evaluate, "run_context", lambda *_: done.append(0) or json.loads(both.splitlines()[1])["results"]
    )
    assert run(2)[0]["contexts"] == 2 and len(done) == 1
    assert [json.loads(line)["sample"] for line in (out / "eval.jsonl").read_text().splitlines()] == [0, 1]


def test_what_is_no_evaluation_is_refused(tmp_path):
    def run(out):
        evaluate.run("x", None, 1000, 1, ["keydiff"], [0.5], [], None, None, False, "cpu", out)

    (tmp_path / "eval.jsonl").write_text('{"sample": 0}\n')
    with pytest.raises(models.Unavailable, match=r"eval\.jsonl, line 1, is no result of `kvevict eval`"):
        run(tmp_path)
    with pytest.raises(models.Unavailable, match=r"--out is .*eval\.jsonl: expected a folder"):
        run(tmp_path / "eval.jsonl")


def test_settings_say_which_scorer_the_package_had():
    model, shares = tiny(), Shares((0.5,), torch.ones(1, 2, 2), {"date": "2026-01-02"})
    weights = (torch.zeros(2, 2, 32), torch.zeros(2, 2))
    policies = {"learned": Learned(weights=weights, metadata={"date": "2026-01-01"})}
    said = evaluate._unnamed(model, policies, shares, None, None)
    assert said["packaged"] == {"scorer": "2026-01-01", "kvevict": kvevict.__version__, "shares": "2026-01-02"}
    assert not evaluate._of_these(said, said | {"packaged": {}}) and evaluate._of_these({"a": 1}, {"a": 1} | said)
    assert not evaluate._of_these({"a": 1}, {"a": 1, "scorer": "s"} | said)


def test_files_are_told_by_name_and_content(tmp_path, monkeypatch):
    """Results go public: no path in them. Another file of the same name is another evaluation."""
    model = tiny()
    monkeypatch.setattr(models, "load", lambda name, device: (model, Characters()))
    text, path, out = tmp_path / "text.txt", tmp_path / "s.safetensors", tmp_path / "eval"
    text.write_text("in the beginning " * 300)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)

    def run():
        weights = (torch.randn(*shape, model.config.hidden_size), torch.randn(shape))
        Learned(weights=weights, shares=SHARES).save(path)
        with kvevict.backend("reference"):
            evaluate.run(str(tmp_path), text, 1000, 1, ["learned"], [0.5], ["each"], path, None, False, "cpu", out)

    run()
    for name in ("eval.jsonl", "eval.json", "eval.md"):
        assert str(tmp_path) not in (out / name).read_text()
    assert json.loads((out / "eval.jsonl").read_text())["settings"]["model"] == tmp_path.name
    with pytest.raises(models.Unavailable, match="holds another evaluation"):
        run()


@pytest.mark.parametrize(
    "arguments, said",
    [(["--keep", "1.5"], "--keep is 1.5"), (["--keep", "many"], "--keep is many"), (["--contexts", "0"], "--contexts"),
     (["--out", "/no/such/folder/x"], "--out is /no/such"), (["--device", "nonsense"], "nonsense")],
)  # fmt: skip
def test_bad_options_end_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.app(["eval", *arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith("kvevict eval: ") and said in printed
    assert len(printed.strip().splitlines()) == 1


def test_names_that_are_not_known_are_refused():
    with pytest.raises(models.Unavailable, match="--policies has nonsense: expected one of recommended, keydiff"):
        evaluate.named(["nonsense"], tiny())
    with pytest.raises(models.Unavailable, match="kvevict train"):
        evaluate.named(["learned"], tiny())


@torch.no_grad()
def test_far_attention_is_that_of_later_queries():
    model = tiny()
    with kvevict.backend("reference"):
        layers, captured = evaluate.read(model, TEXT[:150])
        observed = evaluate.observe(layers, captured, *FAR.noted)
    model.set_attn_implementation("eager")
    weights = model(torch.tensor([TEXT[:150]]), output_attentions=True).attentions
    for seen, layer in zip(observed, weights, strict=True):
        far = layer[0].unflatten(0, (2, 2)).tril(-32).amax((1, 2))
        torch.testing.assert_close(seen["mass"][0], far, rtol=1e-4, atol=1e-6)
    model.set_attn_implementation("kvevict")
    context, asked = tasks.build(0, Characters(), TEXT, 1000)
    with kvevict.backend("reference"):
        policies = evaluate.named(["far", "attention"], model)
        results = evaluate.run_context(model, Characters(), context, asked[:1], [0.3], ["each"], None, policies)
        layers, captured = evaluate.read(model, context)
        kept = [
            FAR.choose(FAR.scores(kvevict.policies.Observed(keys=k, **o)), 0.3)
            for (k, _), o in zip(layers, evaluate.observe(layers, captured, *FAR.noted), strict=True)
        ]
        expected = evaluate.ask(model, evaluate.cut(model, layers, kept), 1000, asked[0].question, asked[0].answer)
    assert results["far"]["each"]["0.3"][0][0] == pytest.approx(expected[0], abs=1e-4)


@torch.no_grad()
def test_a_scorer_of_hidden_states_is_read_from_its_file(tmp_path):
    model, path = tiny(), tmp_path / "s.safetensors"
    config = model.config
    L, H, M = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size
    Learned(weights=(torch.randn(L, H, M), torch.randn(L, H)), shares=SHARES).save(path)
    policies = evaluate.named(["learned"], model, path)
    assert isinstance(policies["learned"], Learned)
    assert torch.equal(evaluate._shares(policies, config).table, SHARES.table)
    model.set_attn_implementation("kvevict")
    context, asked = tasks.build(0, Characters(), TEXT, 1000)
    with kvevict.backend("reference"):
        found = evaluate.run_context(model, Characters(), context, asked[:1], [0.3], ["model-wide"], None, policies)
    assert math.isfinite(found["learned"]["model-wide"]["0.3"][0][0])
    Learned(weights=(torch.randn(L, H, M + 1), torch.randn(L, H))).save(path)
    with pytest.raises(models.Unavailable, match="--policies has learned: policy has weights for 2 layers of width"):
        evaluate.named(["learned"], model, path)
    with pytest.raises(models.Unavailable, match="--policies has learned: .*none"):
        evaluate.named(["learned"], model, tmp_path / "none")


WINDOW = dict(sliding_window=24, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
FAMILIES = {
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, WINDOW | dict(head_dim=16)),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {}),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, {}),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM, dict(attention_multiplier=0.02)),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_kept_and_answered_is_an_evicting_caches(family):
    """Layers with a window are carried along; projections have any name; logits have the model's own scale."""
    config, model_class, options = FAMILIES[family]
    model = test_hf.tiny(config, model_class, **options)
    model.set_attn_implementation("kvevict")
    ids = [token % 120 for token in TEXT]
    context, asked = ids[:100], [tasks.Question("fact", ids[i : i + 9], ids[i + 9 : i + 12]) for i in (100, 130)]
    count, heads = model.config.num_hidden_layers, EvictingCache(model, keep=0.5)._heads
    weights = torch.randn(count, heads, model.config.hidden_size), torch.zeros(count, heads)
    policies = dict(keydiff=KeyDiff(), tova=TOVA(), attention=AttentionMass(), learned=Learned(weights=weights))
    if family == "gpt_neox":  # whose attention is not told of its cache by name, which hidden states need
        del policies["learned"]
    with kvevict.backend("reference"):
        evaluate.check_served(model, policies, ids)
        results = evaluate.run_context(
            model, Characters(), context, asked, [0.5], ["each", "shared", "model-wide"], None, policies
        )
        for name, policy in policies.items():
            column = {"learned": "model-wide", "tova": "shared"}.get(name, "each")
            for i, (_, question, answer) in enumerate(asked):
                cache = EvictingCache(model, policy, keep=0.5)
                model(torch.tensor([context]), past_key_values=cache)
                logits = model(torch.tensor([question + answer]), past_key_values=cache).logits[0].log_softmax(-1)
                target = torch.tensor(answer)[:, None]
                loss = -logits[-len(answer) - 1 : -1].gather(-1, target).mean().item()
                assert results[name][column]["0.5"][i][0] == pytest.approx(loss, rel=1e-4)
    assert results["keydiff"] != results["tova"]


UNSERVED = {
    "no layer that grows": (transformers.MistralConfig, transformers.MistralForCausalLM, dict(sliding_window=24)),
    "kvzip: heads are to keep": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, dict(
        q_lora_rank=None, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        num_key_value_heads=4, first_k_dense_replace=8)),
    "expected at most 512, the model's positions": (transformers.LlamaConfig, transformers.LlamaForCausalLM, dict(
        max_position_embeddings=512)),
}  # fmt: skip


@pytest.mark.parametrize("said", UNSERVED)
def test_models_that_are_not_served_are_refused_before_a_context_is_read(said, tmp_path, monkeypatch):
    config, model_class, options = UNSERVED[said]
    model = test_hf.tiny(config, model_class, vocab_size=128, **options)
    monkeypatch.setattr(models, "load", lambda name, device: (model, Characters()))
    monkeypatch.setattr(models, "sample_text", lambda: "in the beginning " * 300)
    with pytest.raises(models.Unavailable, match=said) as caught, kvevict.backend("reference"):
        evaluate.run("x", None, 1000, 1, ["kvzip"], [0.5], [], None, None, False, "cpu", tmp_path / "eval")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "eval").exists()


@torch.no_grad()
def test_what_attention_does_not_show_and_shares_of_another_model_are_refused(tmp_path, monkeypatch):
    options = WINDOW | dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    model = test_hf.tiny(transformers.GptOssConfig, transformers.GptOssForCausalLM, **options)
    with pytest.raises(models.Unavailable, match="--policies has attention: .*attention sinks"):
        evaluate.check_served(model, {"attention": AttentionMass()}, [token % 120 for token in TEXT])
    Shares((0.5,), torch.ones(1, 3, 2)).save(tmp_path / "s.safetensors")
    monkeypatch.setattr(models, "load", lambda name, device: (tiny(), Characters()))
    monkeypatch.setattr(models, "sample_text", lambda: "in the beginning " * 300)
    with pytest.raises(models.Unavailable, match="shares for 'head shares': .*3"), kvevict.backend("reference"):
        evaluate.run("x", None, 1000, 1, ["keydiff"], [0.5], ["head shares"], None, tmp_path / "s.safetensors", False,
                     "cpu", tmp_path / "eval")  # fmt: skip
