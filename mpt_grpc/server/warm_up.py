"""The first steps of an engine, before it serves: they are slow, and show whether the model can be computed at all."""

from __future__ import annotations

from mpt_grpc.engine.engine import Engine
from mpt_grpc.errors import ModelError, MptServerError
from mpt_grpc.request import CacheOptions, GenerationRequest, SamplingParameters, StoppingCriteria


def warm_up(engine: Engine) -> None:
    """Computes a prefill and, if the context has room, a decode step. Raises ModelError."""
    max_context_tokens = engine.preparation.limits.max_context_tokens
    request = GenerationRequest(
        request_id="warm-up",
        prompt=(0,),
        sampling=SamplingParameters(temperature=0),
        stopping=StoppingCriteria(max_new_tokens=min(2, max_context_tokens - 1), ignore_eos=True),
        cache=CacheOptions(bypass=True),
    )
    try:
        engine.generate(request)
    except MptServerError as error:
        why = f"the model failed to generate its first tokens: {error.__cause__ or error}"
        raise ModelError(why) from error
