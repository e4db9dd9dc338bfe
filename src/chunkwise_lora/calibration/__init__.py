"""Calibration: fits a ladder and its policy to an adapter, a text and a budget."""
