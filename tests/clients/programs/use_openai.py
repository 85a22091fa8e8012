"""Uses the openai package as its documentation does, and says what it saw: use_openai.py SCENARIO ARGUMENT…"""

import json
import os
import sys
import time

import openai
from openai import OpenAI

URL = f"{os.environ['PARLEY_URL']}/v1"
KEY = os.environ["PARLEY_KEY"]


def connect(key=KEY, url=URL):
    return OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30)


def say(step, value):
    print(json.dumps([step, value]), flush=True)


def refusal(call, *arguments, **named):
    """What the library raises, and what it knows of it."""
    try:
        call(*arguments, **named)
    except openai.APIError as error:
        return {
            "raised": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "message": error.message,
            "code": error.code,
            "param": error.param,
            "type": error.type,
            "request_id": getattr(error, "request_id", None),
        }
    return None


def user(text):
    return [{"role": "user", "content": text}]


def models(model):
    client = connect()
    found = list(client.models.list())
    say("models", [one.id for one in found])
    say("kinds", sorted({one.object for one in found}))
    say("model", client.models.retrieve(model).id)


def chat(model, first, second):
    client = connect()
    whole = client.chat.completions.create(model=model, messages=user(first), temperature=0.5, seed=7, user="somebody")
    say("whole", [whole.object, whole.model, whole.choices[0].finish_reason, whole.choices[0].message.role])
    say("content", whole.choices[0].message.content)
    say("usage", whole.usage.to_dict())
    say("request id", whole._request_id)
    parts = [{"role": "user", "content": [{"type": "text", "text": second}]}]
    listed = client.chat.completions.create(model=model, messages=parts, extra_body={"nobody_knows": True})
    say("of parts", listed.choices[0].message.content)
    raw = client.chat.completions.with_raw_response.create(model=model, messages=user(first))
    say("content type", raw.headers["content-type"])


def stream(model, text, *, key=KEY, **more):
    chunks = connect(key).chat.completions.create(model=model, messages=user(text), stream=True, **more)
    last = None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content is not None:
                say("piece", choice.delta.content)
            if choice.finish_reason:
                say("finish", choice.finish_reason)
        if chunk.usage:
            say("usage", chunk.usage.to_dict())
        last = chunk
    say("last", [last.object, last.model])


def ask(model, text):
    stream(model, text, stream_options={"include_usage": True})


def helped(model, text):
    """By the library's own helper, which puts the whole answer together."""
    with connect().chat.completions.stream(model=model, messages=user(text)) as events:
        for event in events:
            if event.type == "content.delta":
                say("piece", event.delta)
        say("content", events.get_final_completion().choices[0].message.content)


def remembered(model, conversation_id, first, second):
    client = connect()
    for text in (first, second):
        told = {"conversation_id": conversation_id}
        answer = client.chat.completions.create(model=model, messages=user(text), extra_body=told)
        say("content", answer.choices[0].message.content)


