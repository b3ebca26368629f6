"""Hugging Face's Trainer on tiny models of random weights; run by test_frameworks.py, in a process of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisher_kernels import KFAC, MBF, SOFIM, AdaFisherW
from fisher_kernels.curvature.hooks import ModelHook

with warnings.catch_warnings():  # those of imports are not ours
    warnings.simplefilter("ignore")
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
        Trainer,
        TrainingArguments,
    )
    from transformers.trainer_callback import TrainerCallback

from fisher_kernels.integrations.figures import read
from fisher_kernels.integrations.transformers import AccumulationCheck, FisherMetrics, FisherTrainer, FisherTrainerMixin

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # of the framework's own
    pytest.mark.filterwarnings("error:.*fisher_kernels"),
]

TOKENS = 23
TINY = {"vocab_size": TOKENS, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        **TINY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    return BertForMaskedLM(config)


def texts(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(TOKENS, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4,
        "weight_decay": 0.1, "max_grad_norm": 0.5, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def trainer(folder: Path, model: nn.Module, kind: type, settings: dict[str, Any], **changes: Any) -> FisherTrainer:
    return FisherTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=texts(),
        eval_dataset=texts(4),
        optimizer_cls_and_kwargs=(kind, settings),
    )


OPTIMIZERS = {
    "AdaFisherW": (AdaFisherW, {"lr": 1e-2, "update_interval": 2}),
    "MBF": (MBF, {"lr": 1e-2}),
    "KFAC": (KFAC, {"lr": 1e-2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_training_goes_on_bit_for_bit(name: str, bf16: bool, tmp_path: Path) -> None:
    """With accumulation, clipping, dropout, decay groups and evaluation, from a checkpoint in the middle."""
    kind, settings = OPTIMIZERS[name]
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(tmp_path / "whole", gpt2(), kind, dict(settings), bf16=bf16, **steps)
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    made = whole.optimizer.optimizer  # within accelerate's
    assert type(made) is kind
    assert not any(row.fallback for row in made.explain())
    assert all(torch.isfinite(p).all() for p in whole.model.parameters())
    assert any((p != before[name]).any() for name, p in whole.model.state_dict().items())
    second = trainer(tmp_path / "second", gpt2(), kind, dict(settings), bf16=bf16, **steps)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (key, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, second)]
    assert losses[0] == losses[1]
    assert len([entry for entry in whole.state.log_history if "eval_loss" in entry]) == 3


def test_adapters_alone_are_trained(tmp_path: Path) -> None:
    """Those of peft, on a model that stays as it is, from a checkpoint too."""
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        settings = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
        return peft.get_peft_model(gpt2(), settings)

    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", adapted(), AdaFisherW, {"lr": 1e-2}, **steps)
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    changed = {key for key, value in whole.model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(changed) == 2
    assert all("lora_" in key for key in changed)
    assert not any(row.fallback for row in whole.optimizer.optimizer.explain())
    second = trainer(tmp_path / "second", adapted(), AdaFisherW, {"lr": 1e-2}, **steps)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (key, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def mixtral(experts: str) -> MixtralForCausalLM:
    """Four experts, whose weights lie in two stacks."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=TOKENS, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=8, bos_token_id=0,
        eos_token_id=0, experts_implementation=experts,
    )  # fmt: skip
    return MixtralForCausalLM(config)


EXPERTS = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_stacked_experts_are_served(experts: str, name: str, tmp_path: Path) -> None:
    """As docs/models.md has it, by all but the norms and the embedding of K-FAC; in one as in the other."""
    kind, settings = OPTIMIZERS[name]
    run = trainer(tmp_path, mixtral(experts), kind, dict(settings))
    run.train()
    rows = {row.name: row for row in run.optimizer.optimizer.explain()}
    assert not any(row.fallback for row in rows.values())
    for expert in EXPERTS:
        assert rows[expert].rule == "linear"
        assert "by function" in rows[expert].detail
    assert rows["model.layers.0.mlp.gate.weight"].rule == "linear"
    assert "MixtralTopKRouter" not in rows["model.layers.0.mlp.gate.weight"].detail


def test_experts_that_are_gathered_by_token_are_named(tmp_path: Path) -> None:
    """One matrix for each token is another operation, which has no rule."""
    run = trainer(tmp_path, mixtral("batched_mm"), AdaFisherW, {"lr": 1e-2})
    with pytest.warns(UserWarning, match=r"71% of the trained parameters have no layer rule .*gate_up_proj"):
        run.train()
    rows = run.optimizer.optimizer.explain()
    assert {row.name for row in rows if row.fallback} == EXPERTS
    assert all("of which __getitem__ has no rule" in row.detail for row in rows if row.fallback)


def test_groups_are_those_of_the_trainer(tmp_path: Path) -> None:
    ours = trainer(tmp_path, gpt2(), AdaFisherW, {"lr": 1e-2})
    theirs = Trainer(gpt2(), arguments(tmp_path), train_dataset=texts())
    made, expected = ours.create_optimizer(), theirs.create_optimizer()
    assert isinstance(made, AdaFisherW)
    names = {p: name for model in (ours.model, theirs.model) for name, p in model.named_parameters()}

    def grouped(optimizer: Any) -> list[Any]:
        return [(g["weight_decay"], [names[p] for p in g["params"]]) for g in optimizer.param_groups]

    assert grouped(made) == grouped(expected)
    assert [decay for decay, _ in grouped(made)] == [0.1, 0.0]
    assert ours.create_optimizer() is made


