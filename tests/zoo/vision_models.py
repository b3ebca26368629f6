"""Architectures for images, from Transformers.

The small ones are the published ones with other sizes, so that both have the same layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, Batch
from tests.zoo.configured import Configuration, configuration, make, model_of


def _pictures(classes: int = 5, size: int = 32, count: int = 2) -> Callable[[torch.Generator], Batch]:
    def batch(generator: torch.Generator) -> Batch:
        pixels = torch.randn(count, 3, size, size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, classes, (count,), generator=generator)}

    return batch


def _segmentation(generator: torch.Generator) -> Batch:
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (2, 64, 64), generator=generator)}


def _detection(generator: torch.Generator) -> Batch:
    return {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator)}


def _captions(generator: torch.Generator) -> Batch:
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    tokens = torch.randint(3, 40, (3, 7), generator=generator)
    return {"input_ids": tokens, "pixel_values": pixels, "return_loss": True}


def _clip(small: bool) -> nn.Module:
    text: Configuration = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 8, "max_position_embeddings": 77, "projection_dim": 512}
    vision: Configuration = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 32, "projection_dim": 512}
    if small:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= {
            **sizes,
            "vocab_size": 40,
            "max_position_embeddings": 10,
            "projection_dim": 12,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision |= {**sizes, "image_size": 32, "patch_size": 16, "projection_dim": 12}
    return make(
        "CLIPModel",
        configuration("CLIPConfig", text_config=text, vision_config=vision, projection_dim=text["projection_dim"]),
    )


def _detr(small: bool) -> nn.Module:
    backbone: Configuration = {"out_features": ["stage4"], "hidden_sizes": [256, 512, 1024, 2048]}
    detr: Configuration = {"d_model": 256, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8}
    detr |= {"decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    detr |= {"num_queries": 100, "num_labels": 91, "auxiliary_loss": False}
    if small:
        backbone |= {"embedding_size": 6, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
        detr |= {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        detr |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        detr |= {"num_queries": 5, "num_labels": 4}
    resnet = configuration("ResNetConfig", **backbone)
    return make(
        "DetrForObjectDetection",
        configuration(
            "DetrConfig", use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=resnet, **detr
        ),
    )


def _boxes(outputs: Any) -> Tensor:
    """In place of the matching of boxes, which needs SciPy: a target for every query."""
    return 0.1 * outputs.logits.square().mean() + (outputs.pred_boxes - 0.3).square().mean()


CLASSES = {"num_labels": 1000}

MODELS: dict[str, Architecture] = {
    "clip": Architecture("CLIP ViT-B/32", "arXiv 2103.00020", _clip, _captions),
    "vit": Architecture(
        "ViT-B/16",
        "arXiv 2010.11929",
        model_of(
            "ViT",
            "ForImageClassification",
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
            | {"image_size": 224, "patch_size": 16, **CLASSES},
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
            | {"image_size": 32, "patch_size": 16, "num_labels": 5},
        ),
        _pictures(),
    ),
    "swin": Architecture(
        "Swin-T",
        "arXiv 2103.14030",
        model_of(
            "Swin",
            "ForImageClassification",
            {"image_size": 224, "patch_size": 4, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
            | {"window_size": 7, **CLASSES},
            {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
            | {"window_size": 2, "num_labels": 5, "drop_path_rate": 0.0},
        ),
        _pictures(),
    ),
    "convnext": Architecture(
        "ConvNeXt-T",
        "arXiv 2201.03545",
        model_of(
            "ConvNext",
            "ForImageClassification",
            {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3], **CLASSES},
            {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 2, 1], "num_labels": 5},
        ),
        _pictures(),
    ),
    "beit": Architecture(
        "BEiT (base)",
        "arXiv 2106.08254",
        model_of(
            "Beit",
            "ForImageClassification",
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
            | {"image_size": 224, "patch_size": 16, "use_relative_position_bias": True, "use_mean_pooling": True}
            | {"drop_path_rate": 0.0, **CLASSES},
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
            | {"image_size": 32, "patch_size": 16, "num_labels": 5},
        ),
        _pictures(),
    ),
    "dinov2": Architecture(
        "DINOv2 ViT-B/14",
        "arXiv 2304.07193",
        model_of(
            "Dinov2",
            "ForImageClassification",
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4}
            | {"image_size": 518, "patch_size": 14, **CLASSES},
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
            | {"image_size": 28, "patch_size": 14, "num_labels": 5},
        ),
        _pictures(size=28),
    ),
    "resnet": Architecture(
        "ResNet-50",
        "arXiv 1512.03385",
        model_of(
            "ResNet",
            "ForImageClassification",
            {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3], **CLASSES},
            {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [2, 1], "num_labels": 5},
        ),
        _pictures(size=40, count=4),
    ),
    "efficientnet": Architecture(
        "EfficientNet-B0",
        "arXiv 1905.11946",
        model_of(
            "EfficientNet",
            "ForImageClassification",
            {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "dropout_rate": 0.2}
            | {"hidden_dim": 1280, "drop_connect_rate": 0.0, **CLASSES},
            {
                "width_coefficient": 0.25,
                "in_channels": [32, 8, 8],
                "out_channels": [8, 8, 16],
                "kernel_sizes": [3, 3, 5],
                "strides": [1, 2, 2],
            }
            | {"num_block_repeats": [1, 2, 2], "expand_ratios": [1, 6, 6], "hidden_dim": 320, "num_labels": 5},
        ),
        _pictures(size=40, count=4),
    ),
    "mobilenet": Architecture(
        "MobileNetV2",
        "arXiv 1801.04381",
        model_of(
            "MobileNetV2",
            "ForImageClassification",
            {"depth_multiplier": 1.0, "image_size": 224, **CLASSES},
            {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "image_size": 40, "num_labels": 5},
        ),
        _pictures(size=40, count=4),
    ),
    "segformer": Architecture(
        "SegFormer-B0",
        "arXiv 2105.15203",
        model_of(
            "Segformer",
            "ForSemanticSegmentation",
            {"depths": [2, 2, 2, 2], "sr_ratios": [8, 4, 2, 1], "hidden_sizes": [32, 64, 160, 256]}
            | {"num_attention_heads": [1, 2, 5, 8], "decoder_hidden_size": 256, "drop_path_rate": 0.0}
            | {"num_labels": 150},
            {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}
            | {"depths": [1, 1, 1, 1], "num_labels": 5},
        ),
        _segmentation,
    ),
    "detr": Architecture("DETR (ResNet-50)", "arXiv 2005.12872", _detr, _detection, _boxes),
}
