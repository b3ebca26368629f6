"""AdamW replaced in an existing Trainer of transformers: ``python examples/trainer.py``; half a minute on one core.

A tiny GPT-2 learns the English of Python's own documentation, byte by byte: with the Trainer as it is, and as
FisherTrainer, where the lines that differ are the class and ``optimizer_cls_and_kwargs``.
"""

from __future__ import annotations

import argparse
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from fisher_kernels import KFAC
from fisher_kernels.integrations.transformers import FisherMetrics, FisherTrainer

CONTEXT = 64


def texts() -> list[dict[str, torch.Tensor]]:
    """Rows of bytes."""
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8).long()
    return [{"input_ids": row, "labels": row} for row in text[: 4096 * CONTEXT].view(-1, CONTEXT)]


def model() -> GPT2LMHeadModel:
    """The same weights each time."""
    set_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, **none))


def main() -> None:
    """Train both for as many steps, on the same batches."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    rows = texts()
    data: dict[str, Any] = {"train_dataset": rows[:-256], "eval_dataset": rows[-256:]}
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 32, "weight_decay": 0.01,
            "lr_scheduler_type": "cosine", "logging_steps": max(1, steps // 2), "save_strategy": "no", "seed": 0,
            "use_cpu": True, "report_to": [], "disable_tqdm": True,
        }  # fmt: skip

        before = Trainer(model(), TrainingArguments(learning_rate=3e-3, **arguments), **data)
        before.train()
        print(f"AdamW: evaluation loss {before.evaluate()['eval_loss']:.3f}", flush=True)

        after = FisherTrainer(
            model(),
            TrainingArguments(**arguments),  # whose learning_rate is for AdamW; its schedule and decay stay
            optimizer_cls_and_kwargs=(KFAC, {"lr": 0.1}),
            callbacks=[FisherMetrics()],  # figures of the optimizer in each log
            **data,
        )
        after.train()
        print(f"KFAC: evaluation loss {after.evaluate()['eval_loss']:.3f}", flush=True)


if __name__ == "__main__":
    main()
