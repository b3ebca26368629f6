"""Low-rank adapters of a causal language model: ``python examples/lora.py``; a minute on one core.

A tiny Llama stands in for one that you would load with ``from_pretrained``: it learns one half of Python's own
documentation with AdamW, and stays as it is. Its adapters learn the other half, in capitals.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from fisher_kernels import EKFACAdam
from fisher_kernels.integrations.transformers import FisherTrainer

CONTEXT = 64


def rows(text: str, most: int) -> list[dict[str, torch.Tensor]]:
    """Rows of bytes."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return [
        {"input_ids": row, "labels": row} for row in data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:most]
    ]


def pretrained(folder: str, text: list[dict[str, torch.Tensor]], steps: int) -> LlamaForCausalLM:
    """In the place of ``LlamaForCausalLM.from_pretrained``."""
    set_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, **size)
    model = LlamaForCausalLM(config)
    Trainer(model, TrainingArguments(learning_rate=1e-2, **arguments(folder, steps)), train_dataset=text).train()
    return model


def arguments(folder: str, steps: int) -> dict[str, Any]:
    """What all trainings have."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine",
        "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "seed": 0,
    }  # fmt: skip


def adapted(model: nn.Module) -> Any:
    """A copy with adapters of rank 8 at all of its Linear layers, which alone are trained."""
    set_seed(1)
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def main() -> None:
    """Train the adapters with both, from the same weights and on the same batches."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    text = "".join(topics.values())
    half = len(text) // 2
    other = rows(text[half:].upper(), 2000)
    data: dict[str, Any] = {"train_dataset": other[:-200], "eval_dataset": other[-200:]}
    with tempfile.TemporaryDirectory() as folder:
        model = pretrained(folder, rows(text[:half], 2000), 2 * steps)

        before = Trainer(adapted(model), TrainingArguments(learning_rate=1e-2, **arguments(folder, steps)), **data)
        print(f"before: evaluation loss {before.evaluate()['eval_loss']:.3f}")
        before.train()
        print(f"AdamW: evaluation loss {before.evaluate()['eval_loss']:.3f}", flush=True)

        after = FisherTrainer(
            adapted(model),
            TrainingArguments(**arguments(folder, steps)),
            optimizer_cls_and_kwargs=(EKFACAdam, {"lr": 2e-2}),
            **data,
        )
        after.train()
        print(f"EKFACAdam: evaluation loss {after.evaluate()['eval_loss']:.3f}")
        optimizer = after.optimizer.optimizer  # within what Accelerate puts around it
        served = [row for row in optimizer.explain() if not row.frozen]
        print(f"served by a rule: {sum(not row.fallback for row in served)} of {len(served)} adapters' weights")
        print(
            f"state: {sum(row.state_bytes for row in served) / after.model.num_parameters(True):.0f} bytes a parameter"
        )


if __name__ == "__main__":
    main()
