"""Calls the OpenAI-compatible API with the standard library only."""

import json
import os
import urllib.request

URL = os.environ.get("OPENAI_BASE_URL", "http://localhost:8451/v1")
BODY = {
    "messages": [{"role": "user", "content": "Where does the fox live?"}],
    "max_tokens": 40,
    "stream": True,
    "seed": 7,
}

request = urllib.request.Request(
    f"{URL}/chat/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(request, timeout=60) as response:
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if data and data != "[DONE]":
            print(json.loads(data)["choices"][0]["delta"].get("content") or "", end="", flush=True)
print()
