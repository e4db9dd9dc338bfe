"""The paper's method, pure: arrays in, arrays out. It knows no model and no engine."""
