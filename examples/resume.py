"""Resumes an interrupted stream exactly where it stopped, as after the failure of a server."""

from mpt_grpc_client import Client

PROMPT = "Once upon a time"

with Client(timeout=60) as client:
    with client.stream(PROMPT, max_new_tokens=40, seed=7, return_token_ids=True) as interrupted:
        for _ in interrupted:
            if interrupted.num_tokens >= 10:
                break

    rest = client.generate(PROMPT, max_new_tokens=40, seed=7, resume_token_ids=interrupted.token_ids)
    complete = client.generate(PROMPT, max_new_tokens=40, seed=7)
    print(interrupted.text + "|" + rest.text)
    # In 16-bit types, tokens of nearly equal score may differ.
    print("identical:", interrupted.text + rest.text == complete.text)
