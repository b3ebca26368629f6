"""Architectures that people train, small enough to run here, and what the optimizers must be right about on each."""

from tests.zoo import language_models, torch_models, vision_models
from tests.zoo.architecture import Architecture

GROUPS: dict[str, dict[str, Architecture]] = {
    "torch": torch_models.MODELS,
    "language": language_models.MODELS,
    "vision": vision_models.MODELS,
}
"""Architectures by name; all but the first group take Transformers."""

MODELS: dict[str, Architecture] = {name: entry for group in GROUPS.values() for name, entry in group.items()}
