"""Compute what adapters add to a layer. Backends know no engine."""
