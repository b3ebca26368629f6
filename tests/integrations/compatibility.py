"""Trains with each optimizer in each framework and each way, and writes what became of it.

``python -m tests.integrations.compatibility --page docs/compatibility.md``; some minutes on one core. On the CPU, in
one process: of DistributedDataParallel and ``fully_shard`` there is a group of one. A cell is ``works`` where training
ends, all parameters are finite and have moved, and the optimizer has warned of nothing; a resumed training has to end
with the same bits. Else it is what was raised, in a note.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaFisher": (AdaFisher, {"lr": 1e-2}),
    "AdaFisherW": (AdaFisherW, {"lr": 1e-2}),
    "MBF": (MBF, {"lr": 1e-2}),
    "KFAC": (KFAC, {"lr": 1e-2}),
    "EKFAC": (EKFAC, {"lr": 1e-2}),
    "EKFACAdam": (EKFACAdam, {"lr": 1e-2}),
    "SOFIM": (SOFIM, {"lr": 1e-2}),
}
FEATURES = ("train", "accumulate", "clip", "resume", "bfloat16", "float16, scaler", "compile", "DDP", "FSDP2")
FRAMEWORKS = {"torch": "torch", "Trainer": "transformers"}
"""How a section is called -> the package."""

ELSEWHERE = {
    ("Trainer", "float16, scaler"): "offered on a GPU alone",
    ("Trainer", "compile"): "not run yet",
    ("Trainer", "DDP"): "tried in two processes, by the tests: works for AdaFisherW, MBF and KFAC",
    ("Trainer", "FSDP2"): "tried in two processes, by the tests: works for AdaFisherW, MBF and KFAC",
}
"""What this does not run, and why."""

WORKS, NOT_RUN = "works", "-"
STEPS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)]


def made(name: str, model: nn.Module, **more: Any) -> Any:
    kind, settings = OPTIMIZERS[name]
    if kind is SOFIM:
        return kind(model.parameters(), **settings)
    return kind(model, **settings, **more)


def moved(model: nn.Module, before: dict[str, Tensor]) -> None:
    for (key, p), old in zip(model.named_parameters(), before.values(), strict=True):
        now = p.full_tensor() if hasattr(p, "full_tensor") else p
        if not bool(now.isfinite().all()) or torch.equal(now, old):
            raise AssertionError(f"{key} is not finite, or has not moved")


def values(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for key, p in model.named_parameters()
    }


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for key, value in some.items():
        if not torch.equal(value, others[key]):
            raise AssertionError(f"{key} is another one after a training that was resumed")


@contextlib.contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def in_torch(name: str, feature: str, folder: Path) -> None:
    """A loop of one's own."""
    apart = group_of_one(folder) if feature in ("DDP", "FSDP2") else contextlib.nullcontext()
    with apart:
        model = network()
        before = values(model)
        if feature == "FSDP2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if "scaler" in feature else None
        more = {} if scaler is None else {"grad_scaler": scaler}
        optimizer = made(name, model, **more)
        run: Any = model
        if feature == "compile":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        elif feature == "DDP":
            run = nn.parallel.DistributedDataParallel(model)
        dtype = {"bfloat16": torch.bfloat16, "float16, scaler": torch.float16}.get(feature)

        def train(net: Any, steps: Any) -> None:
            for number, (x, y) in enumerate(steps):
                with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                    output = net(x)
                loss = F.cross_entropy(output.float(), y)
                (loss if scaler is None else scaler.scale(loss)).backward()
                if feature == "accumulate" and number % 2 == 0:
                    continue
                if feature == "clip":
                    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()

        train(run, batches())
        moved(model, before)
        if feature == "resume":
            states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            train(run, batches())
            expected = values(model)
            model.load_state_dict(states[0])
            optimizer = made(name, model)
            optimizer.load_state_dict(states[1])
            train(model, batches())
            same(values(model), expected)


def in_trainer(name: str, feature: str, folder: Path) -> None:
    """``FisherTrainer`` on a tiny GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    from fisher_kernels.integrations.transformers import FisherTrainer

    settings = {
        "accumulate": {"gradient_accumulation_steps": 2},
        "clip": {"max_grad_norm": 0.5},
        "resume": {"save_strategy": "steps", "save_steps": 2},
        "bfloat16": {"bf16": True},
        "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }.get(feature, {})
    plain = {"max_steps": STEPS, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    rows = torch.randint(23, (64, 6), generator=torch.Generator().manual_seed(0))

    def trainer(where: Path) -> Any:
        torch.manual_seed(0)
        size = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        return FisherTrainer(
            GPT2LMHeadModel(GPT2Config(vocab_size=23, **size)),
            TrainingArguments(str(where), **{"save_strategy": "no", **plain, **settings}),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            optimizer_cls_and_kwargs=OPTIMIZERS[name],
        )

    run = trainer(folder / "whole")
    before = values(run.model)
    run.train()
    moved(run.model, before)
    if feature == "resume":
        again = trainer(folder / "again")
        again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
        same(values(again.model), values(run.model))


RUNS: dict[str, Callable[[str, str, Path], None]] = {
    "torch": in_torch,
    "Trainer": in_trainer,
}


def outcome(framework: str, name: str, feature: str) -> str:
    """What became of it."""
    if (framework, feature) in ELSEWHERE:
        return NOT_RUN
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch._dynamo.reset()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                RUNS[framework](name, feature, Path(folder))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    ours = [str(w.message) for w in told if str(w.message).startswith(OPTIMIZERS[name][0].__name__ + ":")]
    return f"warns: {ours[0]}" if ours else WORKS


def page(found: dict[str, dict[str, dict[str, str]]], versions: dict[str, str]) -> str:
    """The document: a table for each framework, of features and optimizers."""
    lines = [
        "# Compatibility",
        "",
        "What each optimizer does in each framework, as `python -m tests.integrations.compatibility` found it, which",
        "trains in each of these ways on the CPU: " + ", ".join(f"{p} {v}" for p, v in versions.items()) + ".",
        "`works` means that training ends, all parameters are finite and have moved, and the optimizer warned of",
        "nothing; a resumed training ends with the same bits. DDP and FSDP2 are in a group of one process here; what",
        "several add up is compared with one by the tests. How to set each up is in",
        "[frameworks](guides/frameworks.md). Lightning and Accelerate have tests of their own and are not here yet.",
    ]
    for framework, of_features in found.items():
        notes: dict[str, int] = {}
        lines += ["", f"## {framework}", "", f"| | {' | '.join(OPTIMIZERS)} |", "| --- |" + " --- |" * len(OPTIMIZERS)]
        for feature, cells in of_features.items():
            shown = []
            for cell in cells.values():
                text = ELSEWHERE[framework, feature] if cell == NOT_RUN else cell
                shown.append(WORKS if cell == WORKS else f"({notes.setdefault(text, len(notes) + 1)})")
            lines.append(f"| {feature} | {' | '.join(shown)} |")
        lines += ["", *(f"{number}. {text}" for text, number in notes.items())] if notes else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for framework in FRAMEWORKS:
        for feature in FEATURES:
            cells = {name: outcome(framework, name, feature) for name in OPTIMIZERS}
            found.setdefault(framework, {})[feature] = cells
            print(
                framework,
                feature,
                *(f"{name}: {cell[:200]}" for name, cell in cells.items() if cell != WORKS),
                flush=True,
            )
    if given.page is not None:
        given.page.write_text(page(found, {package: version(package) for package in FRAMEWORKS.values()}))


if __name__ == "__main__":
    main()
