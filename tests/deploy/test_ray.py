"""Replicas in a local cluster of Ray have the same tokens as a plain server, whatever Serve does with them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from server_process import ServerProcess

from mpt_grpc_client import AsyncClient, Client, Generation

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MPT_GRPC_RAY_PYTHON", ROOT / ".venv/ray/bin/python"))
FLAGS = "--host 127.0.0.1 --dtype float32 --kv-cache 256MiB --grace 30s"
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",  # otherwise Ray writes a token to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # the tests beside it would leave its workers no time
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "clients/python"))),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not PYTHON.exists() and "CI" not in os.environ, reason="Ray is not installed: run make .venv/ray/ready"
    ),
]


class Cluster:
    """A running tests/deploy/ray_cluster.py."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process, self.url = process, url

    async def command(self, *command: Any) -> Any:
        """Returns the cluster's answer to a command."""
        return await asyncio.to_thread(self._command, command)

    async def targets(self) -> list[str]:
        """Returns the targets of the list; none if there is no list."""
        try:
            with await asyncio.to_thread(urlopen, self.url, timeout=10) as response:
                return list(filter(None, response.read().decode().split(",")))
        except OSError:  # refused, or late on a busy machine
            return []

    async def targets_when(
        self, number: int, *, without: Collection[str] = (), silent: Collection[str] = ()
    ) -> list[str]:
        """Waits until the list has this number of targets, without some, and until those no longer in it are silent."""
        while True:
            targets = await self.targets()
            gone = set(silent) - set(targets)
            if len(targets) == number and not set(without) & set(targets) and not any(map(listens, gone)):
                return targets
            await asyncio.sleep(0.2)

    def _command(self, command: tuple[Any, ...]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(command)}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue  # what Ray prints
        raise AssertionError("the cluster has ended")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "log.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("ray_cluster.py"), str(port), FLAGS],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **VARIABLES},
        )  # fmt: skip
        try:
            yield Cluster(process, f"http://127.0.0.1:{port}/")
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(60)


def options(number: int, max_new_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0.9, "seed": number, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": f"Once upon a time there were {number} foxes", "max_new_tokens": max_new_tokens, **sampling}


def tokens(generation: Generation) -> tuple[int, ...]:
    return tuple(generation.outputs[0].token_ids)


async def expected(server: ServerProcess, number: int, max_new_tokens: int) -> list[tuple[int, ...]]:
    """Returns the tokens of a plain server, of a number of requests."""
    async with AsyncClient(server.target, timeout=240) as client:
        calls = [client.generate(**options(index, max_new_tokens)) for index in range(number)]
        return [tokens(generation) for generation in await asyncio.gather(*calls)]


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """A client of the two servers that are listed."""
    async with AsyncClient(await cluster.targets_when(2), timeout=240) as client:
        yield client


async def test_a_wrong_flag_is_refused_when_the_application_is_built(cluster: Cluster) -> None:
    assert await cluster.command("refusal", {"flags": "--dtyp float32"}) == "unrecognized arguments: --dtyp float32"
    assert "name the address" in await cluster.command("refusal", {"flags": "--host 0.0.0.0"})
    assert "the only one is flags" in await cluster.command("refusal", {"model": "demo"})


async def test_the_client_takes_the_list_as_the_page_says(cluster: Cluster) -> None:
    await cluster.targets_when(2)
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"`(Client\(urlopen.*?\))`", page)

    def generate() -> str:
        with eval(
            call.replace("http://localhost:8452/", cluster.url), {"Client": Client, "urlopen": urlopen}
        ) as client:
            return str(client.generate("Once upon a time", max_new_tokens=4).text)

    assert await asyncio.to_thread(generate)


