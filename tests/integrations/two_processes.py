"""Trainings in two processes of gloo: ``torchrun -m tests.integrations.two_processes NAME FOLDER``.

``with_processes.py`` starts them. Each writes what it ends with to ``FOLDER/NAME-RANK.pt``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

with warnings.catch_warnings():  # those of imports are not ours
    warnings.simplefilter("ignore")
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from fisher_kernels import KFAC, MBF, AdaFisherW
from fisher_kernels.integrations.transformers import FisherTrainer

TOKENS, LENGTH = 23, 6
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaFisherW": (AdaFisherW, {"lr": 1e-2, "update_interval": 2}),
    "MBF": (MBF, {"lr": 1e-2}),
    "KFAC": (KFAC, {"lr": 1e-2}),
}


def gpt2() -> nn.Module:
    """In float64, without dropout, so that what is left between ways to train is rounding."""
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_positions=8, n_embd=8, n_layer=2, n_head=2, **none)).double()


def texts(count: int = 48) -> list[dict[str, Tensor]]:
    rows = torch.randint(TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(
    name: str, folder: Path, resume: str | None = None, kind: type[FisherTrainer] = FisherTrainer, **changes: Any
) -> FisherTrainer:
    """Six steps of eight rows, in the order in which they are, however they are divided."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": 6, "weight_decay": 0.1, "max_grad_norm": 0.5, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": 3,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    run = kind(
        gpt2(),
        TrainingArguments(str(folder), **{**settings, **changes}),
        train_dataset=texts(),
        optimizer_cls_and_kwargs=KINDS[name],
    )
    run.train(resume_from_checkpoint=resume)
    return run


def whole(run: FisherTrainer) -> dict[str, Tensor]:
    """The parameters of a training, by the names of a model that nothing is around."""
    named = {name.removeprefix("module."): p for name, p in run.model_wrapped.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named.items()}


def ddp(folder: Path) -> dict[str, Any]:
    """DistributedDataParallel, two micro-batches of two rows in each process."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    return {name: whole(trained(name, folder, **sizes)) for name in KINDS}


class Sharding(FisherTrainer):
    """One that shards by ``fully_shard`` on the CPU, which Accelerate offers on GPUs alone."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GPT2Block"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        kind = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = kind
        self.accelerator.state._shared_state.update(distributed_type=kind, fsdp_plugin=plugin)
        self.is_fsdp_enabled = True


def fsdp(folder: Path) -> dict[str, Any]:
    """``fully_shard``, from the beginning and from a checkpoint in the middle."""
    found: dict[str, Any] = {}
    settings = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 3}
    for name in KINDS:
        run = trained(name, folder / name, kind=Sharding, **settings)
        found[name] = whole(run), [type(p).__name__ for p in run.model_wrapped.parameters()]
        again = trained(name, folder / f"{name}-2", str(folder / name / "checkpoint-3"), kind=Sharding, **settings)
        found[f"{name}-again"] = whole(again)
    return found


if __name__ == "__main__":
    name, place = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    result = {"ddp": ddp, "fsdp": fsdp}[name](place / name)
    torch.save(result, place / f"{name}-{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
