// Uses LangChain's ChatOpenAI as its documentation does, and says what it saw: use_langchain.mjs SCENARIO ARGUMENT…

import { AIMessage, HumanMessage, SystemMessage } from "@langchain/core/messages";
import { ChatOpenAI } from "@langchain/openai";

const connect = (model, apiKey = process.env.PARLEY_KEY) =>
  new ChatOpenAI({ model, apiKey, maxRetries: 0, configuration: { baseURL: `${process.env.PARLEY_URL}/v1` } });
const say = (step, value) => console.log(JSON.stringify([step, value]));

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return { raised: error.constructor.name, status: error.status ?? null, message: error.message };
  }
  return null;
}

async function stream(model, text) {
  let usage;
  for await (const piece of await connect(model).stream(text)) {
    say("piece", piece.content);
    usage = piece.usage_metadata ?? usage;
  }
  say("usage", usage.output_tokens);
}

const scenarios = {
  async chat(model, first, second) {
    const bot = connect(model);
    const answer = await bot.invoke(first);
    say("content", answer.content);
    say("usage", answer.usage_metadata);
    const history = [
      new SystemMessage("You are a ferret."),
      new HumanMessage(first),
      new AIMessage(answer.content),
      new HumanMessage(second),
    ];
    say("with history", (await bot.invoke(history)).content);
  },

  ask: stream,

  async cut(model, text) {
    say("raised", await refusal(() => stream(model, text)));
  },

  async errors(model, refused, poorKey) {
    say("provider down", await refusal(() => connect(model).invoke(refused)));
    say("provider down, streamed", await refusal(() => stream(model, refused)));
    say("wrong key", await refusal(() => connect(model, "wrong").invoke("hello")));
    const poor = connect(model, poorKey);
    await poor.invoke("fake?tokens=1");
    say("over the limit", await refusal(() => poor.invoke("fake?tokens=1")));
  },
};

const [scenario, ...args] = process.argv.slice(2);
await scenarios[scenario](...args);
