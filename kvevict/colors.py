"""One colour for a policy in every picture: six that colour-blind readers tell apart (Okabe and Ito), or grey."""

_COLORS = {
    "learned": "#D55E00",
    "recommended": "#0072B2",
    "keydiff": "#009E73",
    "snapkv": "#CC79A7",
    "tova": "#E69F00",
    "recency": "#56B4E9",
}
GREY = "#999999"


def color_of(policy: str) -> str:
    """A matplotlib colour."""
    return _COLORS.get(policy, GREY)
