// Uses the openai package as its documentation does, and says what it saw: use_openai.mjs SCENARIO ARGUMENT…

import OpenAI from "openai";

const url = `${process.env.PARLEY_URL}/v1`;
const connect = (apiKey = process.env.PARLEY_KEY) => new OpenAI({ baseURL: url, apiKey, maxRetries: 0, timeout: 30000 });
const say = (step, value) => console.log(JSON.stringify([step, value]));
const user = (content) => [{ role: "user", content }];

/** What the library throws, and what it knows of it. */
async function refusal(call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    const { status, code, param, type, message, requestID } = error;
    return { raised: error.constructor.name, status, code, param, type, message, request_id: requestID };
  }
  return null;
}

async function stream(model, content, more = {}, key = undefined) {
  const chunks = await connect(key).chat.completions.create({ model, messages: user(content), stream: true, ...more });
  for await (const chunk of chunks) {
    for (const choice of chunk.choices) {
      if (choice.delta.content != null) say("piece", choice.delta.content);
      if (choice.finish_reason) say("finish", choice.finish_reason);
    }
    if (chunk.usage) say("usage", chunk.usage);
  }
  say("ended", true);
}

const scenarios = {
  async models(model) {
    const found = [];
    for await (const one of connect().models.list()) found.push(one.id);
    say("models", found);
    say("model", (await connect().models.retrieve(model)).id);
  },

  async chat(model, first, second) {
    const client = connect();
    const whole = await client.chat.completions.create({ model, messages: user(first), temperature: 0.5 });
    say("whole", [whole.object, whole.model, whole.choices[0].finish_reason, whole.choices[0].message.role]);
    say("content", whole.choices[0].message.content);
    say("usage", whole.usage);
    say("request id", whole._request_id);
    const parts = await client.chat.completions.create({ model, messages: user([{ type: "text", text: second }]) });
    say("of parts", parts.choices[0].message.content);
  },

  async ask(model, content) {
    await stream(model, content, { stream_options: { include_usage: true } });
  },

  /** By the library's own helper, which puts the whole answer together. */
  async helped(model, content) {
    const helper = connect().chat.completions.stream({ model, messages: user(content) });
    helper.on("content", (piece) => say("piece", piece));
    say("content", await helper.finalContent());
  },

  async tools(model, content) {
    const parameters = { type: "object", properties: { city: { type: "string" }, days: { type: "integer" } } };
    const tools = [{ type: "function", function: { name: "forecast", parameters } }];
    const whole = await connect().chat.completions.create({ model, messages: user(content), tools });
    say("calls", whole.choices[0].message.tool_calls);
    const streamed = await connect().chat.completions.stream({ model, messages: user(content), tools }).finalMessage();
    say("streamed", [streamed.content, streamed.tool_calls.map((call) => JSON.parse(call.function.arguments))]);
  },

  async cut(model, content) {
    say("raised", await refusal(() => stream(model, content)));
  },

  async errors(model, refused, poorKey) {
    const client = connect();
    const ask = (messages, by = client) => refusal(() => by.chat.completions.create({ model, messages }));
    say("no messages", await ask([]));
    say("wrong type", await ask("hello"));
    say("unknown model", await refusal(() => client.models.retrieve("nobody-knows")));
    say("provider down", await ask(user(refused)));
    say("provider down, streamed", await refusal(() => stream(model, refused)));
    say("wrong key", await refusal(() => connect("wrong").models.list()));
    const bare = client.withOptions({ defaultHeaders: { Authorization: null } });
    say("no key", await refusal(() => bare.models.list()));
    say("wrong key, streamed", await refusal(() => stream(model, "hello", {}, "wrong")));
    const poor = connect(poorKey);
    await poor.models.list();
    say("over the limit", await ask(user("fake?tokens=1"), poor));
  },

  async responses(model, first, second) {
    const client = connect();
    const one = await client.responses.create({ model, input: first });
    say("first", [one.status, one.output_text]);
    const two = await client.responses.create({ model, input: second, previous_response_id: one.id });
    say("second", [two.status, two.output_text]);
    say("got", (await client.responses.retrieve(one.id)).output_text);
    await client.responses.delete(one.id);
    say("gone", await refusal(() => client.responses.retrieve(one.id)));
  },

  async responses_ask(model, input) {
    for await (const event of await connect().responses.create({ model, input, stream: true })) {
      say("event", event.type);
      if (event.type === "response.output_text.delta") say("piece", event.delta);
      if (event.type === "response.completed") say("completed", event.response.output[0].content[0].text);
    }
  },

  async conversations(model, first, second) {
    const client = connect();
    const made = await client.conversations.create({ metadata: { topic: "ferrets" } });
    say("made", [made.object, made.metadata]);
    for (const input of [first, second]) {
      say("answer", (await client.responses.create({ model, input, conversation: made.id })).output_text);
    }
    say("updated", (await client.conversations.update(made.id, { metadata: { topic: "polecats" } })).metadata);
    const page = await client.conversations.items.list(made.id, { order: "asc", limit: 3 });
    say("page", [page.data.length, page.hasNextPage(), (await page.getNextPage()).data.length]);
    const items = [];
    for await (const item of client.conversations.items.list(made.id, { order: "asc" })) {
      items.push([item.role, item.content[0].text]);
    }
    say("items", items);
    say("deleted", (await client.conversations.delete(made.id)).deleted);
    say("gone", await refusal(() => client.conversations.retrieve(made.id)));
  },
};

const [scenario, ...args] = process.argv.slice(2);
await scenarios[scenario](...args);
