"""Drives a running server with OpenAI's Python client: openai_client.py BASE_URL [KEY]. Ends with an error if an answer is not what the client expects."""

import json
import re
import sys
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict, Field

client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2] if len(sys.argv) > 2 else "none", max_retries=0)
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What do birds eat?"}]
passed = []


def check(name, condition, shown=None):
    assert condition, f"{name}: {shown}"
    passed.append(name)


def chat(**options):
    options = {"model": model, "messages": question, "max_tokens": 40, "seed": 1} | options
    return client.chat.completions.create(**options)


# Chats, whole and streamed.
whole = chat(temperature=0)
text = whole.choices[0].message.content
check("chat", text and whole.usage.completion_tokens <= 40, whole)
pieces = list(chat(temperature=0, stream=True, stream_options={"include_usage": True}))
streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
check("chat streamed", streamed == text, (streamed, text))
check("chat usage", pieces[-1].usage == whole.usage, pieces[-1])
scored = chat(temperature=0, logprobs=True, top_logprobs=3)
tokens = scored.choices[0].logprobs.content
check("chat logprobs", len(tokens) > 0 and all(t.top_logprobs[0].token == t.token and t.logprob <= 0 for t in tokens), tokens)
check("chat n", len({choice.message.content for choice in chat(n=3, temperature=1).choices}) == 3)
parts = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
check("chat parts", chat(messages=parts).choices[0].message.content)

# Completions.
completion = client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, temperature=0, logprobs=2, echo=True)
check("completion", completion.choices[0].text.startswith("Once upon a time"), completion)
check("completion logprobs", "".join(completion.choices[0].logprobs.tokens) == completion.choices[0].text, completion)
stream = client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, temperature=0, stream=True)
check("completion streamed", "Once upon a time" + "".join(event.choices[0].text for event in stream) == completion.choices[0].text)

# Structured answers.
class Animal(BaseModel):
    # Bounds keep a model that knows no JSON from going on for ever.
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    legs: int = Field(ge=0, le=8)
    diet: Literal["meat", "plants", "both"]


for seed in range(4):
    parsed = client.chat.completions.parse(
        model=model, messages=question, response_format=Animal, temperature=1, seed=seed, max_tokens=200
    )
    check("parse", isinstance(parsed.choices[0].message.parsed, Animal), parsed)
pattern = r"[a-z]{3}-\d{2}"
answer = chat(extra_body={"structured_outputs": {"regex": pattern}}, temperature=1).choices[0].message.content
check("regex", re.fullmatch(pattern, answer), answer)
answer = client.completions.create(model=model, prompt="Colour:", extra_body={"guided_choice": ["red", "green"]}).choices[0].text
check("choice", answer in ("red", "green"), answer)

# Calls of functions, and the turn after. (The functions take most of the 512 tokens that the embedded model has.)
tools = [openai.pydantic_function_tool(Animal, name="describe", description="Describes an animal")]
called = chat(tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=1, max_tokens=150)
calls = called.choices[0].message.tool_calls
check("tool call", called.choices[0].finish_reason == "tool_calls" and len(calls) == 1, called)
Animal.model_validate_json(calls[0].function.arguments)
with client.chat.completions.stream(
    model=model,
    messages=question,
    tools=tools,
    tool_choice={"type": "function", "function": {"name": "describe"}},
    parallel_tool_calls=False,
    temperature=1,
    seed=1,
    max_tokens=150,
) as events:
    final = events.get_final_completion()
streamed_call = final.choices[0].message.tool_calls[0]
check("tool call streamed", isinstance(streamed_call.function.parsed_arguments, Animal), final)
result = {"role": "tool", "tool_call_id": calls[0].id, "content": json.dumps({"ok": True})}
after = chat(messages=[*question, called.choices[0].message, result], tools=tools, tool_choice="none")
check("tool result", after.choices[0].message.content is not None, after)

# Embeddings: the client asks for base64 by itself.
vectors = [item.embedding for item in client.embeddings.create(model=model, input=["A cat.", "A dog."]).data]
plain = client.embeddings.create(model=model, input="A cat.", encoding_format="float").data[0].embedding
check("embeddings", len(vectors) == 2 and max(abs(a - b) for a, b in zip(vectors[0], plain)) < 1e-6)

# Errors.
for kind, param, options in [
    (openai.BadRequestError, "temperature", {"temperature": 3}),
    (openai.BadRequestError, "response_format.json_schema.schema",
     {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}}),
    (openai.BadRequestError, "tool_choice.function.name",
     {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "unknown"}}}),
    (openai.NotFoundError, "model", {"model": "another"}),
]:
    try:
        chat(**options)
        raise AssertionError(f"{options} was not refused")
    except kind as error:
        check(f"error {param}", error.param == param and error.type == "invalid_request_error", error)

print(f"openai (Python) {openai.__version__}: {len(passed)} checks passed")
