"""Makes models of Transformers from configurations that are written out: nothing is downloaded, weights are random."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

Configuration = dict[str, Any]


def make(model: str, configuration: Any) -> nn.Module:
    made: nn.Module = getattr(importlib.import_module("transformers"), model)(configuration)
    return made.train()


def configuration(name: str, **settings: Any) -> Any:
    return getattr(importlib.import_module("transformers"), name)(**settings)


def model_of(stem: str, task: str, published: Configuration, small: Configuration) -> Callable[[bool], nn.Module]:
    """How a model is made, class ``stem + task`` from ``stem + "Config"``; the small one with some other sizes."""

    def build(is_small: bool) -> nn.Module:
        settings = {**published, **(small if is_small else {})}
        return make(stem + task, configuration(f"{stem}Config", **settings))

    return build
