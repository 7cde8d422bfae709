"""The demo's page: its JSON says what was kept, and a browser shows what its JSON says."""

import base64
import json
import pathlib
import re

import pytest
import torch

pytest.importorskip("transformers")

from browser import browser, needs_chromium

from kvevict import demo, demo_page

TOKENS, LAYERS, HEADS = 203, 3, 2


class Bytes:
    """A tokenizer of bytes, which a character may have several of."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Spaced:
    """Decodes as SentencePiece does: the first word loses the space in front of it."""

    def decode(self, ids):
        return "".join(f" w{i}" for i in ids).removeprefix(" ")


def test_pieces_join_to_the_text():
    for text in ("plain", "né, 你好, 🙂!", "ends in 你"):
        found = demo_page.pieces(Bytes(), list(text.encode()))
        assert "".join(found) == text and len(found) == len(text.encode())
    assert demo_page.pieces(Bytes(), list("né".encode())) == ["n", "", "é"]
    assert "".join(demo_page.pieces(Bytes(), [110, 0xFF, 0xFE, 0xFF, 0xFD, 111, 0xE4]))[-2:] == "o\ufffd"
    assert demo_page.pieces(Spaced(), [3, 1, 2]) == ["w3", " w1", " w2"]


def some_rows():
    torch.manual_seed(0)
    rows = [demo.Row("whole cache", 1.0, TOKENS, 3 << 20, 0.0, 0.25, "Kowalski", [])]
    for name, shared in (("keydiff", False), ("recency", True)):
        for keep, loss in ((0.5, 1.236), (0.1, 2.5)):
            n = int(keep * TOKENS)
            layers = []
            for _ in range(LAYERS):
                scores = torch.rand(1, 1 if shared else HEADS, TOKENS).expand(1, HEADS, -1)
                kept = scores.topk(n).indices.sort().values
                if not shared:
                    kept[0, 1, n - 3 :] = -1  # a head that keeps less
                layers.append(kept)
            said = "</script> <b>" if shared else f"Kow {keep}"
            rows.append(demo.Row(name, keep, n, int(keep * (3 << 20)), 0.0, loss, said, layers))
    return rows


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    rows = some_rows()
    texts = [f" <w{i}>" for i in range(TOKENS)]
    texts[89] = texts[110] = "\n\n"  # not outlined
    about = dict(about="a model, 203 tokens", question="\n\nWho?", right=" Kowalski")
    path = tmp_path_factory.mktemp("page") / "demo.html"
    demo_page.write(demo_page.page_data(rows, texts, (89, 111), about), path)
    return rows, path


def inside(path):
    """The JSON of a page."""
    text = pathlib.Path(path).read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def kept_of(data, cut):
    """{(layer, head): set of kept tokens}, read bit by bit."""
    return {
        (layer, head): {
            i for i in range(len(data["texts"])) if base64.b64decode(data["rows"][row])[i // 8] & (0x80 >> i % 8)
        }
        for layer, of_layer in enumerate(cut["heads"])
        for head, row in enumerate(of_layer)
    }


def test_the_bits_are_what_was_kept(written):
    rows, path = written
    data = inside(path)
    assert data["fact"] == [90, 110] and data["whole"]["heads"] == [] and len(data["cuts"]) == 4
    for row, cut in zip(rows[1:], data["cuts"], strict=True):
        wanted = {
            (i, j): {int(x) for x in layer[0, j] if x >= 0} for i, layer in enumerate(row.indices) for j in range(HEADS)
        }
        assert kept_of(data, cut) == wanted
        assert [cut[name] for name in ("policy", "keep", "tokens", "loss", "answer")] == [
            row.policy, row.keep, row.tokens, row.loss, row.answer
        ]  # fmt: skip
    assert len(data["rows"]) == 2 * LAYERS * HEADS + 2 * LAYERS  # shared choices are stored once
    assert "http" not in path.read_text(encoding="utf-8")


def test_the_demo_writes_it(monkeypatch, tmp_path, capsys):
    """Of a run on a tiny model, with the numbers that its table prints."""
    from test_demo import Words
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    monkeypatch.setattr(demo.models, "load", lambda name, device: (LlamaForCausalLM(config).eval(), Words()))
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    options = ("tiny", None, 400, [0.5, 0.25], ["keydiff"], "none", None, "cpu", tmp_path / "a.png")
    rows = demo.run(*options, html=tmp_path / "a.html")
    data = inside(tmp_path / "a.html")
    shown = [data["whole"], *data["cuts"]]
    assert [(cut["keep"], cut["bytes"], cut["loss"]) for cut in shown] == [(r.keep, r.bytes, r.loss) for r in rows]
    assert "".join(data["texts"]) == Words().decode(
        demo.build_prompt(Words(), demo.models.sample_text(), 400)[0].tolist()
    )
    assert len(kept_of(data, data["cuts"][1])[1, 1]) == 100
    assert f"page: {tmp_path}/a.html" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(
        demo.models.Unavailable, match="--html is .*nowhere/a.html: expected a file in an existing folder"
    ):
        demo.run(*options, html=tmp_path / "nowhere/a.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


STATE = """({
    answer: at("answer").textContent, loss: at("loss").textContent, kept: at("kept").textContent,
    mib: at("mib").textContent, fact: at("fact-share").textContent, keep: at("keep-text").textContent,
    shares: [...document.querySelectorAll("#text span")].map(s => s.style.getPropertyValue("--share")),
    gone: [...document.querySelectorAll("#text span.gone")].map(s => Number(s.dataset.index)),
    current: [...document.querySelectorAll("tr[aria-current] > *")].map(c => c.textContent),
})"""


def chosen(chromium, **values):
    for name, value in values.items():
        chromium.ask(f'at("{name}").value = "{value}"; at("{name}").dispatchEvent(new Event("input"))')
    return chromium.ask(STATE)


def check(state, data, cut, kept):
    """What is shown is the cut's, of the heads in `kept`."""
    inside = sum(i in of_head for of_head in kept.values() for i in range(*data["fact"]))
    counts = [sum(i in of_head for of_head in kept.values()) for i in range(len(data["texts"]))]
    assert [float(share.rstrip("%")) for share in state["shares"]] == pytest.approx(
        [100 * n / len(kept) for n in counts]
    )
    assert state["gone"] == [i for i, n in enumerate(counts) if not n]
    share = 100 * inside / (len(kept) * (data["fact"][1] - data["fact"][0]))
    assert float(state["fact"].rstrip(" %")) == pytest.approx(share, abs=0.5001)
    assert state["answer"] == cut["answer"] and state["kept"] == str(cut["tokens"])
    assert state["loss"] == f"{cut['loss']:.2f}" and state["mib"] == f"{cut['bytes'] / 2**20:.1f}"
    name, keep = ("whole cache", "") if cut is data["whole"] else (cut["policy"], f"{cut['keep']:g}")
    assert state["current"] == [name, keep, f"{cut['loss']:.2f}", cut["answer"]]


