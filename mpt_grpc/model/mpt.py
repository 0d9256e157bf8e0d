"""MPT's forward pass over the concatenated tokens of any number of sequences, without padding.

The caller passes `attend`, which determines what each token attends to and where keys and values are stored.
Parameters are named as in the published checkpoints. Architecture: https://www.databricks.com/blog/mpt-7b and
llm-foundry's `modeling_mpt.py`, with pre-norm and without dropout. MPT-7B has ALiBi, layer norm, exact GELU, no biases
and a tied head; the variants that `MPTConfig` has are llm-foundry's.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import Array
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from mpt_grpc.model.config import MPTConfig, Rope
from mpt_grpc.model.linear import Embedding, Linear, Norm, WeightFormat
from mpt_grpc.model.native import NativeAttend, NativeLayer, NativeLinear, NativeNorm, layer_array


class Attend(Protocol):
    """Causal attention of one layer for the tokens of one step."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the context [num_tokens, n_heads, head_dim].

        `query` is [num_tokens, n_heads, head_dim]; `key` and `value` are [num_tokens, n_kv_heads, head_dim].
        """
        ...


class Attention(nn.Module):
    """Projects to queries, keys and values (one matrix: all Q, then K, then V), attends and projects back."""

    def __init__(self, config: MPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        d_kv = config.n_kv_heads * config.head_dim
        self.Wqkv = Linear(config.d_model, config.d_model + 2 * d_kv, config.qkv_bias, clip=config.clip_qkv)
        self.out_proj = Linear(config.d_model, config.d_model, config.bias)
        if config.qk_ln:
            self.q_ln = _norm(config, config.d_model)
            self.k_ln = _norm(config, d_kv)

    def forward(self, x: Tensor, attend: Attend, residual: Tensor) -> Tensor:
        config = self.config
        qkv = self.Wqkv(x)
        d_kv = config.n_kv_heads * config.head_dim
        query, key, value = qkv.split([config.d_model, d_kv, d_kv], dim=-1)
        if config.qk_ln:
            query, key = self.q_ln(query), self.k_ln(key)
        context = attend(
            self.layer,
            query.unflatten(-1, (config.n_heads, config.head_dim)),
            key.unflatten(-1, (config.n_kv_heads, config.head_dim)),
            value.unflatten(-1, (config.n_kv_heads, config.head_dim)),
        )
        return self.out_proj(context.flatten(-2), residual)


class FeedForward(nn.Module):
    """The feed-forward network: up projection, activation, down projection. The gated one multiplies by a gate."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        d_model, d_ffn, activation = config.d_model, config.d_ffn, config.activation
        self.up_proj = Linear(d_model, d_ffn, config.bias, activation="none" if config.gated_ffn else activation)
        self.gate_proj = Linear(d_model, d_ffn, config.bias, activation=activation) if config.gated_ffn else None
        self.down_proj = Linear(d_ffn, d_model, config.bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden = self.up_proj(x) if self.gate_proj is None else self.gate_proj(x) * self.up_proj(x)
        return self.down_proj(hidden, residual)


class Block(nn.Module):
    """One transformer layer: attention and feed-forward, each with pre-norm and a residual connection."""

    def __init__(self, config: MPTConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = _norm(config, config.d_model)
        self.attn = Attention(config, layer)
        self.norm_2 = _norm(config, config.d_model)
        self.ffn = FeedForward(config)

    def native(self) -> NativeLayer:
        """Returns the layer for the compiled kernels, which must have packed its weights."""
        attention, ffn = self.attn, self.ffn
        return NativeLayer(
            norm_1=self.norm_1.native(),
            qkv=attention.Wqkv.native(),
            q_norm=attention.q_ln.native() if attention.config.qk_ln else NativeNorm(),
            k_norm=attention.k_ln.native() if attention.config.qk_ln else NativeNorm(),
            out=attention.out_proj.native(),
            norm_2=self.norm_2.native(),
            up=ffn.up_proj.native(),
            gate=NativeLinear() if ffn.gate_proj is None else ffn.gate_proj.native(),
            down=ffn.down_proj.native(),
        )

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.attn(self.norm_1(x), attend, residual=x)
        return self.ffn(self.norm_2(x), residual=x)


class Transformer(nn.Module):
    """Token embeddings, the blocks and the final norm, which `MPT.logits` applies."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.d_model)
        self.wpe = Embedding(config.max_seq_len, config.d_model) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm_f = _norm(config, config.d_model)
        self._native: Array[NativeLayer] | None = None

    def prepack(self, weight_format: WeightFormat) -> None:
        """Prepares the blocks for the compiled kernels once all weights are packed."""
        if weight_format.kernels is not None:
            self._native = layer_array([block.native() for block in cast(Iterable[Block], self.blocks)])

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.wte(token_ids)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        if self.config.rope is not None:
            attend = rotating(attend, positions, self.config.rope, self.config.head_dim)
        if self._native is not None and isinstance(attend, NativeAttend):
            return attend.run(self._native, x)  # the same as below, in one call
        for block in self.blocks:
            x = block(x, attend)
        return x


class MPT(nn.Module):
    """The language model. `forward` returns hidden states; `logits` computes logits from selected hidden states."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        self.config, self.weight_format = config, WeightFormat(torch.float32, torch.device("cpu"))
        self.transformer = Transformer(config)
        self.lm_head = None if config.tied_head else Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Returns hidden states [num_tokens, d_model] for `token_ids` and `positions`, both [num_tokens] of int64."""
        hidden: Tensor = self.transformer(token_ids, positions, attend)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns float32 logits [n, vocab_size] for `hidden` [n, d_model]."""
        normed, scale, cap = self.transformer.norm_f(hidden), self.config.logit_scale, self.config.logit_softcap
        head = self.transformer.wte.project if self.lm_head is None else self.lm_head
        logits: Tensor = head(normed).to(torch.float32)
        if scale is not None:
            logits = logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)


def alibi_slopes(n_heads: int, bias_max: float) -> Tensor:
    """Returns the ALiBi slope of each head, float32 [n_heads], as in MPT (https://arxiv.org/abs/2108.12409).

    If the number of heads is not a power of two, the slopes of the next power of two are used, odd indices first.
    """
    power = 1 << (n_heads - 1).bit_length()
    slopes = 2.0 ** -(torch.arange(1, power + 1, dtype=torch.float32) * (bias_max / power))
    return slopes if power == n_heads else torch.cat([slopes[1::2], slopes[::2]])[:n_heads]


def rotating(attend: Attend, positions: Tensor, rope: Rope, head_dim: int) -> Attend:
    """Returns `attend` with rotary position embeddings (https://arxiv.org/abs/2104.09864) of queries and keys.

    Dimension i of a head is rotated together with dimension i + head_dim / 2, as in llm-foundry and Llama.
    `positions` is [num_tokens].
    """
    size = head_dim // 2
    frequencies = rope.theta ** -(torch.arange(size, dtype=torch.float32, device=positions.device) / size)
    angles = (positions / rope.factor)[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(torch.float32).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return lambda layer, query, key, value: attend(layer, rotate(query), rotate(key), value)


def _norm(config: MPTConfig, size: int) -> Norm:
    return Norm(size, config.norm_eps, config.bias, is_rms=config.rms_norm)
