"""How ranks are shown in the terminal, in reports and in notebooks: colours and numbers."""

from __future__ import annotations

COLD, WARM = (198, 219, 239), (253, 141, 60)
"""Red, green and blue (0 to 255) of rank 0, a light blue, and of the full rank, an orange."""
LEGEND = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The ranks that a legend shows, as shares of the full rank."""


def rank_colour(share: float) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of a rank, given as a share of the full rank; below 0 and above 1 are clamped."""
    share = min(1.0, max(0.0, share))
    red, green, blue = (round(cold + (warm - cold) * share) for cold, warm in zip(COLD, WARM, strict=True))
    return red, green, blue


def rank_shown(rank: float) -> str:
    """A rank as people read it: at most one decimal."""
    return f"{round(rank, 1):g}"
