"""Parameters that are divided among processes: refused, whichever way they come, where whole ones are needed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.optim.base import FisherOptimizer
from tests.processes import in_two_processes, needs_processes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:`torch.jit:DeprecationWarning", "ignore:.*TorchScript"
)

READERS: tuple[Any, ...] = (AdaFisher, AdaFisherW, MBF, KFAC, EKFAC, EKFACAdam)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(part)
    return torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def message_of(work: Callable[[], Any]) -> str:
    """Of the error that ends it."""
    try:
        work()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# One process, which stands for one of several.


def test_a_share_that_another_optimizer_gives_is_refused_where_one_norm_is_meant() -> None:
    """ZeroRedundancyOptimizer makes the optimizer within itself, with the share of its process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    class Sharded(ZeroRedundancyOptimizer):
        def __init__(self, processes: int, scope: Any) -> None:
            self.world_size = processes
            self.optim = SOFIM(nn.Linear(2, 2).parameters(), scope=scope)

    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer .* a share of them: scope='tensor' is exact"):
        Sharded(2, "global")
    Sharded(2, "tensor")
    Sharded(1, "global")


def test_the_share_of_a_worker_is_refused() -> None:
    """DistributedOptimizer makes one optimizer for each worker, of the parameters that lie there."""
    local = pytest.importorskip("torch.distributed.optim.optimizer")._LocalOptimizer
    there = [SimpleNamespace(local_value=functools.partial(nn.Parameter, torch.ones(2)))]
    with pytest.raises(ValueError, match="DistributedOptimizer gives each process a share"):
        local(SOFIM, there)
    local(SOFIM, there, scope="tensor")


@pytest.mark.parametrize("kind", READERS)
def test_readers_of_layers_are_refused_within_other_optimizers(kind: Any) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    class Sharded(ZeroRedundancyOptimizer):
        def __init__(self, make: Callable[[], Any]) -> None:
            self.world_size = 2
            self.optim = make()

    model = network()
    asked = f"{kind.__name__} needs all parameters of the model, and ZeroRedundancyOptimizer .* DistributedDataParallel"
    with pytest.raises(ValueError, match=asked):
        Sharded(lambda: kind(model.parameters()))
    with pytest.raises(ValueError, match=asked):
        Sharded(lambda: kind(model, params=[model[0].weight]))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", [*READERS, SOFIM])
def test_flat_parameters_are_whole_in_one_process(kind: Any) -> None:
    model = network()
    for p in model.parameters():
        p._fsdp_flattened = True  # type: ignore[attr-defined]
    optimizer: FisherOptimizer = kind(model.parameters() if kind is SOFIM else model)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


# Two processes.


def _zero(rank: int) -> dict[str, str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    share = functools.partial(ZeroRedundancyOptimizer, list(network().parameters()))
    return {
        "global": message_of(lambda: share(optimizer_class=SOFIM)),
        **{kind.__name__: message_of(functools.partial(share, optimizer_class=kind)) for kind in READERS},
    }


def _zero_by_tensor(rank: int) -> list[Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network().double()
    optimizer = ZeroRedundancyOptimizer(list(model.parameters()), optimizer_class=SOFIM, scope="tensor")
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(2 * step + rank)
        F.cross_entropy(model(x.double()), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad.div_(2))
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def _fsdp(rank: int) -> dict[str, str]:
    warnings.simplefilter("ignore")  # of torch, which would have another one used
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    found = {}
    for kind in (*READERS, SOFIM):
        for original in (False, True):
            model: nn.Module = FullyShardedDataParallel(network(), use_orig_params=original, device_id=cpu)
            made = functools.partial(kind, model.parameters() if kind is SOFIM else model)
            found[f"{kind.__name__} {original}"] = message_of(made)
        model = network()
        optimizer = kind(model.parameters() if kind is SOFIM else model)
        divided = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
        x, y = batch(rank)
        F.cross_entropy(divided(x), y).backward()
        found[f"{kind.__name__} before"] = message_of(optimizer.step)
    return found


def _all(rank: int) -> tuple[dict[str, str], list[Tensor], dict[str, str]]:
    return _zero(rank), _zero_by_tensor(rank), _fsdp(rank)


@needs_processes
def test_two_processes(tmp_path: Path) -> None:
    model = network().double()
    plain = SOFIM(model.parameters(), scope="tensor")
    for step in range(3):
        plain.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(batch(2 * step), batch(2 * step + 1), strict=True))
        F.cross_entropy(model(x.double()), y).backward()
        plain.step()
    for zero, by_tensor, fsdp in in_two_processes(_all, tmp_path):
        assert "gives each process a share of them: scope='tensor' is exact there" in zero.pop("global")
        assert zero.keys() == {kind.__name__ for kind in READERS}
        assert all("ZeroRedundancyOptimizer gives each process a share" in message for message in zero.values())
        for p, q in zip(model.parameters(), by_tensor, strict=True):
            torch.testing.assert_close(q, p.detach(), rtol=0, atol=1e-12)
        assert len(fsdp) == 3 * (len(READERS) + 1)
        for case, message in fsdp.items():
            kind = case.split()[0]
            expected = f"of FullyShardedDataParallel, of which each process has a part: {kind} needs whole parameters"
            assert expected in message, case
