"""One colour for a policy in every picture: six that colour-blind readers tell apart (Okabe and Ito), for ours and the
best or best known of others; the rest is grey."""

from __future__ import annotations

from typing import Any

_COLORS = {
    "learned": "#D55E00",
    "recommended": "#0072B2",
    "keydiff": "#009E73",
    "snapkv": "#CC79A7",
    "kvzip": "#E69F00",
    "recency": "#56B4E9",
}
_COLORS["tova + keydiff"] = _COLORS["recommended"]  # what it is made of: its name where all mixtures are compared
GREY = "#999999"


def color_of(policy: str) -> str:
    """A matplotlib colour."""
    return _COLORS.get(policy, GREY)


def line_of(policy: str) -> dict[str, Any]:
    """matplotlib's options of a policy's line: those in grey are thin, and lie behind the others."""
    grey = policy not in _COLORS
    return dict(
        color=color_of(policy), linewidth=0.7 if grey else 1.3, alpha=0.7 if grey else 1.0, zorder=1 if grey else 2
    )
