"""The engine for vLLM: a plug-in that vLLM finds by itself. See docs/vllm.md.

Only `plugin.py` decides whether it runs; nothing here is imported unless vLLM is, but for what knows nothing of vLLM:
planning, settings, and what adds adapters to a layer.
"""
