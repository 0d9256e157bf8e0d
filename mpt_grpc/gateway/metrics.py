"""`/metrics`: the metrics of this process, for Prometheus."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from mpt_grpc.access import Access, check_role
from mpt_grpc.caller import Role
from mpt_grpc.errors import PermissionDeniedError, UnauthenticatedError
from mpt_grpc.gateway.callers import METRICS_PATH, bearer
from mpt_grpc.gateway.errors import BadRequestError, error_response


class MetricsPage:
    """Responds with all metrics of a registry to callers who may observe the server."""

    def __init__(self, registry: CollectorRegistry, access: Access) -> None:
        self._registry, self._access = registry, access
        self._lock = asyncio.Lock()
        """Held while metrics are collected, which OpenTelemetry's reader does for one caller at a time."""

    def add_to(self, app: Starlette) -> None:
        app.add_route(METRICS_PATH, self.respond, methods=["GET"], include_in_schema=False)

    async def respond(self, request: Request) -> Response:
        try:
            self._check_caller(request)
        except UnauthenticatedError as error:
            return error_response(BadRequestError(str(error), status=401))
        except PermissionDeniedError as error:
            return error_response(BadRequestError(str(error), status=403))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        async with self._lock:
            body = await asyncio.to_thread(encode, self._registry)
        return Response(body, media_type=content_type)

    def _check_caller(self, request: Request) -> None:
        authorization = request.headers.get("authorization")
        caller = self._access.token_caller(None if authorization is None else bearer(authorization))
        caller = caller or self._access.certified_caller(request.scope["state"].get("certified_name"))
        check_role(caller, (Role.OBSERVE,))