def test_what_the_trainer_does_itself_is_left_to_it(tmp_path: Path) -> None:
    assert type(trainer(tmp_path, gpt2(), SOFIM, {"lr": 1e-2}).create_optimizer()) is SOFIM
    assert type(trainer(tmp_path, gpt2(), torch.optim.SGD, {"lr": 1e-2}).create_optimizer()) is torch.optim.SGD
    model = gpt2()
    given = AdaFisherW(model)
    kept = FisherTrainer(model, arguments(tmp_path), train_dataset=texts(), optimizers=(given, None))
    assert kept.create_optimizer() is given
    with pytest.raises(ValueError, match="names model, expected the other arguments alone"):
        trainer(tmp_path, gpt2(), AdaFisherW, {"model": model}).create_optimizer()


def test_the_scaler_of_the_trainer_is_handed_over(tmp_path: Path) -> None:
    run = trainer(tmp_path, gpt2(), AdaFisherW, {"lr": 1e-2})
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert run.create_optimizer().statistics.grad_scaler is run.accelerator.scaler


class Watch(TrainerCallback):
    """The gradient of the first step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]


def first_gradient(folder: Path, model: nn.Module, micro_batches: int) -> list[Tensor]:
    """Of a batch of four, in so many micro-batches."""
    sizes = {"per_device_train_batch_size": 4 // micro_batches, "gradient_accumulation_steps": micro_batches}
    run = trainer(folder, model.double().eval(), AdaFisherW, {"lr": 1e-2}, max_steps=1, max_grad_norm=0.0, **sizes)
    run.args.max_grad_norm = 0.0
    run.add_callback(watch := Watch())
    run.train()
    return watch.gradients


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = model.config.attention_probs_dropout_prob = 0.0
    return model


def test_gradients_of_a_causal_model_are_those_of_the_joint_batch(tmp_path: Path) -> None:
    whole, split = (first_gradient(tmp_path, gpt2(0.0), k) for k in (1, 2))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_model_that_leaves_the_division_to_nobody_is_named(tmp_path: Path) -> None:
    """Gradients are twice those of the joint batch; they are right where the model says that it does not divide."""
    whole = first_gradient(tmp_path, without_dropout(bert()), 1)
    with pytest.warns(UserWarning, match="gradients of 2 accumulated micro-batches are added up, 2 times their mean"):
        split = first_gradient(tmp_path, without_dropout(bert()), 2)
    model = without_dropout(bert())
    model.accepts_loss_kwargs = False
    right = first_gradient(tmp_path, model, 2)
    for a, b, c in zip(whole, split, right, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(c, a, rtol=1e-10, atol=1e-14)


def test_the_check_says_nothing_where_the_trainer_has_the_loss(tmp_path: Path) -> None:
    """Under label smoothing the labels do not reach the model; hooks are gone after the first forward."""
    run = trainer(tmp_path, bert(), AdaFisherW, {"lr": 1e-2}, label_smoothing_factor=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.train()
    assert not [w for w in told if "num_items_in_batch" in str(w.message)]
    assert len([c for c in run.callback_handler.callbacks if isinstance(c, AccumulationCheck)]) == 1
    hooks = [*run.model._forward_pre_hooks.values(), *run.model._forward_hooks.values()]
    assert all(type(hook) is ModelHook for hook in hooks)  # the optimizer's


def test_the_mixin_goes_with_a_trainer_of_the_users_own(tmp_path: Path) -> None:
    class Mine(Trainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return ["transformer.wte.weight"]

    class Both(FisherTrainerMixin, Mine):
        pass

    run = Both(gpt2(), arguments(tmp_path), train_dataset=texts(), optimizer_cls_and_kwargs=(MBF, {}))
    run.train()
    assert len(run.optimizer.optimizer.param_groups[0]["params"]) == 1


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Accelerate keeps its state in the class."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


def test_figures_are_logged_and_written(tmp_path: Path) -> None:
    """Into the Trainer's history, TensorBoard's files and lines of JSON, the same."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trainer(tmp_path, gpt2(), AdaFisherW, {"lr": 1e-2}, logging_steps=2)
    writer = tensorboard.SummaryWriter(str(tmp_path / "events"))
    run.add_callback(FisherMetrics(tmp_path / "run.jsonl", writer))
    run.train()
    writer.close()
    found = read(tmp_path / "run.jsonl")
    name = "fisher/cosine_with_sgd"
    assert [*found[name]] == [2, 4]
    assert {entry["step"]: entry[name] for entry in run.state.log_history if name in entry} == found[name]
    read_back = events.EventAccumulator(str(tmp_path / "events")).Reload()
    assert {event.step: event.value for event in read_back.Scalars(name)} == pytest.approx(found[name])
