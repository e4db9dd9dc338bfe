"""The rank ladder: its algebra, and how it is read and written."""

from chunkwise_lora.ladder.rank_ladder import LADDER_NAME, LadderModule, RankLadder, describe, even_ranks, is_ladder

__all__ = ["LADDER_NAME", "LadderModule", "RankLadder", "describe", "even_ranks", "is_ladder"]
