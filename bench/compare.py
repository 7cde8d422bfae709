"""`python -m bench compare A.json B.json`: what changed from A to B by more than the spread."""

import json
import pathlib


def changes(before, after):
    """[(case, label, what, ratio)] of all rows in both that differ beyond their spread; ratio > 1 is worse."""
    old = {(row["case"], row["label"]): row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        was = old.get((row["case"], row["label"]))
        if was is None:
            continue
        if "seconds" in row and "seconds" in was and (row["low"] > was["high"] or row["high"] < was["low"]):
            found.append((row["case"], row["label"], "seconds", row["seconds"] / was["seconds"]))
        for what in ("bytes", "launches", "fills"):  # counted: no spread
            if what in row and what in was and row[what] != was[what]:
                found.append((row["case"], row["label"], what, row[what] / max(was[what], 1)))
    return found


def main(paths):
    """Print the changes; 1 if anything got worse."""
    before, after = (json.loads(pathlib.Path(path).read_text()) for path in paths)
    if before["schema"] != after["schema"] or before["kind"] != after["kind"]:
        raise SystemExit(f"{paths[0]} is {before['kind']}, {paths[1]} is {after['kind']}: expected the same kind")
    if before["device"] != after["device"]:
        print(f"different devices: {before['device']} and {after['device']}")
    found = changes(before, after)
    for case, label, what, ratio in found:
        print(f"{'worse' if ratio > 1 else 'better'}: {case} {label}: {what} × {ratio:.3f}")
    print(f"{len(found)} changes beyond the spread in {len(after['rows'])} rows")
    return int(any(ratio > 1 for *_, ratio in found))
