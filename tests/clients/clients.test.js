// `ktrans serve` asked by npm's clients: what editors and web pages are made of. `make clients` runs this.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { after, before, test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { constructLlmApi } from "@continuedev/openai-adapters";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const KEY = "secret-key";
const ANSWER = "The capital of France is Paris.";
const THOUGHT = "This is an easy question. I will answer in one sentence.";
const City = z.strictObject({ city: z.enum(["Paris", "Rome"]) });
const description = "The weather of a city.";
const tools = [{ type: "function", function: { name: "get_weather", description, parameters: z.toJSONSchema(City) } }];
const must = { type: "function", function: { name: "get_weather" } };
const messages = [{ role: "user", content: "What is the capital of France?" }];

let server, base, model, openai, ai, adapter;

before(async () => {
  const [program, ...args] = (process.env.KTRANS ?? "ktrans").split(" ");
  const options = ["serve", "--port", "0", "--context", "1024"];
  const env = { ...process.env, KTRANS_API_KEY: KEY };
  server = spawn(program, [...args, ...options], { env, stdio: ["ignore", "ignore", "pipe"] });
  for await (const line of createInterface({ input: server.stderr })) {
    const found = line.match(/serving (\S+) at (http:\S+?)\/,/);
    if (!found) continue;
    [, model, base] = found;
    break;
  }
  assert.ok(base, "the server ended before it was ready");
  openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: KEY, maxRetries: 0 });
  const can = { includeUsage: true, supportsStructuredOutputs: true };
  ai = createOpenAICompatible({ name: "ktrans", baseURL: `${base}/v1`, apiKey: KEY, ...can })(model);
  adapter = constructLlmApi({ provider: "openai", apiBase: `${base}/v1/`, apiKey: KEY });
}, { timeout: 300_000 });

after(() => server.kill());

const all = async (stream) => {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
};
const said = (chunks) => chunks.map((c) => c.choices[0]?.delta.content ?? "").join("");

test("openai: chat, stream, errors", async () => {
  const whole = await openai.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(whole.choices[0].message.content, ANSWER);
  const given = { model, messages, temperature: 0, stream: true, stream_options: { include_usage: true } };
  const chunks = await all(await openai.chat.completions.create(given));
  assert.equal(said(chunks), ANSWER);
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
  const stream = openai.chat.completions.stream({ model, messages, temperature: 0 });
  assert.equal(await stream.finalContent(), ANSWER);
  await assert.rejects(openai.chat.completions.create({ model: "gpt", messages }), OpenAI.NotFoundError);
  await assert.rejects(openai.chat.completions.create({ model, messages, temperature: -1 }), /allowed is 0 to 100/);
  assert.deepEqual((await all(await openai.models.list())).map((m) => m.id), [model]);
});

test("openai: a tool is called and answers, an answer has a form", async () => {
  const given = { model, messages, tools, temperature: 0, tool_choice: must, parallel_tool_calls: false };
  const whole = await openai.chat.completions.create(given);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  City.parse(JSON.parse(call.function.arguments));
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  const streamed = await openai.chat.completions.stream(given).finalMessage();
  assert.deepEqual(streamed.tool_calls[0].function.arguments, call.function.arguments);
  const called = [...messages, whole.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sunny" }];
  const last = await openai.chat.completions.create({ model, messages: called, tools, temperature: 0, max_tokens: 8 });
  assert.ok(last.usage.prompt_tokens > whole.usage.prompt_tokens);
  const form = { model, messages, temperature: 0, response_format: zodResponseFormat(City, "city") };
  assert.ok(City.parse((await openai.chat.completions.parse(form)).choices[0].message.parsed));
});

test("openai: fill in the middle, and a stream that is left", async () => {
  const given = { model, prompt: "def add(a, b):\n    return ", suffix: "\n", temperature: 0, max_tokens: 8 };
  const filled = await openai.completions.create(given);
  assert.ok(filled.usage.prompt_tokens > 10 && filled.choices[0].finish_reason);
  const story = [{ role: "user", content: "Tell me a story about a dog named Max." }];
  const stream = await openai.chat.completions.create({ model, messages: story, stream: true });
  for await (const chunk of stream) if (said([chunk])) break;
  const headers = { authorization: `Bearer ${KEY}` };
  for (let i = 0; i < 100; i++) {
    const now = await (await fetch(`${base}/stats`, { headers })).json();
    if (!now.running && !now.waiting) return;
    await new Promise((done) => setTimeout(done, 50));
  }
  assert.fail("the engine works for a client that is gone");
});

test("ai: text, thoughts and usage, whole and streamed", async () => {
  const whole = await generateText({ model: ai, messages, temperature: 0, maxRetries: 0 });
  assert.deepEqual([whole.text, whole.finishReason, whole.usage.inputTokens], [ANSWER, "stop", 11]);
  const how = { ktrans: { chat_template_kwargs: { enable_thinking: true } } };
  const streamed = streamText({ model: ai, messages, temperature: 0, maxRetries: 0, providerOptions: how });
  assert.equal((await all(streamed.textStream)).join(""), ANSWER);
  assert.equal(await streamed.reasoningText, THOUGHT);
  assert.equal((await streamed.usage).inputTokens, 13);
});

test("ai: a tool runs and answers, an answer has a form", async () => {
  const seen = [];
  const weather = tool({ description, inputSchema: City, execute: async (given) => (seen.push(given), "sunny") });
  const given = { model: ai, messages, temperature: 0, maxRetries: 0, maxOutputTokens: 60, tools: { weather } };
  const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : { type: "tool", toolName: "weather" } });
  const providerOptions = { ktrans: { parallel_tool_calls: false } };
  const steps = { ...given, prepareStep, providerOptions, stopWhen: stepCountIs(2) };
  const whole = await generateText(steps);
  assert.deepEqual(whole.steps.map((s) => s.toolCalls.length > 0), [true, false]);
  const streamed = streamText(steps);
  await streamed.consumeStream();
  assert.deepEqual((await streamed.steps)[0].toolCalls.map((c) => c.input), whole.steps[0].toolCalls.map((c) => c.input));
  seen.forEach((item) => City.parse(item));
  assert.equal(seen.length, 2);
  const formed = await generateText({ model: ai, messages, temperature: 0, output: Output.object({ schema: City }) });
  City.parse(formed.output);
});

test("@continuedev/openai-adapters: chat, stream, completion", async () => {
  const signal = new AbortController().signal;
  const whole = await adapter.chatCompletionNonStream({ model, messages, temperature: 0 }, signal);
  assert.equal(whole.choices[0].message.content, ANSWER);
  const chunks = await all(adapter.chatCompletionStream({ model, messages, temperature: 0, stream: true }, signal));
  assert.equal(said(chunks), ANSWER);
  const given = { model, prompt: "Once upon a time", max_tokens: 8, temperature: 0 };
  const text = (await adapter.completionNonStream(given, signal)).choices[0].text;
  const pieces = await all(adapter.completionStream({ ...given, stream: true }, signal));
  assert.equal(pieces.map((p) => p.choices[0]?.text ?? "").join(""), text);
  const calling = { model, messages, tools, temperature: 0, tool_choice: must, parallel_tool_calls: false };
  const called = await all(adapter.chatCompletionStream({ ...calling, stream: true }, signal));
  const deltas = called.flatMap((c) => c.choices[0]?.delta.tool_calls ?? []);
  assert.deepEqual(deltas.flatMap((d) => d.function.name ?? []), ["get_weather"]);
  City.parse(JSON.parse(deltas.map((d) => d.function.arguments).join("")));
});
