"""`instructor`: typed answers by tools, by JSON schema and in JSON mode, whole and partial."""

from __future__ import annotations

import instructor
import openai
from common import PERSON, Server
from pydantic import BaseModel

server = Server()


class Person(BaseModel):
    """A person"""

    name: str
    age: int


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON):
    client = instructor.from_openai(openai.OpenAI(base_url=server.openai_url, api_key="none"), mode=mode)
    asked = {
        "model": server.model,
        "messages": [{"role": "user", "content": PERSON}],
        "temperature": 0,
        "max_tokens": 400,
        "response_model": Person,
        "max_retries": 3,
    }
    # A grammar holds the form; what the demo model writes into it is checked where the question reaches it as it was asked.
    person = client.chat.completions.create(**asked)
    assert isinstance(person, Person)
    if mode is instructor.Mode.JSON_SCHEMA:
        server.is_person(person.name, person.age)
    *_, last = client.chat.completions.create_partial(**asked)
    assert last.name == person.name
    assert last.age == person.age
