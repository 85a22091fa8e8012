"""Uses both clients of ablt-python-api, and says what it saw: use_ablt_python_api.py SCENARIO sync|async ARGUMENT…

What the asynchronous client gives is read in the same order as what the synchronous one gives.
"""

import asyncio
import json
import logging
import os
import sys
from datetime import UTC, datetime

from ablt_python_api import ABLTApi, ABLTApi_async, DoneException


class Complaints(logging.Handler):
    """What the library tells its users of errors, it only logs."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


logger = logging.getLogger("ablt")
complaints = Complaints()
logger.addHandler(complaints)
logger.propagate = False


def say(step, value):
    print(json.dumps([step, value]), flush=True)


def connect(kind, key=None):
    api = ABLTApi_async if kind == "async" else ABLTApi
    return api(
        bearer_token=os.environ["PARLEY_KEY"] if key is None else key,
        base_api_url=os.environ["PARLEY_URL"],
        logger=logger,
    )


def value(result):
    """Of the synchronous client the result itself, of the asynchronous one what it gives when awaited."""
    return loop.run_until_complete(result) if asyncio.iscoroutine(result) else result


def pieces(answer):
    """An answer's pieces, of either client's generators, to its end or to the exception that says that it is done."""
    if hasattr(answer, "__anext__"):
        while True:
            try:
                yield loop.run_until_complete(anext(answer))
            except StopAsyncIteration:
                return
    yield from answer


def tell(answer):
    try:
        for piece in pieces(answer):
            say("piece", piece)
    except DoneException:
        say("done", True)


def complained(answer):
    """What an answer that is refused leaves in the log."""
    complaints.lines.clear()
    got = list(pieces(answer))
    return {"pieces": got, "log": list(complaints.lines)}


def bots(kind, slug):
    api = connect(kind)
    say("healthy", value(api.health_check()))
    say("bots", value(api.get_bots()))
    found = value(api.find_bot_by_slug(slug))
    say("by slug", found)
    say("by uid", value(api.find_bot_by_uid(found["uid"])))
    say("by name", value(api.find_bot_by_name(found["name"])))
    say("unknown", value(api.find_bot_by_slug("nobody")))


def chat(kind, slug, uid, first, second):
    api = connect(kind)
    say("whole", list(pieces(api.chat(bot_slug=slug, prompt=first, stream=False, user_id=7))))
    messages = [
        {"role": "system", "content": "You are a ferret."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": second},
    ]
    say("by messages", list(pieces(api.chat(bot_uid=uid, messages=messages, stream=False, max_words=5))))
    tell(api.chat(bot_slug=slug, prompt=second, stream=True, language="English", use_search=True))


def ask(kind, slug, prompt):
    tell(connect(kind).chat(bot_slug=slug, prompt=prompt, stream=True))


def cut(kind, slug, prompt):
    try:
        tell(connect(kind).chat(bot_slug=slug, prompt=prompt, stream=True))
    except Exception as error:
        say("raised", type(error).__name__)


def usage(kind):
    api = connect(kind)
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    say("usage", value(api.get_usage_statistics(start_date=today, end_date=today)))
    say("of a day", value(api.get_statistics_for_a_day(date=today)))
    say("total", value(api.get_statistics_total(start_date=today, end_date=today)))
    say("today", today)


def errors(kind, slug, refused, poor_key):
    api = connect(kind)
    say("unknown bot", complained(api.chat(bot_slug="nobody", prompt="hello", stream=True)))
    say("wrong type", complained(api.chat(bot_slug=slug, prompt={"no": "text"}, stream=True)))
    say("no stream", complained(api.chat(bot_slug=slug, prompt="hello", stream=None)))
    say("no list", complained(api.chat(bot_slug=slug, messages="hello")))
    say("provider down", complained(api.chat(bot_slug=slug, prompt=refused, stream=True)))
    say("wrong key", complained(connect(kind, "wrong").chat(bot_slug=slug, prompt="hello")))
    say("no key", complained(connect(kind, "").chat(bot_slug=slug, prompt="hello")))
    say("no bots", value(connect(kind, "wrong").get_bots()))
    poor = connect(kind, poor_key)
    value(poor.get_bots())
    say("over the limit", complained(poor.chat(bot_slug=slug, prompt="fake?tokens=1")))


if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    scenario, *arguments = sys.argv[1:]
    globals()[scenario](*arguments)
