"""What can be shown of GPUs without one, on pretend CUDA devices (see pretend_cuda.py)."""

from __future__ import annotations

from typing import Any

import torch
from pretend_cuda import Counts, PretendTensor, counting, in_process, pretend


def counts_of_operators() -> dict[str, Any]:
    counts = Counts()
    values = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    with counting(counts), torch.inference_mode():
        with counts.stage("copies"):
            here = values.to("cuda")
            there = here.to("cuda:1")
            torch.zeros(2).to("cuda", non_blocking=True)
            back = there.cpu()
            torch.tensor([1, 2], device="cuda")
        with counts.stage("views"):
            column = here[:, 1]
            column.view(2, 1).expand(2, 3).T.unsqueeze(0)
        with counts.stage("work"):
            product = here @ here
            column.add_(1)
            order = here.argsort()
        with counts.stage("waits"):
            read = (float(product[0, 0]), here.tolist(), bool((here > 0).all()))
            chosen = here[here > 2]
            here[[0]]
    assert isinstance(here, PretendTensor) and str(here.device) == "cuda:0" and str(there.device) == "cuda:1"
    return {
        "table": counts.table(),
        "copies": dict(counts.copies),
        "back": back.tolist(),
        "read": read,
        "chosen": chosen.held.tolist(),
        "order": order.held.tolist(),
    }


def test_operators_are_counted_and_compute() -> None:
    found = in_process(counts_of_operators)
    assert found["table"] == {"copies": (3, 5), "work": (0, 7), "waits": (5, 14)}
    assert found["copies"] == {"copies": 5, "waits": 2}
    assert found["back"] == [[3.0, 1.0], [2.0, 4.0]]
    assert found["read"] == (11.0, [[3.0, 2.0], [2.0, 5.0]], True)
    assert found["chosen"] == [3.0, 5.0] and found["order"] == [[1, 0], [0, 1]]


def errors_of_mixed_devices() -> list[str]:
    found = []
    with counting():
        here, there, host = pretend(torch.ones(3)), pretend(torch.ones(3), 1), torch.ones(3)
        here + torch.tensor(1.0)  # a single value
        here[torch.tensor([0])]  # indices
        operators = (lambda: here + there, lambda: here * host, lambda: torch.cat([here, host]), lambda: host[here > 0])
        for mixed in operators:
            try:
                mixed()
            except RuntimeError as error:
                found.append(str(error))
    return found


def test_operators_that_mix_devices_fail() -> None:
    found = in_process(errors_of_mixed_devices)
    assert len(found) == 4 and all("on the same device" in error for error in found)
