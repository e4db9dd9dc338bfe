"""Names that differ between the versions of transformers that the engine supports."""

from __future__ import annotations

import inspect

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The parameter of transformers' mask functions that takes the cache. It was `past_key_values` in older versions."""
