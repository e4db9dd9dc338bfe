"""Names that differ between the versions of transformers that the engine supports."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The name under which models and mask functions of transformers take a cache. It was `past_key_values` before 5.24."""

CACHE_NAMES = ("cache", "past_key_values")
"""The names that models may have for it. A model with code of its own may keep the old name."""

PLAIN_LAYERS = frozenset({DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer)})
"""Kinds of cache layers that hold keys and values of tokens and nothing else. Since 5.24 a `DummyLayer`, which holds
nothing, stands for a layer that reads the cache of another one."""


def cache_name(parameters: Collection[str]) -> str | None:
    """Return the name under which a model with these parameters takes its cache; None if it takes none."""
    return next((name for name in (CACHE, *CACHE_NAMES) if name in parameters), None)
