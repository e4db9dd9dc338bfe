"""KV policies, one per file. Each scores the tokens of a closed chunk. `register_kv_policy` adds others."""

from chunkwise_lora.method.kv_policies.base import KV_POLICY_REGISTRY, KVPolicy, needs_queries, register_kv_policy
from chunkwise_lora.method.kv_policies.knorm import Knorm
from chunkwise_lora.method.kv_policies.near_duplicates import NearDuplicates
from chunkwise_lora.method.kv_policies.snapkv import SnapKV

__all__ = ["KV_POLICY_REGISTRY", "KVPolicy", "Knorm", "NearDuplicates", "SnapKV", "needs_queries", "register_kv_policy"]
