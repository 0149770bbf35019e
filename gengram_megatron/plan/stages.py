"""Which layers each pipeline rank has, and how many weights a rank of each stage holds."""

from dataclasses import dataclass
from functools import cached_property

from gengram_megatron.config import weights
from gengram_megatron.config.layout import Layout, Projection
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import Placement, group_sizes


@dataclass(frozen=True)
class RankParameters:
    """Weights of one rank, by which ranks have copies of them. Of ranks that hold different
    numbers of a table's rows, the one with most counts."""

    copied: int
    """On all data- and context-parallel ranks."""
    experts: int
    """On the ranks that hold the same experts."""
    rows: int
    """Of tables whose rows data- or expert-parallel ranks share."""

    @property
    def total(self) -> int:
        return self.copied + self.experts + self.rows


@dataclass(frozen=True)
class ShardedModel:
    """A config and its layout, as the parts of a plan ask about them."""

    config: Config
    layout: Layout
    on_gpu: bool = True

    @cached_property
    def stages(self) -> list[list[list[int]]]:
        """For each pipeline rank, for each of its model chunks: its layers, from 1."""
        virtual = self.layout.virtual_pipeline or 1
        counts = [count // virtual for count in self._layers_by_rank()]
        stages, first = [[] for _ in counts], 1
        for _ in range(virtual):
            for rank, count in enumerate(counts):
                stages[rank].append(list(range(first, first + count)))
                first += count
        return stages

    def _layers_by_rank(self) -> list[int]:
        parallel, ranks = self.config.parallel, self.layout.pipeline
        own = {0: parallel.first_stage_layers, ranks - 1: parallel.last_stage_layers}
        own = {rank: count for rank, count in own.items() if count is not None}
        rest = self.config.model.num_layers - sum(own.values())
        others = ranks - len(own)
        return [own.get(rank, rest // max(others, 1)) for rank in range(ranks)]

    def layers(self, stage: int) -> list[int]:
        """Of all model chunks of a pipeline rank."""
        return [layer for chunk in self.stages[stage] for layer in chunk]

    def has_gengram(self, layer: int) -> bool:
        return layer in weights.gengram_layers(self.config.model)

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights, experts apart."""
        return self.layout.data * self.layout.context

    @property
    def zero_stage(self) -> int:
        """Of DeepSpeed; 0 with megatron-core."""
        train = self.config.train
        return train.deepspeed.zero_stage if train.engine == "deepspeed" else 0

    @property
    def experts_a_rank(self) -> int:
        """Of each layer; a dense layer counts as one, which tensor-parallel ranks share."""
        return weights.experts(self.config.model)[0] // self.layout.expert

    @property
    def feed_forward_ranks(self) -> int:
        """Ranks that share the width of an expert or of a dense layer."""
        return self.layout.tensor if self.is_dense else self.layout.expert_tensor

    @property
    def is_dense(self) -> bool:
        return self.config.model.num_experts is None

    @cached_property
    def tables(self) -> tuple[Placement, ...]:
        """Of each memory."""
        return self.layout.placements

    @property
    def projection(self) -> Projection | None:
        """Of the memory, if there is one."""
        return self.layout.projection(self.on_gpu)

    def table_rows_held(self, place: Placement) -> int:
        """By the rank that holds most."""
        ranks = group_sizes(self.config, self.layout.world_size)[place.over] if place.over else 1
        return -(-place.table.rows // ranks)

    def held(self, stage: int) -> RankParameters:
        """Weights of a rank of a pipeline stage."""
        model, tensor = self.config.model, self.layout.tensor
        layers = self.layers(stage)
        memories = sum(map(self.has_gengram, layers))
        rest = len(layers) * (
            weights.attention_projections(model)
            + weights.attention_norms(model)
            + weights.router(model)
            + 2 * weights.norm(model)
        )
        rest += memories * (weights.gengram_projection(model) + weights.gengram_rest(model))
        if stage == 0:
            rest += weights.embedding(model)
        if stage == self.layout.pipeline - 1:
            rest += weights.norm(model) + weights.embedding(model)
        feed_forward = (
            len(layers) * weights.feed_forward(model) * self.experts_a_rank
        ) // self.feed_forward_ranks
        by_columns, by_rows = self.table_weights_held()
        return RankParameters(
            copied=rest.per_rank(tensor)
            + memories * by_columns
            + (feed_forward if self.is_dense else 0),
            experts=0 if self.is_dense else feed_forward,
            rows=memories * by_rows,
        )

    def table_weights_held(self) -> tuple[int, int]:
        """Of one memory's tables: weights that data-parallel ranks have copies of, and the rest."""
        copied = rows = 0
        for place in self.tables:
            own = self.table_rows_held(place) * place.columns_held(self.layout.tensor)
            if place.over in ("data", "expert"):
                rows += own
            else:
                copied += own
        return copied, rows

    def row_copies(self) -> int:
        """Ranks that hold the same rows."""
        over = {place.over for place in self.tables}
        return self.layout.expert_data if "expert" in over else 1
