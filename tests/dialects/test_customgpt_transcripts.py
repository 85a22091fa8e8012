"""Whole exchanges with the CustomGPT.ai API, byte for byte, as its golden transcripts have them."""

from collections.abc import AsyncIterator

import pytest

from tests.dialects.customgpt import UNKNOWN_SESSION, Account, form, opened_account, saying
from tests.dialects.transcripts import Recorder, read_until
from tests.fakes.script import token
from tests.stack.services import Stack

AGENT = "customgpt/1"
CATS = b"# Cats\n\nCats purr when they are content."


@pytest.fixture
async def account(house: Stack) -> AsyncIterator[Account]:
    async with opened_account(house) as account:
        yield account


async def test_life_of_a_chat(account: Account, house: Stack) -> None:
    said = Recorder(account.session, "customgpt/chat")
    await said.send("POST", "/api/v1/projects", {"project_name": "Guide"}, User_Agent=AGENT)
    made = await said.send("POST", "/api/v1/projects/1/conversations", {"name": "Talk"})
    talk = f"/api/v1/projects/1/conversations/{made.json()['data']['session_id']}"
    prompt = saying("customgpt-streamed", tokens=4, hold_after=0).model
    gate = house.upstream.gate("customgpt-streamed")
    # A stream begins with its first text.
    await gate.allow(1)
    url = f"{talk}/messages?stream=true&lang=en"
    async with said.stream("POST", url, {"prompt": prompt}, User_Agent=AGENT) as (heard, response):
        for place in range(4):
            await read_until(heard, response, f'"message":"{token(place, "customgpt-streamed")}"}}'.encode())
            await gate.allow(1)
        await gate.open()
        heard.body += await response.read()
    whole = {"prompt": saying("customgpt-whole").model, "stream": 0, "lang": "en"}
    await said.send("POST", f"{talk}/messages?external_id=ext-1", whole, User_Agent=AGENT)
    await said.send("PUT", f"{talk}/messages/2/feedback", {"reaction": "liked"})
    await said.send("GET", f"{talk}/messages/1")
    await said.send("GET", f"{talk}/messages?page=1&order=desc")
    await said.send("PUT", talk, {"name": "Better talk"})
    await said.send("GET", "/api/v1/projects/1/conversations?page=1")
    await said.send("DELETE", talk)
    await said.send("DELETE", "/api/v1/projects/1")
    said.check()


async def test_what_a_project_answers_from(account: Account) -> None:
    said = Recorder(account.session, "customgpt/sources")
    body, content_type = form({"project_name": "Cats", "is_ocr_enabled": "false"}, file=("cats.md", CATS))
    await said.send("POST", "/api/v1/projects", body, Content_Type=content_type)
    await account.settled({"id": 1}, 1)
    body, content_type = form({"sitemap_path": "https://example.invalid/sitemap.xml"})
    await said.send("POST", "/api/v1/projects/1/sources", body, Content_Type=content_type)
    await account.settled({"id": 1}, 2)
    settings = {"data_refresh_frequency": "daily", "refresh_schedule": [{"days": [1], "hours": ["08:00"]}]}
    await said.send("PUT", "/api/v1/projects/1/sources/2", settings)
    await said.send("GET", "/api/v1/projects/1/sources")
    await said.send("GET", "/api/v1/projects/1/pages?limit=1")
    await said.send("PUT", "/api/v1/projects/1/pages/1/metadata", {"title": "All about cats", "image": None})
    await said.send("GET", "/api/v1/projects/1/citations/1")
    await said.send("POST", "/api/v1/projects/1/pages/1/reindex")
    await said.send("DELETE", "/api/v1/projects/1/pages/1")
    await said.send("DELETE", "/api/v1/projects/1/sources/2")
    said.check()


async def test_settings_of_a_project_and_the_account(account: Account) -> None:
    said = Recorder(account.session, "customgpt/settings")
    await account.project()
    body, content_type = form({"persona_instructions": "You are a pirate.", "example_questions[0]": "Why?"})
    await said.send("POST", "/api/v1/projects/1/settings", body, Content_Type=content_type)
    await said.send("GET", "/api/v1/projects/1/settings")
    await said.send("POST", "/api/v1/projects/1/replicate")
    await said.send("GET", "/api/v1/projects/1/stats")
    await said.send("GET", "/api/v1/projects?page=1")
    await said.send("GET", "/api/v1/user")
    await said.send("GET", "/api/v1/limits/usage")
    said.check()


async def test_chat_completions(account: Account, house: Stack) -> None:
    said = Recorder(account.session, "customgpt/completions")
    await account.project()
    url = "/api/v1/projects/1/chat/completions"
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": saying("customgpt-completion").model}]}
    await said.send("POST", url, body)
    prompt = saying("customgpt-chunks", hold_after=0).model
    streamed = {"model": "gpt-4", "messages": [{"role": "user", "content": prompt}], "stream": True}
    gate = house.upstream.gate("customgpt-chunks")
    await gate.allow(1)
    async with said.stream("POST", url, streamed) as (heard, response):
        for place in range(3):
            await read_until(heard, response, f'"content":"{token(place, "customgpt-chunks")}"'.encode())
            await gate.allow(1)
        await gate.open()
        heard.body += await response.read()
    parts = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    await said.send("POST", url, {"messages": [{"role": "user", "content": parts}]})
    said.check()


async def test_refusals(account: Account) -> None:
    said = Recorder(account.session, "customgpt/refusals")
    made = await account.conversation(await account.project())
    talk = f"/api/v1/projects/1/conversations/{made['session_id']}"
    await said.send("GET", "/api/v1/projects", Authorization="")
    await said.send("GET", "/api/v1/projects", Authorization="Bearer of-nobody")
    await said.send("GET", "/api/v1/projects/one")
    await said.send("GET", "/api/v1/projects/7")
    await said.send("POST", "/api/v1/projects", {"project_name": ""})
    await said.send("GET", f"/api/v1/projects/1/conversations/{UNKNOWN_SESSION}/messages")
    await said.send("GET", f"{talk}/messages/7")
    await said.send("POST", f"{talk}/messages", b"{")
    await said.send("POST", f"{talk}/messages", {"stream": True})
    await said.send("POST", f"{talk}/messages", {"prompt": 7})
    await said.send("PUT", f"{talk}/messages/1/feedback", {"reaction": "loved"})
    await said.send("POST", f"{talk}/messages?stream=1", {"prompt": saying("customgpt-refused", status=400).model})
    await said.send("GET", "/api/v1/projects/1/pages/7/metadata")
    await said.send("PUT", "/api/v1/projects/1/sources/7/instant-sync")
    await said.send("POST", "/api/v1/projects/1/sources", {})
    await said.send("GET", "/api/v1/projects/1/reports/traffic")
    await said.send("GET", "/api/v1/projects/1/nothing")
    await said.send("PATCH", "/api/v1/projects/1", {})
    said.check()
