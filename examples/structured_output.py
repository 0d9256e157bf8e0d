"""Generates JSON that conforms to a schema, whatever the model."""

import json

from mpt_grpc_client import Client, JsonSchema

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "legs": {"enum": [2, 4, 6, 8]},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "legs", "tame"],
    "additionalProperties": False,
}

with Client(timeout=60) as client:
    result = client.generate("An animal as JSON: ", constraint=JsonSchema(SCHEMA), max_new_tokens=200, seed=3)
    animal = json.loads(result.text)
    print(animal["name"], animal["legs"], animal["tame"])
