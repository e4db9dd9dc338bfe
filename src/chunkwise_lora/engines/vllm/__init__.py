"""The engine for vLLM: a plug-in that vLLM finds by itself. See docs/vllm.md.

`plugin.py` decides whether it runs. Nothing else here is imported unless vLLM is running, except `settings.py`, which
does not need vLLM.
"""
