"""Fitting a ladder and a policy to an adapter and a text; what knows no engine is in `chunkwise_lora.calibration`."""
