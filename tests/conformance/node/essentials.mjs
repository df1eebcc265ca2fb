// What a program in JavaScript expects of the API, by OpenAI's own package.
// node essentials.mjs FOLDER URL MODEL BIASES: FOLDER has node_modules, BIASES end documents soon.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, baseURL, model, biases] = process.argv.slice(2);
const { OpenAI } = createRequire(folder + "/")("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });

const messages = [{ role: "user", content: "hello there" }];
const short = { model, messages, max_completion_tokens: 12, seed: 5 };
const ending = { model, messages, max_completion_tokens: 400, seed: 5, logit_bias: JSON.parse(biases) };
const chat = (fields, options) => client.chat.completions.create({ ...short, ...fields }, options);

const checks = {
  async models() {
    const { data } = await client.models.list();
    assert.deepEqual(data.map((one) => one.id), [model]);
    assert.equal((await client.models.retrieve(model)).object, "model");
  },

  async "whole and streamed answers are the same"() {
    const { data, response, request_id: id } = await chat({ n: 2 }, { headers: { "x-request-id": "js-1" } }).withResponse();
    assert.equal(id, "js-1");
    assert.equal(response.headers.get("x-request-id"), "js-1");
    assert.equal(data.id, "chatcmpl-js-1");
    assert.equal(data.usage.completion_tokens, 24);
    const texts = ["", ""];
    let usage = null;
    for await (const piece of await chat({ n: 2, stream: true, stream_options: { include_usage: true } })) {
      for (const { index, delta } of piece.choices) texts[index] += delta.content ?? "";
      usage = piece.usage ?? usage;
    }
    assert.deepEqual(texts, data.choices.map((choice) => choice.message.content));
    assert.equal(usage.completion_tokens, 24);
    const final = await client.chat.completions.stream(short).finalContent();
    assert.equal(final, texts[0]);
  },

  async "log-probabilities"() {
    const { choices: [{ logprobs }] } = await chat({ logprobs: true, top_logprobs: 2 });
    assert.equal(logprobs.content.length, 12);
    assert.ok(logprobs.content.every((token) => token.logprob <= 0 && token.top_logprobs.length === 2));
  },

  async "documents of a schema"() {
    const schema = {
      type: "object",
      properties: { city: { enum: ["Oslo", "Paris"] }, days: { enum: [1, 2, 3] } },
      required: ["city", "days"],
      additionalProperties: false,
    };
    const response_format = { type: "json_schema", json_schema: { name: "trip", strict: true, schema } };
    const answer = await client.chat.completions.parse({ ...ending, response_format });
    assert.deepEqual(Object.keys(answer.choices[0].message.parsed), ["city", "days"]);

    const tools = [{ type: "function", function: { name: "plan_trip", parameters: schema } }];
    const asked = { ...ending, tools, tool_choice: "required", parallel_tool_calls: false };
    const stream = client.chat.completions.stream(asked);
    const { tool_calls: [call] } = await stream.finalMessage();
    assert.equal(call.function.name, "plan_trip");
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city", "days"]);
    assert.equal((await stream.finalChatCompletion()).choices[0].finish_reason, "tool_calls");
  },

  async completions() {
    const asked = { model, prompt: "once upon", max_tokens: 6, seed: 1 };
    const whole = await client.completions.create(asked);
    let text = "";
    for await (const piece of await client.completions.create({ ...asked, stream: true })) text += piece.choices[0]?.text ?? "";
    assert.equal(text, whole.choices[0].text);
  },

  async errors() {
    const refused = await chat({ temperature: 3 }).catch((error) => error);
    assert.ok(refused instanceof OpenAI.BadRequestError);
    assert.deepEqual([refused.param, refused.code, refused.type], ["temperature", "invalid_value", "invalid_request_error"]);
    assert.ok(refused.requestID);
    const missing = await chat({ model: "x", stream: true }).catch((error) => error);
    assert.ok(missing instanceof OpenAI.NotFoundError);
    assert.equal(missing.code, "model_not_found");
    const late = await chat({ max_completion_tokens: 4000 }, { headers: { "x-request-timeout": "0.05" } }).catch((error) => error);
    assert.ok(late instanceof OpenAI.InternalServerError);
    assert.deepEqual([late.status, late.code], [504, "deadline_exceeded"]);
  },

  async "leaving in mid-stream"() {
    const stream = await chat({ max_completion_tokens: 4000, stream: true });
    let pieces = 0;
    for await (const _ of stream) if (++pieces === 3) break;
    assert.equal(pieces, 3);
    assert.ok(stream.controller.signal.aborted);
  },

  async "thirty streams at once"() {
    const one = async (seed) => {
      let text = "";
      for await (const piece of await chat({ seed, stream: true })) text += piece.choices[0].delta.content ?? "";
      return text;
    };
    const together = await Promise.all(Array.from({ length: 30 }, (_, seed) => one(seed)));
    assert.equal(await one(7), together[7]);
    assert.ok(new Set(together).size > 25);
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    error.message = `${name}: ${error.message}`;
    throw error;
  }
  console.log(name);
}
