"""The Triton kernels of Sinkhorn: interpreted on the CPU, compiled for an H100, and run where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from hc_transform import sinkhorn
from hc_transform.measuring.registers import assembled

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

INTERPRET = """
import sys
import torch
import hc_transform
from hc_transform.connections import sinkhorn_kernels as kernels
sys.modules["hc_transform.connections.sinkhorn"]._kernels_for = lambda logits: kernels
kernels.MIN_PROGRAMS, kernels.SCRATCH_BYTES = 1, 0  # one program takes all blocks
results = {}
for name, (logits, weight, iterations, eps) in torch.load(sys.argv[1]).items():
    matrix = hc_transform.sinkhorn(logits.requires_grad_(), iterations, eps)
    results[name] = matrix.detach(), *torch.autograd.grad(matrix, logits, weight)
torch.save(results, sys.argv[2])
"""


def cases():
    """Return logits, the gradient of the result, iterations and eps, by name."""
    torch.manual_seed(0)
    found = {}
    for n in (1, 2, 3, 4, 5, 8, 16):
        for iterations, eps in ((1, 0.0), (1, 1e-3), (2, 0.0), (20, 0.0), (20, 1e-6), (20, 1e-3)):
            found[f"n={n} iterations={iterations} eps={eps}"] = (torch.randn(5, n, n), None, iterations, eps)
    found["std 8"] = (8 * torch.randn(70, 4, 4), None, 20, 0.0)  # three blocks, the last one not full
    found["std 8 eps"] = (8 * torch.randn(40, 4, 4), None, 20, 1e-6)
    found["std 8 padded"] = (8 * torch.randn(40, 5, 5), None, 20, 0.0)
    found["100 iterations"] = (30 * torch.randn(3, 4, 4), None, 100, 0.0)
    found["differences of 1e4"] = (1e4 * torch.randint(-1, 2, (40, 4, 4)) + torch.randn(40, 4, 4), None, 20, 0.0)
    found["one row far below"] = (torch.randn(4, 4, 4) - 1e4 * torch.eye(4)[0].unsqueeze(1), None, 20, 0.0)
    found["transposed"] = (torch.randn(6, 4, 4).mT, torch.randn(4, 6, 4).transpose(0, 1), 20, 0.0)
    found["expanded"] = (torch.randn(4, 4).expand(2, 3, 4, 4), torch.randn(()).expand(2, 3, 4, 4), 3, 0.0)
    found["no tokens"] = (torch.randn(2, 0, 4, 4), None, 20, 0.0)
    return {name: (x, torch.randn(x.shape) if w is None else w, *more) for name, (x, w, *more) in found.items()}


CASES = cases()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results and gradients of all cases, from a process of its own: Triton reads the variable when it is imported."""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(CASES, folder / "cases")
    command = [sys.executable, "-c", INTERPRET, folder / "cases", folder / "results"]
    process = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return torch.load(folder / "results")


def by_torch(logits, weight, iterations, eps):
    logits = logits.detach().requires_grad_()
    matrix = sinkhorn(logits, iterations, eps)
    return matrix.detach(), *torch.autograd.grad(matrix, logits, weight.to(matrix.dtype))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_torch_in_fp32(interpreted, name):
    logits, weight, iterations, eps = CASES[name]
    exact = by_torch(logits.double(), weight, iterations, eps)
    in_fp32 = by_torch(logits, weight, iterations, eps)
    for kernel, torchs, reference in zip(interpreted[name], in_fp32, exact, strict=True):
        assert kernel.dtype == torch.float32 and kernel.is_contiguous()
        # Largest errors are single draws of the same rounding: a factor of 3, and 4 ulp of 1 where both are tiny.
        bound = 3 * (torchs - reference).abs().max().item() + 2.4e-7 if kernel.numel() else 0
        torch.testing.assert_close(kernel.double(), reference, rtol=0, atol=bound)


