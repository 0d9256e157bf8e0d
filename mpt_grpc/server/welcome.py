"""The lines that a server prints when it is ready."""

from __future__ import annotations

from mpt_grpc import __version__
from mpt_grpc.engine.memory import size
from mpt_grpc.engine.parts import BLOCK_SIZE
from mpt_grpc.server.server import RunningServer


def welcome(server: RunningServer) -> str:
    """Returns the model, its memory, the addresses and a command to try."""
    model = server.model
    lines = [
        f"mpt-grpc {__version__} serving {model.name}: {model.num_parameters / 1e6:,.1f} M parameters, {model.dtype},"
        f" {model.device}",
        f"  weights   {size(model.weight_bytes)}",
        f"  KV cache  {size(model.cache_bytes)}: {model.num_blocks:,} blocks of {BLOCK_SIZE}"
        f" = {model.cache_tokens:,} tokens",
        f"  context   {server.engine.preparation.limits.max_context_tokens:,} tokens per request",
        f"  chat      template {server.engine.preparation.chat_template.name}",
        f"  gRPC      {server.target}",
    ]
    if server.http_port is not None:
        url = server.settings.server.url(server.http_port)
        lines += [f"  OpenAI    {url}/v1", f"  web page  {url}/"]
    if server.metrics_port is not None:
        lines.append(f"  metrics   {server.settings.server.url(server.metrics_port)}/metrics")
    if server.channelz_port is not None:
        lines.append(f"  channelz  127.0.0.1:{server.channelz_port}")
    lines.append(f'  try       mpt-grpc generate "Once upon a time" --target {server.target}')
    return "\n".join(lines)
