"""Linear maps, whose weights' gradients may be added to `main_grad` right away."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from transformer_engine.pytorch.base import TransformerEngineBaseModule, compute_alone, ranks
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class _Product(torch.autograd.Function):
    """x w^T. fuse: the weight's gradient goes to w.main_grad, in the place of what is there if this
    is the first microbatch, and autograd gets room without a meaning, here full of NaN."""

    @staticmethod
    def forward(ctx, x, weight, fuse, first):
        ctx.save_for_backward(x)
        ctx.weight, ctx.fuse, ctx.first = weight, fuse, first
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        (x,), weight = ctx.saved_tensors, ctx.weight
        of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.fuse:
            into = weight.main_grad.copy_ if ctx.first else weight.main_grad.add_
            into(of_weight)
            weight.grad_added_to_main_grad = True
            of_weight = torch.full_like(weight, float("nan"))
        return grad @ weight, of_weight, None, None


def product(x, weight, fuse, first):
    """In fp8 the sides of all matrices must be multiples of 16, as the documentation has it."""
    if FP8GlobalStateManager.is_fp8_enabled():
        for size in (math.prod(x.shape[:-1]), *weight.shape):
            if size % 16:
                raise RuntimeError(f"{size} is no multiple of 16, which fp8 needs")
    return _Product.apply(x, weight, fuse, first)


def shape_on_a_rank(out_features, in_features, parallel_mode, tp_size) -> tuple[int, int]:
    """Of a weight whose rows (column parallel) or columns (row parallel) ranks share."""
    if parallel_mode == "column":
        out_features //= tp_size
    elif parallel_mode == "row":
        in_features //= tp_size
    return out_features, in_features


class Linear(TransformerEngineBaseModule):
    """y = x w^T."""

    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
    ):
        super().__init__()
        self.tp_size = ranks(tp_group, tp_size)
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.save_original_input = save_original_input
        shape = shape_on_a_rank(out_features, in_features, parallel_mode, self.tp_size)
        self.make_parameter("weight", shape, params_dtype, device, init_method)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        compute_alone(self.tp_size)
        self.init_fp8_metadata()
        return product(inp, self.weight, self.fuse_wgrad_accumulation, is_first_microbatch)


class LayerNormLinear(TransformerEngineBaseModule):
    """A norm and the linear map behind it."""

    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        super().__init__()
        self.tp_size = ranks(tp_group, tp_size)
        if normalization != "RMSNorm":
            raise NotImplementedError("the stand-in knows RMSNorm only")
        self.in_features, self.out_features, self.eps = in_features, out_features, eps
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        shape = shape_on_a_rank(out_features, in_features, parallel_mode, self.tp_size)
        self.make_parameter("weight", shape, params_dtype, device, init_method)
        self.make_parameter("layer_norm_weight", in_features, params_dtype, device, nn.init.ones_)
        self.layer_norm_weight.sequence_parallel = sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        compute_alone(self.tp_size)
        self.init_fp8_metadata()
        normed = F.rms_norm(inp, (self.in_features,), self.layer_norm_weight, self.eps)
        return product(normed, self.weight, self.fuse_wgrad_accumulation, is_first_microbatch)


class GroupedLinear(TransformerEngineBaseModule):
    """A linear map for each run of rows."""

    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        ub_overlap_rs=False,
        ub_overlap_ag=False,
        ub_name=None,
        delay_wgrad_compute=False,
        save_original_input=False,
    ):
        super().__init__()
        self.tp_size = ranks(tp_group, tp_size)
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.save_original_input = save_original_input
        shape = shape_on_a_rank(out_features, in_features, parallel_mode, self.tp_size)
        for number in range(num_gemms):
            self.make_parameter(f"weight{number}", shape, params_dtype, device, init_method)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        compute_alone(self.tp_size)
        self.init_fp8_metadata(num_gemms=self.num_gemms)
        fuse = self.fuse_wgrad_accumulation
        return torch.cat(
            [
                product(rows, getattr(self, f"weight{number}"), fuse, is_first_microbatch)
                for number, rows in enumerate(inp.split(m_splits))
            ]
        )
