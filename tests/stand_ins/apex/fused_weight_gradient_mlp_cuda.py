"""A stand-in of apex's extension of this name, which needs a GPU to be built. It is not apex.

megatron-core calls these two functions; each adds the gradient of a weight to its sum.
"""


def wgrad_gemm_accum_fp32(x, grad, total):
    """total [out, in] += grad^T x, for x [t, in] and grad [t, out]; total is float32."""
    total += grad.t().float() @ x.float()


def wgrad_gemm_accum_fp16(x, grad, total):
    """The same into a total of two bytes a number, which this project does not use."""
    raise NotImplementedError
