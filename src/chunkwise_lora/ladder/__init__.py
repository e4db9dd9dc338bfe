"""The rank ladder: its algebra, and how it is read and written."""

from chunkwise_lora.ladder.contents import Build
from chunkwise_lora.ladder.describe import describe
from chunkwise_lora.ladder.folder import LADDER_NAME, is_ladder
from chunkwise_lora.ladder.module import LadderModule, even_ranks
from chunkwise_lora.ladder.rank_ladder import RankLadder
from chunkwise_lora.ladder.truncation import Truncation, truncate

__all__ = [
    "LADDER_NAME",
    "Build",
    "LadderModule",
    "RankLadder",
    "Truncation",
    "describe",
    "even_ranks",
    "is_ladder",
    "truncate",
]
