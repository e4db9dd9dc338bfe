"""Engines carry out plans. None is imported unless it is used."""
