"""Uses LangChain's ChatOpenAI as its documentation does, and says what it saw: use_langchain.py SCENARIO ARGUMENT…"""

import asyncio
import json
import os
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def connect(model, key=None, **more):
    key = os.environ["PARLEY_KEY"] if key is None else key
    return ChatOpenAI(model=model, base_url=f"{os.environ['PARLEY_URL']}/v1", api_key=key, max_retries=0, **more)


def say(step, value):
    print(json.dumps([step, value]), flush=True)


def refusal(call, *arguments):
    try:
        call(*arguments)
    except openai.APIError as error:
        # LangChain raises kinds of its own, each of one of these.
        raised = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "openai")
        return {"raised": raised, "status": getattr(error, "status_code", None), "message": error.message}
    return None


def chat(model, first, second):
    bot = connect(model, temperature=0.5, max_tokens=100)
    answer = bot.invoke(first)
    say("content", answer.content)
    say("usage", answer.usage_metadata)
    say("finish", answer.response_metadata["finish_reason"])
    history = [SystemMessage("You are a ferret."), HumanMessage(first), AIMessage(answer.content), HumanMessage(second)]
    say("with history", bot.invoke(history).content)
    chain = ChatPromptTemplate.from_messages([("system", "You are a {animal}."), ("user", "{text}")]) | bot
    say("of a chain", chain.invoke({"animal": "polecat", "text": first}).content)
    say("batch", [one.content for one in bot.batch([first, second])])


def forecast(city: str, days: int) -> str:
    """Tells the weather."""


def tools(model, text):
    bot = connect(model).bind_tools([forecast])
    say("calls", [[call["name"], call["args"], call["id"]] for call in bot.invoke(text).tool_calls])
    whole = None
    for piece in bot.stream(text):
        whole = piece if whole is None else whole + piece
    say("streamed", [[call["name"], call["args"], call["id"]] for call in whole.tool_calls])


def stream(model, text, key=None, **more):
    for piece in connect(model, key, **more).stream(text):
        say("piece", piece.content)
        if piece.usage_metadata:
            say("usage", piece.usage_metadata["output_tokens"])
    say("ended", True)


def ask(model, text):
    stream(model, text, stream_usage=True)


def ask_async(model, text):
    async def read():
        async for piece in connect(model).astream(text):
            say("piece", piece.content)

    asyncio.run(read())


def cut(model, text):
    say("raised", refusal(stream, model, text))


def errors(model, refused, poor_key):
    say("wrong type", refusal(connect(model, temperature=77).invoke, "fake?tokens=1"))
    say("unknown model", refusal(connect("nobody-knows?").invoke, "hello"))
    say("provider down", refusal(connect(model).invoke, refused))
    say("provider down, streamed", refusal(stream, model, refused))
    say("wrong key", refusal(connect(model, "wrong").invoke, "hello"))
    poor = connect(model, poor_key)
    poor.invoke("fake?tokens=1")
    say("over the limit", refusal(poor.invoke, "fake?tokens=1"))


def responses(model, text):
    """With the other of OpenAI's two APIs below."""
    bot = connect(model, use_responses_api=True)
    say("content", bot.invoke(text).text)
    for piece in bot.stream(text):
        say("piece", piece.text)


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    globals()[scenario](*arguments)
