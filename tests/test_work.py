"""The whole search step on tensors without values, and what of it is counted."""
import sys

import pytest
import torch

from evidence.gpu_work import Work, step_on_meta
from ldarts.fused import compiled_for

STEPS = [(True, "central", "central", "cosine"), (True, "exact", "exact", "sign"),
         (False, "central", "central", "cosine")]  # unrolled, hessian, method, kind
OTHER_KIND = [(*step, "sign" if kind == "cosine" else "cosine") for *step, kind in STEPS]
CASES = [("s1", "engine", STEPS), ("nasbench201", "engine", STEPS + OTHER_KIND),
         ("nasbench201", "plain", STEPS)]  # the other spaces on the pretended GPU, see test_on_a_gpu.py


@pytest.mark.parametrize("space, form, steps", CASES, ids=[f"{space}-{form}" for space, form, _ in CASES])
def test_no_step_reads_a_value_back_or_mixes_devices(space, form, steps, monkeypatch):
    if form == "plain":
        monkeypatch.setattr("ldarts.fused.compiled_for", lambda device: False)
        monkeypatch.setattr(sys.modules["ldarts.fused.sums"], "compiled_for", lambda device: False)
    elif not compiled_for("meta"):
        pytest.skip("the extension is not compiled: no compiler here")
    step = step_on_meta(space, 4, 1 if space == "nasbench201" else 4, 2, size=16)
    for unrolled, hessian, method, kind in steps:
        with Work() as work:
            step(unrolled=unrolled, hessian=hessian, method=method, kind=kind)
        assert bool({"affine_sums"} & work.calls.keys()) == (form == "engine")


@pytest.mark.parametrize("mistake", [
    lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x.mul(torch.ones(3)),
    lambda x: x.copy_(torch.ones(3)), lambda x: x.cpu(), lambda x: x[torch.tensor([0, 1])],
    lambda x: torch.batch_norm(x.expand(2, 3), None, None, *torch.ones(2, 3), True, 0.1, 0.0, False)])
def test_a_value_read_back_and_a_mix_of_devices_are_errors(mistake):
    with pytest.raises((RuntimeError, NotImplementedError)), Work():
        mistake(torch.empty(3, device="meta"))


def test_what_is_counted():
    with torch.device("meta"):
        x, weight = torch.empty(2, 8, 4, 4), torch.empty(8, 1, 3, 3, requires_grad=True)
        weights = [torch.empty(8, 3) for _ in range(400)]
    with Work() as work:
        torch.nn.functional.conv2d(x.relu(), weight, padding=1, groups=8).sum().backward()
        torch._foreach_mul(weights, torch._foreach_add(weights, 1))
        torch._foreach_add_(weights, [w.t().contiguous().t() for w in weights])
        torch.zeros_like(x[0]).fill_(1).view(-1).add_(torch.empty(1, device="meta").expand(128))
    found = {name: counts[1:3] for name, counts in work.calls.items()}
    image, kernel, small = 4 * 2 * 8 * 16, 4 * 8 * 9, 4 * 400 * 24
    assert found["relu"] == [1, 2 * image] and found["convolution"] == [1, 2 * image + kernel]
    assert found["convolution_backward"] == [1, 4 + image + 2 * kernel]  # a gradient of stride 0
    assert found["_foreach_mul"] == [2, 3 * small] and found["_foreach_add"] == [1, 2 * small]
    assert found["_foreach_add_"] == [400, 3 * small] and found["clone"] == [400, 2 * small]
    assert found["fill_"] == found["zeros_like"] == [1, image // 2] and found["add_"] == [1, image + 4]
    assert work.total()[0] == sum(launches for launches, _ in found.values())
