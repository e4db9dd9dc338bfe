"""All settings of the method, with unit, range and source, and the presets.

Every setting is declared here only. The command line and the JSON files use this declaration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chunkwise_lora.errors import ConfigError, shown
from chunkwise_lora.method.kv_policies import KV_POLICY_REGISTRY, needs_queries
from chunkwise_lora.method.signals import PAPER_SIGNALS, SIGNAL_REGISTRY

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
MOST_TOKENS = 10**9
"""Largest value of settings that count tokens. It is far beyond any context, and fits into 32 bits."""
KVPrecision = Literal["full", "int8"]


class StrictConfig(BaseModel):
    """Base of all settings: frozen. An unknown name or an impossible value raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_clearly(cls, values: Any, handler: Any) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{shown('.'.join(map(str, found['loc'])) or 'value')} = {shown(repr(found['input']))}: {found['msg']}"
                for found in error.errors()[:10]
            )
            raise ConfigError(f"{cls.__name__}: {problems}") from None


class ComplexityConfig(StrictConfig):
    """Weights and ranges of the complexity signals (arXiv 2601.21109, token complexity estimator)."""

    entropy: Weight = Field(0.4, description="Weight of the next-token entropy.")
    novelty: Weight = Field(0.3, description="Weight of the n-gram novelty.")
    attention: Weight = Field(0.2, description="Weight of the attention proxy.")
    position: Weight = Field(0.1, description="Weight of the positional prior.")
    signals: Mapping[str, Weight] = Field({}, description="Weights of other registered signals, by name.")
    ngram: int = Field(3, ge=1, le=8, description="Longest n-gram that novelty looks at, tokens.")
    window: int = Field(512, ge=1, le=MOST_TOKENS, description="Tokens that novelty and the attention proxy look back.")
    half_life: float = Field(
        64.0, gt=0, le=MOST_TOKENS, description="Number of tokens after which the positional prior halves."
    )
    learned: bool = Field(
        False,
        description="Score by what calibration learned and stored in the ladder. The weights then have no "
        "effect, except that entropies are computed only if entropy is above 0.",
    )

    @model_validator(mode="after")
    def _usable_signals(self) -> Self:
        for name in self.signals:
            if name in PAPER_SIGNALS:
                raise ConfigError(f"ComplexityConfig: signals.{name}: give this signal its weight as {name!r} instead")
            SIGNAL_REGISTRY.check(name, "ComplexityConfig: signals")
        others = sum(self.signals.values())
        if self.learned and others:
            raise ConfigError(
                "ComplexityConfig: signals: learned scores know only the paper's four signals; remove the other "
                "signals, or set learned to false"
            )
        if not self.learned and self.entropy + self.novelty + self.attention + self.position + others == 0:
            raise ConfigError("ComplexityConfig: all weights are 0; give at least one signal a weight")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a mapping is not hashable

    @property
    def reads_entropy(self) -> bool:
        """Whether a signal with a weight reads next-token entropies."""
        return self.entropy > 0 or any(
            weight > 0 and getattr(SIGNAL_REGISTRY.factory(name), "needs_entropy", True)
            for name, weight in self.signals.items()
        )


class ChunkingConfig(StrictConfig):
    """Where chunks are cut (arXiv 2601.21109, adaptive chunker)."""

    min_length: int = Field(4, ge=1, le=MOST_TOKENS, description="Shortest chunk, tokens.")
    max_length: int = Field(32, ge=1, le=MOST_TOKENS, description="Longest chunk, tokens.")
    thresholds: tuple[Share, ...] = Field(
        (0.45, 0.6), description="Rising thresholds on the running mean complexity; n thresholds make n + 1 levels."
    )
    hysteresis: float = Field(
        0.03, ge=0, lt=1, description="How far beyond a threshold the running mean must go before a chunk is cut."
    )
    memory: float = Field(6.0, ge=1, le=MOST_TOKENS, description="Length of the running mean, tokens.")
    hard_share: Share = Field(0.1, description="Budget: the largest share of tokens at the highest level.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_length > self.max_length:
            raise ConfigError(
                f"ChunkingConfig: min_length = {self.min_length} is above max_length = {self.max_length}; "
                "lower min_length or raise max_length"
            )
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ConfigError(f"ChunkingConfig: thresholds = {self.thresholds} must rise strictly")
        return self


class SelectionConfig(StrictConfig):
    """Rank and scale of each level, easiest first (arXiv 2601.21109, rank and scale selector)."""

    rank_shares: tuple[Share, ...] = Field(
        (0.625, 0.75, 0.875),
        description="Share of the full rank per level; the level gets the nearest rung. 0 turns the adapter off.",
    )
    scales: tuple[Annotated[float, Field(ge=0, le=4)], ...] = Field(
        (1.0, 1.0, 1.0), description="Factor on the adapter's output per level."
    )


class CompositionConfig(StrictConfig):
    """The cross-fade at chunk boundaries (arXiv 2601.21109, boundary-safe composer)."""

    window: int = Field(
        2,
        ge=0,
        le=MOST_TOKENS,
        description="Tokens at the start of a chunk that are cross-faded; 0 turns the cross-fade off.",
    )


class LevelKVPolicy(StrictConfig):
    """What happens to the keys and values of a chunk of one level when the chunk closes."""

    precision: KVPrecision = Field("full", description="Storage of the chunk: full (the model's precision) or int8.")
    duplicate_similarity: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Drop a token whose keys have a cosine above this with the next token's; null drops none.",
    )
    evict: str | None = Field(
        None,
        description="Name of a registered KV policy (knorm, snapkv, near_duplicates, or your own); the tokens of the "
        "closed chunk that it scores lowest are dropped. null drops none.",
    )
    keep_share: Share | None = Field(
        None, description="Share of the closed chunk's tokens that evict keeps, rounded to whole tokens."
    )
    max_age: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="Drop the chunk once more tokens than this follow it; null keeps it."
    )

    @model_validator(mode="after")
    def _usable_eviction(self) -> Self:
        if (self.evict is None) != (self.keep_share is None):
            raise ConfigError(
                "LevelKVPolicy: evict and keep_share belong together; give both (for example evict = 'knorm' and "
                "keep_share = 0.5) or none"
            )
        if self.evict is not None:
            KV_POLICY_REGISTRY.check(self.evict, "LevelKVPolicy: evict")
        return self


