"""An agent: the model calls Python functions until it calls the one with its answer, at the latest in the last turn."""

from typing import Annotated, Literal

from mpt_grpc_client import Client, Message, Role

City = Literal["Paris", "Rome", "Oslo"]
MAX_TURNS = 4


def get_weather(city: City) -> str:
    """Look up the weather of a city."""
    return {"Paris": "rainy", "Rome": "sunny", "Oslo": "snowy"}[city]


def answer(city: Annotated[City, "The city to recommend."]) -> str:
    """Answer the user's question."""
    return f"Go to {city}!"


TOOLS = {"get_weather": get_weather, "answer": answer}

with Client(timeout=60) as client:
    messages = [Message(Role.USER, "Which city shall I visit?")]
    for turn in range(MAX_TURNS):
        result = client.generate(
            messages,
            tools=list(TOOLS.values()),
            tool_choice="required",
            allowed_tools=["answer"] if turn == MAX_TURNS - 1 else None,
            parallel_tool_calls=False,
            seed=2 + turn,
        )
        messages.append(result.message)
        for call in result.tool_calls:
            returned = TOOLS[call.name](**call.values)
            print(f"{call.name}({call.arguments}) returns {returned!r}")
            messages.append(Message(Role.TOOL, returned, tool_call_id=call.id))
        if result.tool_calls[-1].name == "answer":
            break