FORECAST = {
    "type": "function",
    "function": {
        "name": "forecast",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def tools(model, first, second):
    client = connect()
    whole = client.chat.completions.create(model=model, messages=user(first), tools=[FORECAST])
    say("calls", [call.to_dict() for call in whole.choices[0].message.tool_calls])
    say("finish", whole.choices[0].finish_reason)
    with client.chat.completions.stream(model=model, messages=user(first), tools=[FORECAST]) as events:
        for event in events:
            if event.type == "tool_calls.function.arguments.done":
                say("arguments", event.parsed_arguments or json.loads(event.arguments))
        streamed = events.get_final_completion().choices[0]
    say("streamed", [streamed.message.content, streamed.finish_reason])
    messages = user(first)
    messages.append(whole.choices[0].message.to_dict())
    for call in whole.choices[0].message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    messages += user(second)
    answer = client.chat.completions.create(model=model, messages=messages, tools=[FORECAST])
    say("content", answer.choices[0].message.content)


def choices(model, text):
    client = connect()
    form = {"type": "json_object"}
    whole = client.chat.completions.create(
        model=model, messages=user(text), n=2, logprobs=True, response_format=form, stop=["never"]
    )
    say("contents", [choice.message.content for choice in whole.choices])
    say("tokens", "".join(one.token for one in whole.choices[0].logprobs.content))
    contents = ["", ""]
    for chunk in client.chat.completions.create(model=model, messages=user(text), n=2, stream=True):
        for choice in chunk.choices:
            contents[choice.index] += choice.delta.content or ""
    say("streamed", contents)


def cut(model, text):
    say("raised", refusal(stream, model, text))


def errors(model, refused, poor_key):
    client = connect()
    complete = client.chat.completions.create
    say("no messages", refusal(complete, model=model, messages=[]))
    say("wrong type", refusal(complete, model=model, messages="hello"))
    say("wrong role", refusal(complete, model=model, messages=[{"role": "ferret", "content": "hello"}]))
    say("unknown model", refusal(client.models.retrieve, "nobody-knows"))
    say("unknown path", refusal(client.fine_tuning.jobs.list))
    say("provider down", refusal(complete, model=model, messages=user(refused)))
    say("provider down, streamed", refusal(stream, model, refused))
    say("wrong key", refusal(connect("wrong").models.list))
    say("no key", refusal(client.models.list, extra_headers={"Authorization": openai.Omit()}))
    say("wrong key, streamed", refusal(stream, model, "hello", key="wrong"))
    poor = connect(poor_key)
    poor.models.list()
    say("over the limit", refusal(poor.chat.completions.create, model=model, messages=user("fake?tokens=1")))


def project(url, text):
    """CustomGPT's way of being OpenAI's."""
    client = connect(url=url)
    whole = client.chat.completions.create(model="any", messages=user(text))
    say("content", whole.choices[0].message.content)
    say("usage", whole.usage.total_tokens > 0)
    for chunk in client.chat.completions.create(model="any", messages=user(text), stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            say("piece", chunk.choices[0].delta.content)
    nowhere = connect(url=url.rpartition("/projects/")[0] + "/projects/987654321")
    say("unknown project", refusal(nowhere.chat.completions.create, model="any", messages=user(text)))


def responses(model, first, second):
    client = connect()
    one = client.responses.create(model=model, input=first)
    say("first", [one.status, one.object, one.output_text])
    say("usage", one.usage.total_tokens == one.usage.input_tokens + one.usage.output_tokens > 0)
    two = client.responses.create(
        model=model, input=user(second), previous_response_id=one.id, instructions="Be brief."
    )
    say("second", [two.status, two.previous_response_id == one.id, two.output_text])
    say("got", client.responses.retrieve(one.id).output_text)
    say("items", [item.content[0].text for item in client.responses.input_items.list(one.id)])
    client.responses.delete(one.id)
    say("gone", refusal(client.responses.retrieve, one.id))


def responses_ask(model, text):
    events = connect().responses.create(model=model, input=text, stream=True)
    for event in events:
        say("event", event.type)
        if event.type == "response.output_text.delta":
            say("piece", event.delta)
        elif event.type == "response.completed":
            say("completed", event.response.output_text)
        elif event.type == "response.failed":
            say("failed", event.response.error.to_dict())


def responses_resumed(model, text):
    """A background answer, whose stream is left and taken up again."""
    client = connect()
    events = client.responses.create(model=model, input=text, stream=True, background=True)
    response_id = position = None
    for event in events:
        if event.type == "response.created":
            response_id = event.response.id
        position = event.sequence_number
        if event.type == "response.output_text.delta":
            say("piece", event.delta)
            if len(event.delta.strip()) > 0:
                break
    events.close()
    say("left", response_id)
    for event in client.responses.retrieve(response_id, stream=True, starting_after=position):
        say("order", event.sequence_number > position)
        position = event.sequence_number
        if event.type == "response.output_text.delta":
            say("piece", event.delta)
        elif event.type == "response.completed":
            say("completed", event.response.output_text)


def responses_cancelled(model, text):
    client = connect()
    made = client.responses.create(model=model, input=text, background=True)
    say("made", [made.id, made.status])
    say("asked", client.responses.cancel(made.id).status)
    response = client.responses.retrieve(made.id)
    while response.status in ("queued", "in_progress"):
        time.sleep(0.1)
        response = client.responses.retrieve(made.id)
    say("ended", response.status)


def conversations(model, first, second):
    client = connect()
    made = client.conversations.create(metadata={"topic": "ferrets"})
    say("made", [made.id, made.object, made.metadata])
    for text in (first, second):
        answer = client.responses.create(model=model, input=text, conversation=made.id)
        say("answer", answer.output_text)
    say("again", client.conversations.retrieve(made.id).metadata)
    say("updated", client.conversations.update(made.id, metadata={"topic": "polecats"}).metadata)
    items = list(client.conversations.items.list(made.id, order="asc"))
    say("items", [[item.role, item.content[0].text] for item in items])
    page = client.conversations.items.list(made.id, limit=1)
    say("pages", sum(len(one.data) for one in page.iter_pages()))
    say("item", client.conversations.items.retrieve(items[0].id, conversation_id=made.id).content[0].text)


def conversations_deleted(conversation_id):
    client = connect()
    say("deleted", client.conversations.delete(conversation_id).deleted)
    say("gone", refusal(client.conversations.retrieve, conversation_id))


def responses_errors(model, refused):
    client = connect()
    say("unknown response", refusal(client.responses.retrieve, "resp_nobody"))
    say("unknown conversation", refusal(client.conversations.retrieve, "conv_nobody"))
    say("no input", refusal(client.responses.create, model=model))
    say("unknown previous", refusal(client.responses.create, model=model, input="hi", previous_response_id="resp_no"))
    say("provider down", refusal(client.responses.create, model=model, input=refused))
    say("wrong key", refusal(connect("wrong").responses.create, model=model, input="hello"))


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    globals()[scenario](*arguments)
