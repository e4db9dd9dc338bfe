"""Names that differ between the versions of transformers that the engine supports."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The parameter of transformers' mask functions that takes the cache. It was `past_key_values` in older versions."""

CACHE_NAMES = ("cache", "past_key_values")
"""What models call their cache: `cache` since 5.24, `past_key_values` before."""


def cache_name(parameters: Collection[str]) -> str | None:
    """Return the name under which a model with these parameters takes its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameters), None)
