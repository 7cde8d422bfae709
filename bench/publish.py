"""`python -m bench.publish`: what `kvevict plan` quotes, kvevict/data/quality.json, made from results that are here.

A row: right answers as a share of the whole cache's (`kept`) for a policy and a budget, with the question unseen or
seen. Only what an EvictingCache serves is quoted: each policy with the budgets that its scores allow.
"""

import json
import pathlib

import kvevict
from bench import RESULTS
from kvevict import models

QUOTED = pathlib.Path(kvevict.__file__).parent / "data/quality.json"
EQUAL = {"tova + keydiff": "RECOMMENDED", "keydiff": "KeyDiff"}  # as bench.quality calls them
SHARED_OUT = {  # as kvevict eval does: its columns, and what the planner calls them
    "recommended": ("RECOMMENDED", dict(shared="equal") | dict.fromkeys(("layer shares", "head shares"))),
    "keydiff": ("KeyDiff", dict(each="equal") | dict.fromkeys(("layer shares", "head shares"))),
    "learned": ("learned", dict.fromkeys(("layer shares", "head shares", "model-wide"))),
}
# Results of bench.quality and of kvevict eval: file, tokens, whether the question was in what was cut. Those of a few
# questions (quality-4000) are not quoted.
OF_POLICIES = (("quality-1000.json", 1000, "seen"),)
OF_BUDGETS = (
    ("eval-smollm2-135m-unseen-1000/eval.json", 1000, "unseen"),
    ("eval-smollm2-135m-unseen-2000/eval.json", 2000, "unseen"),
)


def rows(folder=RESULTS / "cpu", model=models.SMOLLM2):
    """All rows to quote of the model."""
    found = []
    for name, tokens, mode in OF_POLICIES:
        found += of_policies(json.loads((folder / name).read_text())["rows"], model, tokens, mode)
    for name, tokens, mode in OF_BUDGETS:
        found += of_budgets(json.loads((folder / name).read_text())["rows"], model, tokens, mode)
    return found


def of_policies(results, model, tokens, mode):
    """Of bench.quality's tasks that ask for something in the text."""
    asked = [row for row in results if row["mode"] == mode and row["task"] != "continuation"]
    whole = sum(row["hits"] * row["samples"] for row in asked if row["policy"] == "whole")
    samples = sum(row["samples"] for row in asked if row["policy"] == "whole")
    found = []
    for policy, name in EQUAL.items():
        for keep in dict.fromkeys(row["keep"] for row in asked if row["policy"] != "whole"):
            hits = sum(r["hits"] * r["samples"] for r in asked if (r["policy"], r["keep"]) == (policy, keep))
            found.append(dict(model=model, tokens=tokens, mode=mode, policy=name, budget="equal", keep=keep,
                              samples=samples, kept=round(hits / whole, 3)))  # fmt: skip
    return found


def of_budgets(results, model, tokens, mode):
    """Of kvevict eval, all tasks together."""
    asked = [row for row in results if row.get("task", "all") == "all"]
    whole = next(row["hits"] for row in asked if row["policy"] == "whole")
    found = []
    for row in asked:
        name, budgets = SHARED_OUT.get(row["policy"], ("", {}))
        if row["column"] in budgets:
            budget = budgets[row["column"]] or row["column"]
            found.append(dict(model=model, tokens=tokens, mode=mode, policy=name, budget=budget,
                              keep=row["keep"], samples=row["questions"],
                              kept=round(row["hits"] / whole, 3)))  # fmt: skip
    return found


def main():
    QUOTED.write_text(json.dumps({"rows": rows()}, indent=1) + "\n")
    print(f"wrote {QUOTED}")


if __name__ == "__main__":
    main()