class KVCacheConfig(StrictConfig):
    """The KV policy of each level, easiest first (arXiv 2601.21109, KV-cache policy controller)."""

    levels: tuple[LevelKVPolicy, ...] = Field(
        (LevelKVPolicy(precision="int8"), LevelKVPolicy(precision="int8"), LevelKVPolicy()),
        description="One policy per level.",
    )
    int8_head_share: Share = Field(
        1.0,
        description="Share of a layer's key-value heads that int8 applies to: those with the smallest rounding error.",
    )
    sinks: int = Field(
        4, ge=0, le=MOST_TOKENS, description="First tokens of a sequence, which are never dropped or quantised."
    )

    @property
    def acts(self) -> bool:
        """Whether any level changes the cache."""
        return any(level != LevelKVPolicy() for level in self.levels)

    @property
    def needs_queries(self) -> bool:
        """Whether a policy reads the queries of closed chunks."""
        return any(needs_queries(level.evict) for level in self.levels)


class ChunkWiseConfig(StrictConfig):
    """All settings of the method. Without arguments it is the `balanced` preset."""

    complexity: ComplexityConfig = ComplexityConfig()
    chunking: ChunkingConfig = ChunkingConfig()
    selection: SelectionConfig = SelectionConfig()
    composition: CompositionConfig = CompositionConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        levels = self.levels
        for name, given in (
            ("selection.rank_shares", self.selection.rank_shares),
            ("selection.scales", self.selection.scales),
            ("kv_cache.levels", self.kv_cache.levels),
        ):
            if len(given) != levels:
                raise ConfigError(
                    f"ChunkWiseConfig: {name} has {len(given)} entries, but {levels - 1} chunking.thresholds "
                    f"make {levels} levels; give {levels} entries"
                )
        if self.composition.window > self.chunking.min_length:
            raise ConfigError(
                f"ChunkWiseConfig: composition.window = {self.composition.window} is above chunking.min_length = "
                f"{self.chunking.min_length}, so cross-fades would overlap; lower the window"
            )
        return self

    @property
    def levels(self) -> int:
        """Number of difficulty levels."""
        return len(self.chunking.thresholds) + 1

    @property
    def reads_entropy(self) -> bool:
        """Whether next-token entropies can change a plan."""
        return self.levels > 1 and self.complexity.reads_entropy

    @classmethod
    def preset(cls, name: str) -> ChunkWiseConfig:
        """Return the preset `lossless` (full rank, full cache), `balanced` or `compact`.

        `balanced` and `compact` are not calibrated: the paper's four signals choose between rungs of similar rank.
        On their own, these signals choose tokens hardly better than chance. The presets save time and memory by lower
        ranks and by the KV policy.

        Raises:
            ConfigError: There is no preset of that name.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def uniform(cls, share: float) -> ChunkWiseConfig:
        """Return settings that give every token the rung nearest to `share` of the full rank, with a full cache."""
        return cls(
            chunking=ChunkingConfig(thresholds=(), hard_share=1.0),
            selection=SelectionConfig(rank_shares=(share,), scales=(1.0,)),
            composition=CompositionConfig(window=0),
            kv_cache=KVCacheConfig(levels=(LevelKVPolicy(),)),
        )

    @classmethod
    def from_json(cls, text: str, where: str = "config") -> ChunkWiseConfig:
        """Parse JSON; `where` names its source in errors.

        Raises:
            ConfigError: The text is not JSON, a name is unknown, or a value is impossible.
        """
        try:
            return cls.model_validate_json(text)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        except ValidationError as error:
            raise ConfigError(f"{where}: {shown(error.errors()[0]['msg'])}; correct the file") from None

    def to_json(self) -> str:
        """Return the JSON that `from_json` reads."""
        return self.model_dump_json(indent=2) + "\n"


PRESETS: dict[str, ChunkWiseConfig] = {
    "lossless": ChunkWiseConfig.uniform(1.0),
    "balanced": ChunkWiseConfig(),
    "compact": ChunkWiseConfig(
        selection=SelectionConfig(rank_shares=(0.375, 0.5, 0.625)),
        kv_cache=KVCacheConfig(
            levels=(
                LevelKVPolicy(precision="int8", duplicate_similarity=0.98, max_age=512),
                LevelKVPolicy(precision="int8", max_age=2048),
                LevelKVPolicy(precision="int8"),
            )
        ),
    ),
}
