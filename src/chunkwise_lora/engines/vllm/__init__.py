"""The engine for vLLM: a plug-in that vLLM finds without configuration. See docs/vllm.md.

`plugin.py` decides whether it runs. Except for `settings.py`, which does not need vLLM, the other modules are imported
only while vLLM is running.
"""
