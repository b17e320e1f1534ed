"""Passes in bf16, and a CUDA graph on a GPU; see test_on_a_gpu.py for what a pretended one shows."""
import copy

import pytest
import torch
import torch.nn.functional as F

import ldarts
from ldarts.architect import search_step
from ldarts.capture import Captured
from ldarts.runs import amp_dtype


def test_passes_in_bf16_point_where_float64_does():
    """Gradients w.r.t. α and both w.r.t. w of an untrained supernet; passes of a difference stay in float32."""
    torch.manual_seed(0)
    net = ldarts.SearchNetwork(8, 10, 8, "s2").to(memory_format=torch.channels_last)
    x, y = torch.randn(32, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(32) % 10
    found, autocast = {}, {}
    for name, dtype, amp in (("float64", torch.float64, None), ("bf16", torch.float32, torch.bfloat16)):
        passes = autocast[name] = []  # whether each is one of mixed precision

        def criterion(logits, y):
            passes.append(torch.is_autocast_enabled("cpu"))
            return F.cross_entropy(logits, y)

        arch = ldarts.Architect(copy.deepcopy(net).to(dtype), criterion, amp=amp)
        batch = x.to(dtype), y
        _, dw, exact, value = arch.lambda_grads(batch, "cosine", 0.0, "exact")
        central = arch.lambda_grads(batch, "cosine", 1e-2, "central")[2]
        alphas = arch.alpha_grads(batch, batch, 0.025, None, False)
        few = x[:2].to(dtype), y[:2]
        arch.alpha_grads(few, few, 0.025, None, True)
        parts = [torch.cat([t.double().flatten() for t in part]) for part in (alphas, dw, exact, central)]
        found[name] = parts, float(value)
    cosines = [float(F.cosine_similarity(a, b, 0)) for a, b in zip(found["float64"][0], found["bf16"][0])]
    print("bf16 against float64: cosine of the gradients w.r.t. α {:.4f}, of ∇L {:.4f}, of ∇Λ exact {:.4f}, "
          "central {:.4f}".format(*cosines), f"Λ {found['bf16'][1]:+.4f} against {found['float64'][1]:+.4f}")
    exact, central, first, second = [True], [True, False, False], [True], [True, True, False, False]
    assert autocast["bf16"] == exact + central + first + second
    assert not any(autocast["float64"])
    # Rounding differs with the number of threads: by 0.05.
    assert all(c > least for c, least in zip(cosines, (0.8, 0.7, 0.45, 0.3)))
    assert abs(found["bf16"][1] - found["float64"][1]) < 0.15


def test_bf16_is_refused_on_a_gpu_without_its_convolutions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ldarts.InputError, match="--amp bf16: a GPU of compute capability 7.5"):
        amp_dtype("bf16", torch.device("cuda:0"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU; there is none")
def test_a_graph_on_a_gpu_is_the_step():
    results = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = ldarts.SearchNetwork(4, 10, 4, "darts").cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, fused=True)
        arch = ldarts.Architect(net, F.cross_entropy)

        def step(x, y, lambda_t):
            return search_step(arch, optimizer, (x, y), (x, y), unrolled=False, alpha_first=True,
                               lambda_t=lambda_t, kind="cosine", epsilon=1e-2, method="central",
                               grad_clip=5.0)

        take = Captured(step, net, [optimizer, arch.optimizer]) if capture else step
        generator = torch.Generator().manual_seed(0)
        for i in range(3):
            x = torch.randn(8, 3, 32, 32, generator=generator).cuda().contiguous(
                memory_format=torch.channels_last)
            take(x, torch.arange(8, device="cuda"), torch.tensor(0.1 * i, device="cuda"))
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
