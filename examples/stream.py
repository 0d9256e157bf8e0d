"""Streams text and handles the errors that a program should expect."""

from mpt_grpc_client import Client, MptGrpcError, OverloadedError

with Client(timeout=60) as client:
    try:
        with client.stream("Once upon a time", max_new_tokens=60, temperature=0.8, stop_strings="\n") as stream:
            for text in stream:
                print(text, end="", flush=True)
        print(f"\n[{stream.finish}, {stream.num_tokens} tokens]")
    except OverloadedError as error:
        print(f"the server is busy; retry in {error.retry_after} s")
    except MptGrpcError as error:
        print(f"\nfailed: {error}")
