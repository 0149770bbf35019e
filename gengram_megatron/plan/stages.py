"""Determines the layers of each pipeline rank, and how many weights a rank of each stage holds."""

from dataclasses import dataclass
from functools import cached_property

from gengram_megatron.config import weights
from gengram_megatron.config.layout import Layout, Projection
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import Placement, group_sizes


@dataclass(frozen=True)
class RankParameters:
    """Numbers of weights of one rank, by which other ranks have copies of them. If ranks hold
    different numbers of a table's rows, these are the numbers of the rank with most."""

    copied: int
    """Weights with copies on all data- and context-parallel ranks."""
    experts: int
    """Weights of experts, with copies on the ranks that hold the same experts."""
    rows: int
    """Weights of tables whose rows are split over data- or expert-parallel ranks."""

    @property
    def total(self) -> int:
        """The number of all weights of the rank."""
        return self.copied + self.experts + self.rows


@dataclass(frozen=True)
class ShardedModel:
    """A config and its layout, with the derived facts that the parts of a plan need."""

    config: Config
    layout: Layout
    on_gpu: bool = True

    @cached_property
    def stages(self) -> list[list[list[int]]]:
        """The layers of each model chunk of each pipeline rank, counted from 1."""
        virtual = self.layout.virtual_pipeline or 1
        counts = [count // virtual for count in self._layers_by_rank()]
        stages: list[list[list[int]]] = [[] for _ in counts]
        first = 1
        for _ in range(virtual):
            for rank, count in enumerate(counts):
                stages[rank].append(list(range(first, first + count)))
                first += count
        return stages

    def _layers_by_rank(self) -> list[int]:
        parallel, ranks = self.config.parallel, self.layout.pipeline
        given = {0: parallel.first_stage_layers, ranks - 1: parallel.last_stage_layers}
        fixed = {rank: count for rank, count in given.items() if count is not None}
        rest = self.config.model.num_layers - sum(fixed.values())
        other_ranks = ranks - len(fixed)
        return [fixed.get(rank, rest // max(other_ranks, 1)) for rank in range(ranks)]

    def layers(self, stage: int) -> list[int]:
        """Returns the layers of all model chunks of a pipeline rank."""
        return [layer for chunk in self.stages[stage] for layer in chunk]

    def has_gengram(self, layer: int) -> bool:
        """Returns whether a layer, counted from 1, has Gengram."""
        return layer in weights.gengram_layers(self.config.model)

    @property
    def copies(self) -> int:
        """The number of ranks that hold the same weights, not counting experts."""
        return self.layout.data * self.layout.context

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage of DeepSpeed; 0 with megatron-core."""
        train = self.config.train
        return train.deepspeed.zero_stage if train.engine == "deepspeed" else 0

    @property
    def experts_per_rank(self) -> int:
        """The number of experts per layer on a rank; 1 for a dense layer."""
        return weights.experts(self.config.model)[0] // self.layout.expert

    @property
    def feed_forward_ranks(self) -> int:
        """The number of ranks that the width of an expert or of a dense layer is split over."""
        return self.layout.tensor if self.is_dense else self.layout.expert_tensor

    @property
    def is_dense(self) -> bool:
        """Whether the model has no experts."""
        return self.config.model.num_experts is None

    @property
    def projection(self) -> Projection | None:
        """What a Gengram layer projects; None without Gengram."""
        return self.layout.projection(self.on_gpu)

    def table_rows_held(self, placement: Placement) -> int:
        """Returns the number of a table's rows on the rank that holds most."""
        sizes = group_sizes(self.config, self.layout.world_size)
        ranks = sizes[placement.rows_over] if placement.rows_over else 1
        return -(-placement.table.rows // ranks)

    def rank_parameters(self, stage: int) -> RankParameters:
        """Returns the weights of a rank of a pipeline stage."""
        model, tensor = self.config.model, self.layout.tensor
        layers = self.layers(stage)
        gengram_layers = sum(map(self.has_gengram, layers))
        rest = len(layers) * (
            weights.attention_projections(model)
            + weights.attention_norms(model)
            + weights.router(model)
            + 2 * weights.norm(model)
        )
        rest += gengram_layers * (weights.gengram_projection(model) + weights.gengram_rest(model))
        if stage == 0:
            rest += weights.embedding(model)
        if stage == self.layout.pipeline - 1:
            rest += weights.norm(model) + weights.embedding(model)
        feed_forward = (
            len(layers) * weights.feed_forward(model) * self.experts_per_rank
        ) // self.feed_forward_ranks
        by_columns, by_rows = self.table_weights_held()
        return RankParameters(
            copied=rest.per_rank(tensor)
            + gengram_layers * by_columns
            + (feed_forward if self.is_dense else 0),
            experts=0 if self.is_dense else feed_forward,
            rows=gengram_layers * by_rows,
        )

    def table_weights_held(self) -> tuple[int, int]:
        """Returns a rank's weights of one Gengram layer's tables: those that data-parallel ranks
        have copies of, and those whose rows are split over data- or expert-parallel ranks."""
        copied = rows = 0
        for placement in self.layout.placements:
            columns = placement.columns_held(self.layout.tensor)
            on_rank = self.table_rows_held(placement) * columns
            if placement.rows_over in ("data", "expert"):
                rows += on_rank
            else:
                copied += on_rank
        return copied, rows

    def row_copies(self) -> int:
        """Returns the number of ranks that hold the same rows."""
        return self.layout.expert_data if self.layout.rows_shared_over == "expert" else 1
