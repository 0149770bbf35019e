"""What megatron-core sees of the machine: nothing changed where there is CUDA, the CPU's answers
where there is none, and no wall of warnings. Each test looks at a Python of its own, because
`prepare` changes the process that calls it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent

SNAPSHOT = """
    import json, torch, torch.cuda.nvtx, torch.cuda.random, torch.random
    import torch._dynamo  # megatron-core loads it, and it wraps torch.manual_seed for itself
    from inspect import getattr_static

    def snapshot():
        places = torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.random, torch.Tensor
        return {
            f"{place.__name__}.{name}": getattr_static(place, name, None)
            for place in places
            for name in dir(place)
        }

    def replaced(before):
        after = snapshot()
        return sorted(name for name in before if after.get(name) is not before[name])
"""
"""Names of torch, the objects they mean, and which of them mean others than before. The objects
are kept, so that no other can be born at the same address."""

CUDA = "torch.cuda.is_available = lambda: True"
"""All that these tests pretend of a GPU; megatron-core's import needs no more of it."""


def run_python(*code: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run code in a fresh Python that sees no GPU; it must succeed."""
    program = "\n".join(map(textwrap.dedent, code))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *flags, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_the_model_says_nothing():
    """Not even what Python hides by default."""
    done = run_python(
        "import gengram_megatron.engine.model",
        "import gengram_megatron.engine.model.build, gengram_megatron.engine.training.step",
        flags=("-W", "always"),
    )
    assert done.stdout == "" and done.stderr == ""


def test_nothing_of_torch_is_replaced_where_there_is_cuda():
    code = """
        before = snapshot()
        from gengram_megatron.engine.platform import prepare
        prepare()
        import gengram_megatron.engine.model.build
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import token_dispatcher
        ours = [f.__name__ for f in (
            random._get_cuda_rng_state,
            random._set_cuda_rng_state,
            token_dispatcher.maybe_move_tensor_to_cpu,
        ) if f.__module__.startswith("gengram")]
        print(json.dumps([len(before), replaced(before), ours]))
    """
    count, names, ours = json.loads(run_python(SNAPSHOT, CUDA, code).stdout)
    assert count > 1000  # the snapshot did look
    assert names == [] and ours == []


def test_without_cuda_its_names_are_replaced_once():
    """And a second call of prepare replaces nothing: wrapped twice, types would be misnamed."""
    code = """
        before = snapshot()
        from gengram_megatron.engine.platform import prepare
        prepare()
        first, between = replaced(before), snapshot()
        prepare()
        import gengram_megatron.engine.model
        print(json.dumps([first, replaced(between), torch.ones(1).type()]))
    """
    first, second, type_name = json.loads(run_python(SNAPSHOT, code).stdout)
    assert {"torch.cuda.current_device", "torch.zeros", "Tensor.cuda", "Tensor.type"} <= set(first)
    assert "torch.cuda.is_available" not in first and "torch.compile" not in first
    assert second == [] and type_name == "torch.cuda.FloatTensor"


def test_the_cpu_answers_for_cuda():
    run_python("""
        import torch
        from gengram_megatron.engine.platform import prepare
        prepare()
        cpu = torch.device("cpu")

        # It is not claimed that there is a GPU.
        assert not torch.cuda.is_available()
        assert torch.cuda.current_device() == cpu and torch.cuda.device_count() == 1
        for quiet in "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats":
            assert getattr(torch.cuda, quiet)() is None
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0
        torch.cuda.nvtx.range_push("name")
        torch.cuda.nvtx.range_pop()

        # Streams and events: all work is done.
        stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream), torch.cuda.device(0):
            event.record(stream)
        stream.wait_event(event)
        stream.wait_stream(torch.cuda.current_stream())
        assert event.query() and stream == torch.cuda.default_stream()
        assert stream.record_event(event) is event

        # Tensors asked for on a GPU lie on the CPU; other devices are what they were.
        x = torch.ones(2, 3)
        for device in "cuda", "cuda:0", torch.device("cuda", 1), torch.cuda.current_device():
            made = [
                torch.tensor([1.0], device=device),
                torch.full((2,), 3.0, device=device),
                torch.arange(3, device=device),
                torch.randint(5, (2,), device=device),
                *(getattr(torch, name)(2, 3, device=device, dtype=torch.float64)
                  for name in ("zeros", "ones", "empty", "rand", "randn")),
                *(getattr(torch, name)(x, device=device)
                  for name in ("zeros_like", "ones_like", "empty_like", "rand_like")),
                torch.full_like(x, 2, device=device),
            ]
            assert all(t.device == cpu for t in made), device
            assert [t.dtype for t in made[4:9]] == [torch.float64] * 5
            assert made[2].tolist() == [0, 1, 2] and made[5].tolist() == [[1] * 3] * 2
        assert torch.empty(1, device="meta").device.type == "meta"
        assert torch.zeros(2, device="cuda", pin_memory=True).tolist() == [0, 0]
        assert x.cuda() is x

        # Types are named as DistributedOptimizer expects, and casts go on working.
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert x.type(torch.float64).dtype == torch.float64
    """)


def test_random_states_and_megatron_on_the_cpu():
    run_python("""
        import torch
        from gengram_megatron.engine.platform import prepare
        prepare()
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer.moe import moe_utils, token_dispatcher

        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(4)
        for set_state in torch.cuda.set_rng_state, torch.cuda.random.set_rng_state:
            set_state(state)
            assert torch.equal(torch.rand(4), drawn)
        assert torch.equal(torch.cuda.random.get_rng_state(), torch.get_rng_state())

        # Inside a fork the tracker's own numbers, outside as if it had not been.
        def draws(with_fork):
            torch.manual_seed(1)
            tracker = CudaRNGStatesTracker()
            tracker.add("own", 5)
            first, inside = torch.rand(2), []
            if with_fork:
                for _ in range(2):
                    with tracker.fork("own"):
                        inside.append(torch.rand(2))
            return [first, torch.rand(2)], inside

        outside, inside = draws(True)
        assert all(map(torch.equal, outside, draws(False)[0]))
        torch.manual_seed(5)
        assert all(torch.equal(torch.rand(2), x) for x in inside)

        # all_to_all takes lists of numbers, not tensors.
        splits = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 4]), as_numpy=True)
        assert type(splits).__name__ == "ndarray" and splits.tolist() == [3, 4]
        kept = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 4]))
        assert torch.is_tensor(kept)
        assert moe_utils.te_general_gemm is None
    """)
