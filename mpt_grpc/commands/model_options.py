"""The flags that choose a model and how it is computed, and their translation into settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpt_grpc.settings import ModelSettings


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds which model is loaded, and how it is computed; returns the group of these flags."""
    defaults = ModelSettings()
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default=defaults.model,
        metavar="demo|FOLDER|HUB_ID",
        help="'demo' for the built-in model, a folder in Hugging Face's layout, or a Hugging Face Hub ID",
    )
    model.add_argument(
        "--revision",
        metavar="BRANCH|TAG|COMMIT",
        help="version of a model of the Hub (default: the latest of its default branch)",
    )
    model.add_argument(
        "--adapter",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="LoRA adapter, as PEFT saves it, to merge into the model; may be repeated (default: none)",
    )
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto prefers a GPU")
    model.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="type of the weights and the KV cache; auto is float16 on a GPU, and bfloat16 on a CPU with"
        " compiled kernels or native support, float32 on others",
    )
    model.add_argument(
        "--attention",
        choices=("auto", "triton", "torch"),
        default=defaults.attention,
        help="what computes attention on a GPU; auto is Triton from compute capability 8.0 on, PyTorch on older cards"
        " and in float32",
    )
    model.add_argument(
        "--quantize",
        choices=("none", "int8"),
        default=defaults.quantize,
        help="int8 rounds the matrices to 8 bits when they are loaded",
    )
    model.add_argument(
        "--batch-invariant",
        action="store_true",
        help="give a token the same bits whatever else a GPU with Triton computes, at some cost in speed; the compiled"
        " kernels on a CPU always do",
    )
    model.add_argument(
        "--chat-template",
        default=defaults.chat_template,
        metavar="NAME|FILE|TEXT",
        help="base, instruct, chatml, the name of one of the checkpoint's own, a Jinja file, or a text with {{ or {%%;"
        " auto is the checkpoint's default, or one chosen by the model's name",
    )
    return model


def model_settings(parsed: argparse.Namespace) -> ModelSettings:
    """Returns the settings given by the flags that `serve` and `verify` share. Raises SettingsError."""
    return ModelSettings(
        model=parsed.model,
        revision=parsed.revision,
        adapters=tuple(folder.expanduser() for folder in parsed.adapter or ()),
        device=parsed.device,
        dtype=parsed.dtype,
        attention=parsed.attention,
        batch_invariant=parsed.batch_invariant,
        quantize=parsed.quantize,
        chat_template=parsed.chat_template,
    )