@needs_chromium
def test_slider_and_pickers_change_what_is_shown(written, chromium):
    _, path = written
    data = inside(path)
    chromium.open(path.as_uri())
    assert chromium.requests == [path.as_uri()]
    for policy in ("keydiff", "recency"):
        cuts = sorted((cut for cut in data["cuts"] if cut["policy"] == policy), key=lambda cut: cut["keep"])
        for step, cut in enumerate(cuts):
            kept = kept_of(data, cut)
            check(chosen(chromium, policy=policy, keep=step, layer="all", head="all"), data, cut, kept)
            one = {(2, 1): kept[2, 1]}
            check(chosen(chromium, layer=2, head=1), data, cut, one)
            check(chosen(chromium, layer="all"), data, cut, {k: v for k, v in kept.items() if k[1] == 1})
    everything = {(0, 0): set(range(TOKENS))}
    check(chosen(chromium, keep=2, layer="all", head="all"), data, data["whole"], everything)
    assert chromium.ask('at("question").textContent + at("right").textContent') == "Who?Kowalski"
    assert chromium.ask('at("text").textContent') == "".join(data["texts"])
    assert chromium.ask('document.querySelector("#text .fact").textContent') == "".join(data["texts"][90:110])
    border = 'getComputedStyle(document.querySelector("#text .fact")).borderTopStyle'
    crossed = 'getComputedStyle(document.querySelector("#text .gone")).textDecorationLine'  # and so without colour
    chosen(chromium, policy="keydiff", keep=0, layer=0, head=0)
    assert chromium.ask(border) == "double" and chromium.ask(crossed) == "line-through"
    assert not chromium.errors


@needs_chromium
def test_by_keyboard_and_on_a_phone(written, chromium):
    _, path = written
    chromium.open(path.as_uri(), width=360, height=700)
    assert chromium.ask("document.documentElement.scrollWidth") <= 360
    order = []
    for _ in range(5):
        chromium.press("Tab")
        order.append(chromium.ask("document.activeElement.id"))
    assert order == ["policy", "keep", "layer", "head", "text"]
    before = chromium.ask(STATE)
    chromium.press("ArrowRight", "ArrowRight")
    assert chromium.ask('at("token").textContent').startswith("Token 91, “ <w91>”: kept by ")
    chromium.press("End")
    assert chromium.ask('at("token").textContent').startswith("Token 202, ")
    chromium.ask('at("keep").focus()')
    chromium.press("Home")
    after = chromium.ask(STATE)
    assert (before["keep"], after["keep"]) == ("0.5 of the cache", "0.1 of the cache")
    assert before["shares"] != after["shares"]
    assert not chromium.errors
