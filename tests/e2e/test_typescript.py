"""The example of the TypeScript client works as written."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[2] / "clients/typescript"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (PACKAGE / "dist").exists(),
    reason="the TypeScript client is not built: make clients/typescript/dist, which needs Node.js",
)


def node(module: str) -> str:
    """Runs a module inside the package, which can import itself by its name, and returns what it prints."""
    command = ["node", "--input-type=module", "--eval", module]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=PACKAGE)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_example_generates_aborts_a_stream_and_gets_the_details_of_an_error(server: Any) -> None:
    (block,) = re.findall(r"```ts\n(.*?)```", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    printed = node(block.replace("localhost:50051", server.target))
    generated, _, refused = printed.partition("INVALID_REQUEST")
    assert " 40\n" in generated
    assert "field: 'sampling.temperature'" in refused
    assert "is not in [0, 100]" in refused


def test_a_prompt_that_is_too_long_is_told_by_the_reason_of_the_violation(server: Any) -> None:
    printed = node(f"""
        import {{ Client }} from "mpt-grpc-client";
        const client = new Client("http://{server.target}");
        const prompt = {{ case: "text", value: "word ".repeat(3000) }};
        await client.generate({{ prompt }}).catch((error) => console.log(error.violations[0].reason));
    """)
    assert printed == "CONTEXT_LENGTH_EXCEEDED\n"


def test_leaving_a_stream_cancels_it_on_the_server(server: Any) -> None:
    printed = node(f"""
        import {{ Client }} from "mpt-grpc-client";
        const client = new Client("http://{server.target}");
        const load = async () => (await client.service.getServerInfo({{}})).load;
        const before = (await load()).numOutputTokens;
        const prompt = {{ case: "text", value: "The fox" }};
        for await (const _ of client.stream({{ prompt, stopping: {{ maxNewTokens: 1900, ignoreEos: true }} }})) break;
        while ((await load()).numRunningRequests > 0);
        console.log(Number((await load()).numOutputTokens - before));
    """)
    assert 1 <= int(printed) < 1000


def test_an_address_without_a_scheme_is_refused_with_the_remedy() -> None:
    printed = node("""
        import { Client } from "mpt-grpc-client";
        for (const options of [{}, { token: "secret" }]) {
            try {
                new Client("localhost:50051", options);
            } catch (error) {
                console.log(error.name, error.message);
            }
        }
    """)
    assert printed == 2 * "TypeError url: 'localhost:50051' must begin with http://, or https:// with TLS\n"


def test_a_token_is_not_sent_to_another_machine_without_tls_unless_that_is_allowed() -> None:
    printed = node("""
        import { Client } from "mpt-grpc-client";
        const token = "secret";
        const local = ["localhost", "a.localhost", "127.0.0.2", "[::1]"];
        for (const host of local) new Client(`http://${host}:1`, { token });
        new Client("https://models.example:50051", { token });
        new Client("http://models.example:50051", { token, allowInsecureToken: true });
        for (const host of ["models.example", "10.0.0.1", "localhost.example", "127.0.0.1.example"]) {
            try {
                new Client(`http://${host}:50051`, { token });
            } catch (error) {
                console.log(error.message);
            }
        }
    """)
    assert printed.count("is another machine, and the token would be readable: use https://") == 4
