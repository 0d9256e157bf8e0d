"""What LangChain's two models over gRPC share: fields, their translation into options, and connections."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from langchain_core.language_models import BaseLanguageModel
from langchain_core.language_models.base import LangSmithParams
from pydantic import AliasChoices, Field, PrivateAttr, field_validator

from mpt_grpc_client.async_client import AsyncClient
from mpt_grpc_client.client import Client
from mpt_grpc_client.options import GenerateOptions
from mpt_grpc_client.request import unknown_option
from mpt_grpc_client.targets import resolve_targets

_OPTION_FIELDS = ("timeout", "model", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop_strings")
_STANDARD_NAMES = {"max_tokens": "max_new_tokens", "stop": "stop_strings"}
"""LangChain's names of options that have another name here."""


class Model(BaseLanguageModel[Any]):
    """The fields and connections that both models share.

    A keyword argument of a call overrides the field; None selects the server's default.
    """

    target: str | list[str] = Field(default_factory=lambda: ",".join(resolve_targets(None)))
    """As for `Client`; defaults to the environment variable MPT_GRPC_TARGET, then to `localhost:50051`. Several are a
    list, or separated by commas: each continues what another one began and could not complete."""
    connection: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """`ConnectionOptions`, such as the access token. Neither printed nor serialized, since they contain secrets."""
    timeout: float | None = None
    """The timeout of each call in seconds; None waits indefinitely."""
    model: str | None = None
    """This and the following fields are described in `GenerateOptions`."""
    max_new_tokens: int | None = Field(default=None, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_strings: str | list[str] | None = Field(default=None, validation_alias=AliasChoices("stop_strings", "stop"))
    options: dict[str, Any] = Field(default_factory=dict)
    """Other `GenerateOptions`."""

    _connections: _Connections = PrivateAttr(default_factory=lambda: _Connections())

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        unknown = options.keys() - GenerateOptions.__optional_keys__
        if unknown:
            raise ValueError("; ".join(map(unknown_option, sorted(unknown))))
        if twice := options.keys() & cls.model_fields:
            raise ValueError(f"set these as fields of the model, not in options: {', '.join(sorted(twice))}")
        return options

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    def get_token_ids(self, text: str) -> list[int]:
        """Returns the model's token IDs of a text, with which LangChain counts tokens."""
        client, _ = self._connect()
        return [token.token_id for token in client.tokenize(text, timeout=self.timeout)]

    def _asked(self, stop: list[str] | None, call: dict[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of the client's call."""
        made = {name: value for name in _OPTION_FIELDS if (value := getattr(self, name)) is not None}
        asked = {**self.options, **made, **{_STANDARD_NAMES.get(name, name): value for name, value in call.items()}}
        return asked if stop is None else {**asked, "stop_strings": stop}

    def _asked_to_stream(self, stop: list[str] | None, call: dict[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of a streaming call. Raises ValueError for several outputs."""
        asked = self._asked(stop, call)
        if asked.get("num_sequences") not in (None, 1):
            raise ValueError("num_sequences: streaming supports only one output")
        return asked

    def _connect(self) -> tuple[Client, str]:
        """Returns the client and the name of the server's model."""
        client, names = self._connections.client(self._targets, self.connection), self._connections.model_names
        if self._targets not in names:
            names[self._targets] = client.get_model_info(timeout=self.timeout).name
        return client, names[self._targets]

    async def _connect_async(self) -> tuple[AsyncClient, str]:
        client, names = self._connections.async_client(self._targets, self.connection), self._connections.model_names
        if self._targets not in names:
            names[self._targets] = (await client.get_model_info(timeout=self.timeout)).name
        return client, names[self._targets]

    @property
    def _targets(self) -> tuple[str, ...]:
        return resolve_targets(self.target)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("target", *_OPTION_FIELDS, "options")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params, asked = super()._get_ls_params(stop=stop, **kwargs), self._asked(stop, kwargs)
        params["ls_model_name"] = asked.get("model") or "mpt"
        if (max_new_tokens := asked.get("max_new_tokens")) is not None:
            params["ls_max_tokens"] = max_new_tokens
        if stop := asked.get("stop_strings"):
            params["ls_stop"] = [stop] if isinstance(stop, str) else list(stop)
        return params


class _Connections:
    """The clients of one model, created on first use: one for threads and one for each event loop."""

    def __init__(self) -> None:
        self.model_names: dict[tuple[str, ...], str] = {}
        """The name of the servers' model by their targets."""
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, ...], Client] = {}
        self._async_clients: dict[tuple[asyncio.AbstractEventLoop, tuple[str, ...]], AsyncClient] = {}

    def __reduce__(self) -> tuple[type[_Connections], tuple[()]]:
        """Copies and unpickled models create their own connections."""
        return _Connections, ()

    def client(self, targets: tuple[str, ...], options: dict[str, Any]) -> Client:
        with self._lock:
            if targets not in self._clients:
                self._clients[targets] = Client(targets, **options)
            return self._clients[targets]

    def async_client(self, targets: tuple[str, ...], options: dict[str, Any]) -> AsyncClient:
        """Returns the client of the running loop. Clients of closed loops are discarded."""
        key = asyncio.get_running_loop(), targets
        with self._lock:
            for ended in [key for key in self._async_clients if key[0].is_closed()]:
                del self._async_clients[ended]
            if key not in self._async_clients:
                self._async_clients[key] = AsyncClient(targets, **options)
            return self._async_clients[key]
