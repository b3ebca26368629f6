"""Work in several processes of torch.distributed that are threads of this one, so that many are cheap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed import multi_threaded_pg

_init = DeviceMesh.__init__


def _new_mesh(mesh: Any, *args: Any, **kwargs: Any) -> None:
    """Make a mesh that equals none of another thread.

    DTensor keeps by mesh what depends on the rank. A mesh knows its thread by a number that a later one may have again,
    and one that fully_shard makes of two does not know it.
    """
    _init(mesh, *args, **kwargs)
    mesh._thread_id, mesh._hash = threading.current_thread().name, None


def in_threads(work: Callable[[int], Any], world: int) -> list[Any]:
    """What a function returns on each of so many ranks; the first error of any is raised."""
    results: list[Any] = [None] * world
    errors: list[BaseException] = []  # the first one ends the others
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)
            with multi_threaded_pg.ProcessLocalGroup._coll_lock:
                multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # or the others would wait

    apart = mock.patch.object(DeviceMesh, "__init__", _new_mesh)
    apart.start()
    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 240  # the first one imports much, and the machine may be loaded
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), "ranks wait for one another"
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()
        apart.stop()
    if errors:
        raise errors[0]
    return results
