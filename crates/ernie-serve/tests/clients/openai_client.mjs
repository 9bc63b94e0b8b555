// Drives a running server with OpenAI's client for Node: openai_client.mjs BASE_URL [KEY]. Ends with an error if an answer is not what the client expects.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: process.argv[3] ?? "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "What do birds eat?" }];
const base = { model, messages, max_tokens: 40, seed: 1 };
let passed = 0;
const check = (name, condition, shown) => {
  assert.ok(condition, `${name}: ${JSON.stringify(shown)}`);
  passed += 1;
};

// Chats, whole and streamed.
const whole = await client.chat.completions.create({ ...base, temperature: 0, logprobs: true, top_logprobs: 2 });
const text = whole.choices[0].message.content;
check("chat", text.length > 0 && whole.usage.completion_tokens <= 40, whole);
check("logprobs", whole.choices[0].logprobs.content.every((token) => token.top_logprobs.length === 2), whole);
let streamed = "";
for await (const event of await client.chat.completions.create({ ...base, temperature: 0, stream: true })) {
  streamed += event.choices[0].delta.content ?? "";
}
check("chat streamed", streamed === text, streamed);

// Completions.
const completion = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 8, temperature: 0 });
check("completion", completion.choices[0].text.length > 0, completion);

// Structured answers and calls.
const schema = {
  type: "object",
  properties: { name: { type: "string", maxLength: 12 }, legs: { type: "integer", minimum: 0, maximum: 8 } },
  required: ["name", "legs"],
  additionalProperties: false,
};
const format = { type: "json_schema", json_schema: { name: "animal", strict: true, schema } };
const structured = await client.chat.completions.create({ ...base, max_tokens: 200, temperature: 1, response_format: format });
const animal = JSON.parse(structured.choices[0].message.content);
check("json_schema", typeof animal.name === "string" && Number.isInteger(animal.legs) && animal.legs <= 8, animal);
const tools = [{ type: "function", function: { name: "describe", parameters: schema } }];
const options = { ...base, max_tokens: 150, temperature: 1, tools, tool_choice: "required", parallel_tool_calls: false };
const called = await client.chat.completions.create(options);
const [call] = called.choices[0].message.tool_calls;
check("tool call", called.choices[0].finish_reason === "tool_calls" && JSON.parse(call.function.arguments).legs <= 8, called);
const final = await client.chat.completions.stream(options).finalChatCompletion();
check("tool call streamed", final.choices[0].message.tool_calls[0].function.arguments === call.function.arguments, final);

// Embeddings and errors.
const embeddings = await client.embeddings.create({ model, input: ["A cat.", "A dog."] });
check("embeddings", embeddings.data.length === 2 && embeddings.data[0].embedding.length > 0, embeddings.usage);
await assert.rejects(client.chat.completions.create({ ...base, temperature: 3 }), (error) => {
  check("error", error instanceof OpenAI.BadRequestError && error.param === "temperature", error);
  return true;
});

console.log(`openai (Node): ${passed} checks passed`);