def compiled(kernel, n, eps, **types):
    """Return Triton's compiled kernel for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hc_transform.connections.sinkhorn_kernels import _settings

    constants = _settings(n, eps)
    tensors = {"out", "grad", "logits", "scratch"}
    numbers = {"eps": "fp32", "iterations": "i32", "count": "i32", **types}
    signature = {
        name: "*fp32" if name in tensors else numbers.get(name, "constexpr")  # as a launch would derive it
        for name in kernel.arg_names
    }
    aligned = {  # memory from torch is aligned to 16 bytes; the kernel asks not to be told so of scratch
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in tensors - {"scratch"}
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("n, forward, backward", [(3, 48, 80), (4, 48, 80), (8, 80, 160), (16, 80, 168)])
def test_kernels_compile_for_an_h100_without_spills(n, forward, backward, eps):
    kernels = pytest.importorskip("hc_transform.connections.sinkhorn_kernels")
    for kernel, registers in ((kernels._sinkhorn_forward, forward), (kernels._sinkhorn_backward, backward)):
        result = compiled(kernel, n, eps)
        assert result.asm["cubin"]
        used, spilled = assembled(result.asm["ptx"])
        assert used <= registers and spilled == 0
        if n <= 4:  # a thread owns its matrix: nothing goes through other threads
            assert "shfl" not in result.asm["ptx"] and result.metadata.shared == 0


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
def test_more_matrices_than_32_bits_count():
    kernels = pytest.importorskip("hc_transform.connections.sinkhorn_kernels")
    for kernel in (kernels._sinkhorn_forward, kernels._sinkhorn_backward):
        assert compiled(kernel, 4, 0.0, count="i64").asm["cubin"]


@needs_triton
def test_a_gpu_that_triton_fails_on_is_left_to_torch(monkeypatch):
    kernels = pytest.importorskip("hc_transform.connections.sinkhorn_kernels")

    def device(_):
        raise RuntimeError("Failed to find C compiler")

    assert not kernels.usable.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)  # as on ROCm
    assert not kernels.usable.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", device)
    with pytest.warns(UserWarning, match="many small kernels, for Triton fails on cuda:0: Failed to find C compiler"):
        assert not kernels.usable.__wrapped__(torch.device("cuda", 0))


def test_importing_the_package_does_not_import_the_kernels():
    code = "import sys, hc_transform; assert 'hc_transform.connections.sinkhorn_kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def launches(function):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGPU:
    @pytest.mark.parametrize("name", CASES)
    def test_results_and_gradients(self, name):
        logits, weight, iterations, eps = CASES[name]
        exact = by_torch(logits.double(), weight, iterations, eps)
        in_fp32 = by_torch(logits, weight, iterations, eps)
        on_gpu = by_torch(logits.cuda(), weight.cuda(), iterations, eps)
        for kernel, torchs, reference in zip(on_gpu, in_fp32, exact, strict=True):
            # The GPU's exp and division are approximate, to 2 ulp each.
            bound = 6 * (torchs - reference).abs().max().item() + 1e-6 if kernel.numel() else 0
            torch.testing.assert_close(kernel.double().cpu(), reference, rtol=0, atol=bound)

    def test_many_matrices(self):
        """More than all programs of the backward kernel take at a time."""
        logits, weight = torch.randn(200_001, 4, 4).cuda(), torch.randn(200_001, 4, 4).cuda()
        for ours, theirs in zip(
            by_torch(logits, weight, 20, 0.0), by_torch(logits.double(), weight, 20, 0.0), strict=True
        ):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-6)

    def test_one_kernel_each(self):
        logits = torch.randn(512, 4, 4, device="cuda")
        forward = torch.ops.hc_transform.sinkhorn
        backward = torch.ops.hc_transform.sinkhorn_backward
        forward(logits, 20, 0.0), backward(logits, logits, 20, 0.0)
        assert launches(lambda: forward(logits, 20, 0.0)) == ["_sinkhorn_forward"]
        assert launches(lambda: backward(logits, logits, 20, 0.0)) == ["_sinkhorn_backward"]

    def test_cuda_graph(self):
        logits = torch.randn(512, 4, 4, device="cuda")
        expected = by_torch(logits, torch.ones_like(logits), 20, 0.0)  # compiles, before anything is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            matrix = torch.ops.hc_transform.sinkhorn(logits, 20, 0.0)
            gradient = torch.ops.hc_transform.sinkhorn_backward(torch.ones_like(logits), logits, 20, 0.0)
        graph.replay()
        assert torch.equal(matrix, expected[0]) and torch.equal(gradient, expected[1])
