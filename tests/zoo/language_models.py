"""Architectures for text and speech, from Transformers.

The small ones are the published ones with other sizes, so that both have the same layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.zoo.architecture import Architecture, Batch
from tests.zoo.configured import model_of


def _language(vocabulary: int = 40, shape: tuple[int, int] = (2, 7), **more: Any) -> Callable[[torch.Generator], Batch]:
    """Tokens that are their own labels, from 3 on: lower ones may be padding, or begin and end a text."""

    def batch(generator: torch.Generator) -> Batch:
        tokens = torch.randint(3, vocabulary, shape, generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone(), **more}

    return batch


def _translation(generator: torch.Generator) -> Batch:
    tokens = torch.randint(3, 40, (2, 2, 7), generator=generator)
    return {"input_ids": tokens[0], "labels": tokens[1, :, :5].contiguous()}


def _speech_translation(generator: torch.Generator) -> Batch:
    labels = torch.randint(3, 40, (2, 5), generator=generator)
    return {"input_features": torch.randn(2, 8, 24, generator=generator), "labels": labels}


def _speech(generator: torch.Generator) -> Batch:
    labels = torch.randint(1, 12, (2, 3), generator=generator)
    return {"input_values": torch.randn(2, 400, generator=generator), "labels": labels}


DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
"""Sizes of small models with the names that most have."""
HEADS = {"num_attention_heads": 4}
GROUPED = {**DECODER, **HEADS, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 16}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Tokens with a meaning, within small vocabularies."""


