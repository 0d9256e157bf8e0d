"""The client does not need the server or its dependencies."""

import subprocess
import sys


def test_the_client_imports_without_the_server_and_its_dependencies():
    server = ("torch", "mpt_grpc", "numpy", "transformers", "tokenizers", "opentelemetry.sdk", "rich")
    blocked = (*server, "langchain_core", "pydantic")
    script = (
        f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import mpt_grpc_client as client\n"
        "client.Client().close()\n"
        "assert all(hasattr(client, name) for name in client.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
