"""Calibration: fits a ladder and its policy to an adapter, a text and a budget."""

from chunkwise_lora.calibration.config import CalibrationConfig

__all__ = ["CalibrationConfig"]