MODELS: dict[str, Architecture] = {
    "gpt2": Architecture(
        "GPT-2 (124M)",
        "gpt2",
        model_of(
            "GPT2",
            "LMHeadModel",
            {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
            {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, **SPECIAL},
        ),
        _language(),
    ),
    "gpt-neox": Architecture(
        "Pythia-160M",
        "arXiv 2304.01373",
        model_of(
            "GPTNeoX",
            "ForCausalLM",
            {"vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
            | {"intermediate_size": 3072, "tie_word_embeddings": False},
            {**DECODER, **HEADS, "max_position_embeddings": 16, **SPECIAL},
        ),
        _language(),
    ),
    "bloom": Architecture(
        "BLOOM-560M",
        "arXiv 2211.05100",
        model_of(
            "Bloom",
            "ForCausalLM",
            {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
            {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4, **SPECIAL},
        ),
        _language(),
    ),
    "falcon": Architecture(
        "Falcon-7B",
        "arXiv 2311.16867",
        model_of(
            "Falcon",
            "ForCausalLM",
            {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71}
            | {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False},
            {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL},
        ),
        _language(),
    ),
    "llama": Architecture(
        "Llama 2 7B",
        "arXiv 2307.09288",
        model_of(
            "Llama",
            "ForCausalLM",
            {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
            | {"num_attention_heads": 32, "num_key_value_heads": 32},
            {**GROUPED, **SPECIAL},
        ),
        _language(),
    ),
    "gemma": Architecture(
        "Gemma 2B",
        "arXiv 2403.08295",
        model_of(
            "Gemma",
            "ForCausalLM",
            {"vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
            | {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256},
            {**GROUPED, **SPECIAL},
        ),
        _language(),
    ),
    "qwen3": Architecture(
        "Qwen3-0.6B",
        "arXiv 2505.09388",
        model_of(
            "Qwen3",
            "ForCausalLM",
            {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
            | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
            {**GROUPED, **SPECIAL},
        ),
        _language(),
    ),
    "mixtral": Architecture(
        "Mixtral 8x7B",
        "arXiv 2401.04088",
        model_of(
            "Mixtral",
            "ForCausalLM",
            {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
            | {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
            {**GROUPED, "num_local_experts": 3, **SPECIAL},
        ),
        _language(shape=(3, 7)),
    ),
    "mamba": Architecture(
        "Mamba-130M",
        "arXiv 2312.00752",
        model_of(
            "Mamba",
            "ForCausalLM",
            {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "expand": 2}
            | {"conv_kernel": 4, "time_step_rank": 48},
            {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 3}
            | SPECIAL,
        ),
        _language(),
    ),
    "opt": Architecture(
        "OPT-125M",
        "arXiv 2205.01068",
        model_of(
            "OPT",
            "ForCausalLM",
            {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072}
            | {"num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768},
            {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, **HEADS}
            | {"max_position_embeddings": 16, "word_embed_proj_dim": 16, **SPECIAL},
        ),
        _language(),
    ),
    "bart": Architecture(
        "BART (base)",
        "arXiv 1910.13461",
        model_of(
            "Bart",
            "ForConditionalGeneration",
            {"vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6}
            | {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
            | {"encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "max_position_embeddings": 1024},
            {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
            | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
            | {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
            | {**SPECIAL, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        ),
        _translation,
    ),
    "t5": Architecture(
        "T5 (small)",
        "arXiv 1910.10683",
        model_of(
            "T5",
            "ForConditionalGeneration",
            {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
            | {"decoder_start_token_id": 0},
            {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
        ),
        _translation,
    ),
    "bert": Architecture(
        "BERT (base)",
        "arXiv 1810.04805",
        model_of(
            "Bert",
            "ForMaskedLM",
            {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
            | {"intermediate_size": 3072, "max_position_embeddings": 512},
            {**DECODER, **HEADS, "max_position_embeddings": 16},
        ),
        _language(),
    ),
    "roberta": Architecture(
        "RoBERTa (base)",
        "arXiv 1907.11692",
        model_of(
            "Roberta",
            "ForMaskedLM",
            {"vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
            | {"intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1},
            {**DECODER, **HEADS, "max_position_embeddings": 16, "pad_token_id": 1},
        ),
        _language(),
    ),
    "albert": Architecture(
        "ALBERT (base, v2)",
        "arXiv 1909.11942",
        model_of(
            "Albert",
            "ForMaskedLM",
            {"vocab_size": 30000, "embedding_size": 128, "hidden_size": 768, "num_hidden_layers": 12}
            | {"num_attention_heads": 12, "intermediate_size": 3072},
            {**DECODER, **HEADS, "num_hidden_layers": 3, "embedding_size": 8, "max_position_embeddings": 16, **SPECIAL},
        ),
        _language(),
    ),
    "deberta": Architecture(
        "DeBERTa V3 (base)",
        "arXiv 2111.09543",
        model_of(
            "DebertaV2",
            "ForTokenClassification",
            {"vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
            | {"intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": True}
            | {"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 0}
            | {"pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1, "position_biased_input": False},
            {**DECODER, **HEADS, "max_position_embeddings": 16, "position_buckets": 4, "num_labels": 40},
        ),
        _language(),
    ),
    "whisper": Architecture(
        "Whisper (tiny)",
        "arXiv 2212.04356",
        model_of(
            "Whisper",
            "ForConditionalGeneration",
            {"vocab_size": 51865, "d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "num_mel_bins": 80}
            | {"encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 1536}
            | {"decoder_ffn_dim": 1536, "max_source_positions": 1500, "max_target_positions": 448},
            {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8}
            | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24}
            | {"decoder_ffn_dim": 24, "max_source_positions": 12, "max_target_positions": 10}
            | {**SPECIAL, "decoder_start_token_id": 1},
        ),
        _speech_translation,
    ),
    "wav2vec2": Architecture(
        "wav2vec 2.0 (base)",
        "arXiv 2006.11477, without its masks",
        model_of(
            "Wav2Vec2",
            "ForCTC",
            {"vocab_size": 32, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
            | {"intermediate_size": 3072, "mask_time_prob": 0.0, "layerdrop": 0.0, "ctc_zero_infinity": True},
            {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"intermediate_size": 24, "conv_dim": (8, 8, 8), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2)}
            | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        ),
        _speech,
    ),
}