async def test_the_route_redirects_openais_clients_to_the_servers_in_turn(cluster: Cluster) -> None:
    await cluster.targets_when(2)
    body = json.dumps({"model": "demo", "prompt": "Once", "max_tokens": 4}).encode()

    def complete() -> tuple[str, int]:
        # urllib redirects no POST.
        get = Request(f"{cluster.url}v1/models")
        with urlopen(get, timeout=10) as response:
            origin = response.url.removesuffix("/v1/models")
        post = Request(f"{origin}/v1/completions", body, {"content-type": "application/json"})
        with urlopen(post, timeout=10) as response:
            return origin, json.load(response)["usage"]["completion_tokens"]

    answers = {await asyncio.to_thread(complete) for _ in range(2)}
    assert len(answers) == 2
    assert {number for _, number in answers} == {4}


async def test_the_route_redirects_all_turns_of_a_conversation_to_one_server(cluster: Cluster) -> None:
    await cluster.targets_when(2)
    call = {"name": "look", "arguments": "{}"}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are the keeper of a lighthouse. " * 20},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "The keeper."},
        {"role": "user", "content": [{"type": "text", "text": "Of what?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "A lighthouse."},
    ]

    def redirected(number: int, url: str) -> str:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": messages[:number]}))
        location = connection.getresponse().headers["location"]
        connection.close()
        return str(location)

    locations = {await asyncio.to_thread(redirected, number, cluster.url) for number in (2, 4, 6, 2, 4, 6)}
    assert len(locations) == 1


async def test_streams_of_a_killed_replica_go_on_without_a_difference_and_serve_restarts_it(
    cluster: Cluster, client: AsyncClient, server: ServerProcess
) -> None:
    whole = await expected(server, 4, 1000)
    before = set(await cluster.targets())
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(client.stream(**options(n, 1000))) for n in range(4)]
        for stream in streams:
            await anext(stream)
        killing = asyncio.create_task(cluster.command("kill"))

        async def read(stream: Any) -> Generation:
            async for _ in stream:
                pass
            return stream.result  # type: ignore[no-any-return]

        results = await asyncio.gather(*map(read, streams))
        await killing
    assert [tokens(result) for result in results] == whole
    resumed = [result for result in results if result.resumptions]
    assert 0 < len(resumed) <= 2
    (gone,) = before - {resumption.target for result in resumed for resumption in result.resumptions}
    assert set(await cluster.targets_when(2, without={gone})) > before - {gone}


async def test_scaling_by_the_requests_in_flight_cuts_no_stream(cluster: Cluster, server: ServerProcess) -> None:
    whole = await expected(server, 4, 300)
    before = await cluster.targets_when(2)
    await cluster.command("deploy", FLAGS, 1)
    for num_replicas, num_streams in ((1, 2), (3, 20), (1, 2)):
        scaled = asyncio.create_task(cluster.targets_when(num_replicas, silent=before))
        after = await load_until(scaled, cluster, whole, num_streams)
        assert set(after) <= set(before) or set(before) <= set(after)
        before = after


async def test_a_new_version_cuts_no_stream(cluster: Cluster, server: ServerProcess) -> None:
    whole = await expected(server, 4, 300)
    while not (before := await cluster.targets()):  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    await cluster.command("deploy", f"{FLAGS} --max-context-tokens 1000", 2)
    replaced = asyncio.create_task(cluster.targets_when(2, without=before))
    async with AsyncClient(await load_until(replaced, cluster, whole, 4), timeout=240) as client:
        assert (await client.get_model_info()).max_context_tokens == 1000


async def load_until(
    changed: asyncio.Task[list[str]], cluster: Cluster, whole: list[tuple[int, ...]], num_streams: int
) -> list[str]:
    """Keeps streams running until the replicas have changed; none may be cut or differ."""
    numbers = [index % len(whole) for index in range(num_streams)]
    while not changed.done():
        if not (targets := await cluster.targets()):  # late on a busy machine
            continue
        async with AsyncClient(targets, timeout=240) as client:
            results = await asyncio.gather(*(client.generate(**options(number, 300)) for number in numbers))
        assert [tokens(result) for result in results] == [whole[number] for number in numbers]
        assert not any(result.resumptions for result in results)
    return await changed


def listens(target: str) -> bool:
    host, _, port = target.rpartition(":")
    with socket.socket() as connection:
        return connection.connect_ex((host, int(port))) == 0
