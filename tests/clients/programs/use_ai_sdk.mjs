// Uses the AI SDK as its documentation does, and says what it saw: use_ai_sdk.mjs SCENARIO PROVIDER ARGUMENT…
// PROVIDER is what it reaches the server by: compatible, chat (OpenAI's chat completions) or responses, its default.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, streamText, tool } from "ai";

const baseURL = `${process.env.PARLEY_URL}/v1`;
const say = (step, value) => console.log(JSON.stringify([step, value]));

function connect(provider, model, apiKey = process.env.PARLEY_KEY) {
  if (provider === "compatible") return createOpenAICompatible({ name: "parley", baseURL, apiKey, includeUsage: true })(model);
  const openai = createOpenAI({ baseURL, apiKey });
  return provider === "chat" ? openai.chat(model) : openai(model);
}

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    if (!APICallError.isInstance(error)) throw error;
    return { raised: error.name, status: error.statusCode, message: error.message, retryable: error.isRetryable };
  }
  return null;
}

/** Says the parts of a stream; what goes wrong in it is a part, too. */
async function stream(provider, model, prompt, apiKey = undefined) {
  const result = streamText({ model: connect(provider, model, apiKey), prompt, maxRetries: 0, onError() {} });
  for await (const part of result.fullStream) {
    if (part.type === "text-delta") say("piece", part.text);
    if (part.type === "finish") say("finish", [part.finishReason, part.totalUsage.outputTokens ?? null]);
    if (part.type === "error") say("error", [part.error?.statusCode ?? null, String(part.error?.message ?? part.error)]);
  }
}

const scenarios = {
  async chat(provider, model, first, second) {
    const whole = await generateText({ model: connect(provider, model), prompt: first, maxRetries: 0 });
    say("content", whole.text);
    say("finish", whole.finishReason);
    say("usage", whole.usage.outputTokens);
    const messages = [
      { role: "user", content: first },
      { role: "assistant", content: whole.text },
      { role: "user", content: second },
    ];
    const system = "You are a ferret.";
    const next = await generateText({ model: connect(provider, model), instructions: system, messages, maxRetries: 0 });
    say("with history", next.text);
  },

  async tools(provider, model, prompt) {
    const properties = { city: { type: "string" }, days: { type: "integer" } };
    const tools = { forecast: tool({ description: "Tells the weather", inputSchema: jsonSchema({ type: "object", properties }) }) };
    const told = (calls) => calls.map((call) => [call.toolName, call.input, call.toolCallId]);
    const whole = await generateText({ model: connect(provider, model), prompt, tools, maxRetries: 0 });
    say("calls", told(whole.toolCalls));
    say("finish", whole.finishReason);
    const streamed = streamText({ model: connect(provider, model), prompt, tools, maxRetries: 0 });
    say("streamed", told(await streamed.toolCalls));
  },

  ask: stream,

  async errors(provider, model, refused, poorKey) {
    const ask = (prompt, key) =>
      refusal(() => generateText({ model: connect(provider, model, key), prompt, maxRetries: 0 }));
    say("provider down", await ask(refused));
    await stream(provider, model, refused);
    say("wrong key", await ask("hello", "wrong"));
    // OpenAI's own provider does not even ask without one.
    if (provider === "compatible") say("no key", await ask("hello", ""));
    await ask("fake?tokens=1", poorKey);
    say("over the limit", await ask("fake?tokens=1", poorKey));
  },
};

const [scenario, ...args] = process.argv.slice(2);
await scenarios[scenario](...args);
