"""The data plane: MPT in torch, its weights, its KV cache and the sampler."""
