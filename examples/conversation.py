"""Holds a conversation that never outgrows the context: the oldest messages are dropped, the system message stays."""

from mpt_grpc_client import Client, Message, Role

QUESTIONS = ("Who are you?", "Where do you live?", "What do you eat?")

with Client(timeout=60) as client:
    messages = [Message(Role.SYSTEM, "You are a fox in a forest.")]
    for question in QUESTIONS:
        messages.append(Message(Role.USER, question))
        result = client.generate(messages, max_new_tokens=40, temperature=0.7, seed=1, drop_oldest_turns=True)
        messages.append(Message(Role.ASSISTANT, result.text.strip()))
        print(f"> {question}\n{messages[-1].content}")
