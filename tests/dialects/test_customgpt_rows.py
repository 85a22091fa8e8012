"""Every row of the description of CustomGPT.ai's API, on a real house: named after its method and path."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.cores.event_stream import read
from tests.dialects.customgpt import DEADLINE_S, Account, Json, opened_account, saying
from tests.stack.services import Stack

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
CATS = b"# Cats\n\nCats purr when they are content. A cat sleeps for sixteen hours a day."

PROJECT_FIELDS = {
    "id", "project_name", "sitemap_path", "is_chat_active", "user_id", "team_id", "created_at", "updated_at",
    "deleted_at", "type", "is_shared", "shareable_slug", "shareable_link", "embed_code", "live_chat_code",
    "are_licenses_allowed", "subdomain_slug",
}  # fmt: skip
CONVERSATION_FIELDS = {
    "id", "name", "project_id", "created_by", "session_id", "created_at", "updated_at", "deleted_at",
}  # fmt: skip
MESSAGE_FIELDS = {
    "id", "user_id", "user_query", "openai_response", "created_at", "updated_at", "conversation_id", "citations",
    "metadata", "response_feedback",
}  # fmt: skip
PAGE_FIELDS = {
    "id", "page_url", "page_url_hash", "project_id", "s3_path", "crawl_status", "index_status", "is_file",
    "is_refreshable", "is_file_kept", "filename", "filesize", "created_at", "updated_at", "deleted_at",
}  # fmt: skip


@pytest.fixture
async def account(house: Stack) -> AsyncIterator[Account]:
    async with opened_account(house) as account:
        yield account


def check_times(resource: Json) -> None:
    assert TIME.fullmatch(resource["created_at"])
    assert TIME.fullmatch(resource["updated_at"])


async def test_get_projects(account: Account) -> None:
    empty = await account.call("GET", "/projects")
    assert (empty["data"], empty["total"], empty["from"], empty["to"], empty["last_page"]) == ([], 0, None, None, 1)
    made = [await account.project(f"Guide {place}") for place in range(12)]
    first = await account.call("GET", "/projects")
    assert first["data"] == made[:1:-1]
    path = first["path"]
    assert urlsplit(path).path == "/api/v1/projects"
    assert {name: value for name, value in first.items() if name != "data"} == {
        "current_page": 1,
        "first_page_url": f"{path}?page=1",
        "from": 1,
        "last_page": 2,
        "last_page_url": f"{path}?page=2",
        "next_page_url": f"{path}?page=2",
        "path": path,
        "per_page": 10,
        "prev_page_url": None,
        "to": 10,
        "total": 12,
    }
    async with account.session.get(first["next_page_url"]) as response:
        second = (await response.json())["data"]
    assert (second["data"], second["from"], second["to"]) == (made[1::-1], 11, 12)
    assert (second["prev_page_url"], second["next_page_url"]) == (f"{path}?page=1", None)
    oldest = await account.call("GET", "/projects?order=asc&orderBy=created_at&page=1&width=50rem&duration=90")
    assert oldest["data"] == made[:10]
    assert (await account.call("GET", "/projects?name=GUIDE 1&order=asc"))["data"] == [made[1], *made[10:]]
    beyond = await account.call("GET", "/projects?page=7")
    assert (beyond["data"], beyond["from"], beyond["total"], beyond["next_page_url"]) == ([], None, 12, None)


async def test_post_projects(account: Account) -> None:
    made = await account.project("Guide")
    assert set(made) == PROJECT_FIELDS
    check_times(made)
    assert (made["id"], made["project_name"], made["sitemap_path"]) == (1, "Guide", None)
    assert (made["is_chat_active"], made["is_shared"], made["deleted_at"]) == (True, False, None)
    assert await account.call("GET", "/projects/1") == made


async def test_post_projects_by_a_form_with_a_file(account: Account) -> None:
    fields = {"project_name": "Cats", "is_ocr_enabled": "false", "is_anonymized": "true"}
    status, document = await account.post_form("/projects", fields, file=("cats.md", CATS))
    assert (status, document["data"]["project_name"]) == (201, "Cats")
    listed = await account.call("GET", f"/projects/{document['data']['id']}/pages")
    [page] = listed["pages"]["data"]
    assert (page["filename"], page["filesize"], page["is_file"]) == ("cats.md", len(CATS), True)


async def test_post_projects_by_a_form_with_a_sitemap(account: Account) -> None:
    address = "https://example.invalid/sitemap.xml"
    status, document = await account.post_form("/projects", {"project_name": "Site", "sitemap_path": address})
    assert status == 201
    assert (document["data"]["sitemap_path"], document["data"]["type"]) == (address, "SITEMAP")
    sources = await account.call("GET", f"/projects/{document['data']['id']}/sources")
    [sitemap] = sources["sitemaps"]
    assert (sitemap["type"], sitemap["settings"]["sitemap_path"]) == ("sitemap", address)
    page = await account.project("Page", sitemap_path="https://example.invalid/about")
    assert (page["sitemap_path"], page["type"]) == ("https://example.invalid/about", "URL")


async def test_get_projects_id(account: Account) -> None:
    made = await account.project()
    assert await account.call("GET", f"/projects/{made['id']}?width=100%25&height=auto") == made


async def test_post_projects_id(account: Account) -> None:
    made = await account.project()
    status, document = await account.post_form("/projects/1", {"project_name": "Better", "is_shared": "true"})
    assert status == 200
    assert document["data"] == {
        **made,
        "project_name": "Better",
        "is_shared": True,
        "updated_at": document["data"]["updated_at"],
    }
    status, document = await account.post_form("/projects/1", file=("cats.md", CATS))
    assert (status, document["data"]["project_name"], document["data"]["is_shared"]) == (200, "Better", True)
    assert (await account.call("GET", "/projects/1/pages"))["pages"]["total"] == 1


async def test_delete_projects_id(account: Account) -> None:
    made = await account.project()
    assert await account.call("DELETE", f"/projects/{made['id']}") == {"deleted": True}
    assert await account.refusal(404, "GET", "/projects/1") == "Agent with id 1 not found"
    assert (await account.project())["id"] == 2


async def test_post_projects_id_replicate(account: Account) -> None:
    made = await account.project(sitemap_path="https://example.invalid/about")
    await account.upload(made, "cats.md", CATS)
    copy = await account.call("POST", f"/projects/{made['id']}/replicate", status=201)
    assert copy == {**made, "id": 2, "created_at": copy["created_at"], "updated_at": copy["updated_at"]}
    assert (await account.call("GET", "/projects/2/pages"))["pages"]["total"] == 2


async def test_get_projects_id_stats(account: Account, tag: str) -> None:
    conversation, _ = await account.chat()
    await account.upload({"id": 1}, "cats.md", CATS)
    await account.ask(conversation, saying(tag).model)
    await account.project("Another")
    stats = await account.call("GET", "/projects/1/stats")
    words = stats["total_words_indexed"]
    assert words >= 10
    assert stats == {
        "pages_found": 1,
        "pages_crawled": 1,
        "pages_indexed": 1,
        "crawl_credits_used": 1,
        "query_credits_used": 1,
        "total_queries": 1,
        "total_words_indexed": words,
        "total_storage_credits_used": words,
    }
    assert (await account.call("GET", "/projects/2/stats"))["total_queries"] == 0


async def test_get_projects_id_settings(account: Account) -> None:
    await account.project()
    settings = await account.call("GET", "/projects/1/settings")
    assert (settings["response_source"], settings["enable_citations"], settings["example_questions"]) == (
        "default",
        3,
        [],
    )
    assert (settings["persona_instructions"], settings["chatbot_model"]) == (None, None)


async def test_post_projects_id_settings(account: Account, house: Stack, tag: str) -> None:
    conversation, _ = await account.chat()
    before = await account.call("GET", "/projects/1/settings")
    fields = {
        "persona_instructions": "You are a pirate.",
        "chatbot_model": "gpt-4-o",
        "example_questions[0]": "Why?",
        "example_questions[1]": "How?",
        "is_loading_indicator_enabled": "false",
        "enable_citations": "1",
        "default_prompt": "Ahoy",
    }
    assert await account.post_form("/projects/1/settings", fields) == (
        200,
        {"status": "success", "data": {"updated": True}},
    )
    changed = {
        "persona_instructions": "You are a pirate.",
        "chatbot_model": "gpt-4-o",
        "example_questions": ["Why?", "How?"],
        "is_loading_indicator_enabled": False,
        "enable_citations": 1,
        "default_prompt": "Ahoy",
    }
    assert await account.call("GET", "/projects/1/settings") == {**before, **changed}
    await account.ask(conversation, saying(tag).model)
    [asked] = house.upstream.requests(tag)
    assert (asked.body["model"], asked.messages[0]["content"]) == ("fake", "You are a pirate.")
    # A model that there is answers from now on; an empty field is none.
    fields = {"persona_instructions": "", "chatbot_model": "fake"}
    assert (await account.post_form("/projects/1/settings", fields))[0] == 200
    changed |= {"persona_instructions": None, "chatbot_model": "fake"}
    assert await account.call("GET", "/projects/1/settings") == {**before, **changed}
    async with account.session.get("/chat/v1/chatbots/1") as response:
        assert (await response.json())["model"] == "fake"
    await account.ask(conversation, saying(f"{tag}x").model)
    [asked] = house.upstream.requests(f"{tag}x")
    assert asked.messages[0]["role"] == "user"


async def test_settings_that_many_change_at_once_are_all_changed(account: Account) -> None:
    await account.project()
    told = {"default_prompt": "Hi", "chatbot_color": "#123456", "ending_message": "Bye", "persona_instructions": "Be."}
    async with asyncio.TaskGroup() as group:
        for name, value in told.items():
            group.create_task(account.call("POST", "/projects/1/settings", {name: value}))
        group.create_task(account.post_form("/projects/1", {"is_shared": "true"}))
    settings = await account.call("GET", "/projects/1/settings")
    assert {name: settings[name] for name in told} == told
    assert (await account.call("GET", "/projects/1"))["is_shared"]


async def test_post_conversations(account: Account) -> None:
    project = await account.project()
    made = await account.conversation(project, "First")
    assert set(made) == CONVERSATION_FIELDS
    check_times(made)
    assert (made["id"], made["name"], made["project_id"], made["deleted_at"]) == (1, "First", 1, None)
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["session_id"])
    async with account.session.post("/api/v1/projects/1/conversations", data=b"") as response:
        assert (response.status, (await response.json())["data"]["name"]) == (201, "")
    long = "a" * 255
    assert (await account.conversation(project, long))["name"] == long


async def test_get_conversations(account: Account) -> None:
    project = await account.project()
    made = [await account.conversation(project, f"Talk {place}") for place in range(11)]
    await account.conversation(await account.project("Another"))
    newest = await account.call("GET", "/projects/1/conversations?orderBy=id&userFilter=all")
    assert (newest["data"], newest["per_page"], newest["total"]) == (made[:0:-1], 10, 11)
    rest = await account.call("GET", "/projects/1/conversations?page=2")
    assert rest["data"] == made[:1]
    oldest = await account.call("GET", "/projects/1/conversations?order=asc")
    assert oldest["data"] == made[:10]
    found = await account.call("GET", "/projects/1/conversations?name=talk 1")
    assert found["data"] == [made[10], made[1]]
    assert (await account.call("GET", "/projects/1/conversations?userFilter=me"))["total"] == 11
    assert (await account.call("GET", "/projects/1/conversations?userFilter=anonymous"))["total"] == 0


async def test_put_conversations_session(account: Account) -> None:
    conversation = await account.conversation(await account.project())
    path = f"/projects/1/conversations/{conversation['session_id']}"
    renamed = await account.call("PUT", path, {"name": "Better"})
    assert renamed == {**conversation, "name": "Better", "updated_at": renamed["updated_at"]}
    long = "b" * 255
    assert (await account.call("PUT", path, {"name": long}))["name"] == long
    assert (await account.call("PUT", path, {"name": "Short"}))["name"] == "Short"
    assert (await account.call("PUT", path))["name"] == "Short"


async def test_delete_conversations_session(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    await account.ask(conversation, saying(tag).model)
    path = messages.removesuffix("/messages")
    assert await account.call("DELETE", path) == {"deleted": True}
    gone = f"Conversation with session id {conversation['session_id']} not found"
    assert await account.refusal(404, "GET", messages) == gone
    assert (await account.call("GET", "/projects/1/conversations"))["total"] == 0


async def test_get_conversations_session_messages(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    sent = [await account.ask(conversation, saying(f"{tag}{place}").model) for place in range(3)]
    newest = await account.call("GET", messages)
    assert set(newest) == {"conversation", "messages"}
    assert newest["conversation"] == {**conversation, "updated_at": newest["conversation"]["updated_at"]}
    assert (newest["messages"]["data"], newest["messages"]["per_page"]) == (sent[::-1], 20)
    oldest = await account.call("GET", f"{messages}?order=asc&page=1")
    assert (oldest["messages"]["data"], oldest["messages"]["total"]) == (sent, 3)


async def test_post_conversations_session_messages(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    script = saying(tag)
    sent = await account.call("POST", f"{messages}?stream=0&lang=en&external_id=ext-1", {"prompt": script.model})
    assert set(sent) == MESSAGE_FIELDS
    check_times(sent)
    assert (sent["id"], sent["user_query"], sent["openai_response"]) == (1, script.model, script.text)
    assert (sent["conversation_id"], sent["citations"], sent["response_feedback"]) == (conversation["id"], [], None)
    agent = sent["metadata"].pop("user_agent")
    assert "aiohttp" in agent
    assert sent["metadata"] == {"user_ip": None, "external_id": "ext-1", "request_source": "api"}
    again = await account.ask(conversation, saying(f"{tag}x").model)
    assert (again["id"], again["openai_response"]) == (2, saying(f"{tag}x").text)


async def test_post_conversations_session_messages_streamed(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    script = saying(tag, tokens=20)
    start, empty, *progress, finish = await account.stream(f"{messages}?stream=1&lang=en", {"prompt": script.model})
    assert start == {"status": "start", "prompt": script.model}
    assert empty == {"status": "progress", "message": ""}
    assert {event["status"] for event in progress} == {"progress"}
    assert "".join(event["message"] for event in progress) == script.text
    [stored] = (await account.call("GET", messages))["messages"]["data"]
    assert finish == {
        "status": "finish",
        "id": stored["id"],
        "created_at": stored["created_at"],
        "session_id": conversation["session_id"],
        "citations": [],
    }
    assert (stored["user_query"], stored["openai_response"]) == (script.model, script.text)


@pytest.mark.parametrize(
    ("query", "body", "is_stream"),
    [
        ("", {}, False),
        ("?stream=true", {}, True),
        ("?stream=false", {"stream": True}, False),
        ("?stream=0", {"stream": 1}, False),
        ("?stream=1", {"stream": False}, True),
        ("", {"stream": 1}, True),
        ("", {"stream": "true"}, True),
        ("", {"stream": 0}, False),
    ],
)
async def test_stream_is_asked_for_in_the_query_or_in_the_body_and_the_query_wins(
    account: Account, tag: str, query: str, body: Json, is_stream: bool
) -> None:
    _, messages = await account.chat()
    sent = {"prompt": saying(tag).model, **body}
    async with account.session.post(f"/api/v1{messages}{query}", json=sent) as response:
        await response.read()
    assert (response.status, response.content_type) == (200, "text/event-stream" if is_stream else "application/json")


async def test_persona_and_source_of_a_message_are_for_this_message_alone(
    account: Account, house: Stack, tag: str
) -> None:
    conversation, _ = await account.chat()
    await account.post_form("/projects/1/settings", {"persona_instructions": "You are a pirate."})
    await account.ask(conversation, saying(f"{tag}1").model, custom_persona="You are a poet.", chatbot_model="gpt-4")
    await account.ask(conversation, saying(f"{tag}2").model, response_source="own_content", lang="fr")
    await account.ask(conversation, saying(f"{tag}3").model, response_source="default", custom_persona=None)
    first, second, third = (house.upstream.requests(f"{tag}{place}")[0] for place in (1, 2, 3))
    assert first.messages[0] == {"role": "system", "content": "You are a poet."}
    assert first.body["model"] == "fake"
    assert second.messages[0]["content"].startswith("You are a pirate.\n\nAnswer from what your sources say alone.")
    assert third.messages[0] == {"role": "system", "content": "You are a pirate."}
    assert [message["role"] for message in third.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]


async def test_source_of_a_project_is_that_of_its_messages_and_completions(
    account: Account, house: Stack, tag: str
) -> None:
    conversation, _ = await account.chat()
    await account.post_form("/projects/1/settings", {"response_source": "openai_content"})
    await account.ask(conversation, saying(f"{tag}1").model)
    await account.ask(conversation, saying(f"{tag}2").model, response_source="own_content")
    body = {"messages": [{"role": "user", "content": saying(f"{tag}3").model}]}
    async with account.session.post("/api/v1/projects/1/chat/completions", json=body) as response:
        assert response.status == 200
    told = [house.upstream.requests(f"{tag}{place}")[0].messages[0] for place in (1, 2, 3)]
    assert [message["role"] for message in told] == ["system"] * 3
    assert told[0] == told[2]
    assert told[0]["content"].endswith("answer from what you know yourself.")
    assert told[1]["content"].startswith("Answer from what your sources say alone.")


async def test_message_may_name_a_model_that_there_is(account: Account, house: Stack, tag: str) -> None:
    conversation, _ = await account.chat()
    async with account.session.patch("/chat/v1/chatbots/1", json={"model": "goes-on"}) as response:
        assert response.status == 200
    await account.ask(conversation, saying(f"{tag}1").model)
    await account.ask(conversation, saying(f"{tag}2").model, chatbot_model="fake")
    first, second = (house.upstream.requests(f"{tag}{place}")[0] for place in (1, 2))
    assert (first.body["model"], second.body["model"]) == ("goes-on", "fake")


async def test_message_sent_again_with_its_key_is_the_same_message(account: Account, house: Stack, tag: str) -> None:
    conversation, messages = await account.chat()
    sent = {"prompt": saying(tag).model}
    headers = {"Idempotency-Key": tag}
    first = await account.call("POST", messages, sent, headers=headers)
    again = await account.call("POST", messages, sent, headers=headers)
    assert first == again
    assert len(house.upstream.requests(tag)) == 1
    assert (await account.call("GET", messages))["messages"]["total"] == 1
    assert await account.refusal(409, "POST", messages, {"prompt": "other"}, headers=headers)
    assert conversation["id"] == first["conversation_id"]


async def test_message_in_a_busy_conversation_is_answered_afterwards(account: Account, house: Stack, tag: str) -> None:
    conversation, messages = await account.chat()
    held = saying(tag, hold_after=1)
    async with (
        asyncio.TaskGroup() as group,
        account.session.post(f"/api/v1{messages}?stream=1", json={"prompt": held.model}) as streaming,
    ):
        await house.upstream.wait_written(tag, 1)
        second = group.create_task(account.ask(conversation, saying(f"{tag}2").model))
        async with asyncio.timeout(DEADLINE_S):
            while (await account.call("GET", messages))["messages"]["total"] < 2:
                await asyncio.sleep(0.02)
        assert not house.upstream.requests(f"{tag}2")
        await house.upstream.gate(tag).open()
        assert b'"status":"finish"' in await streaming.read()
    assert (await second)["openai_response"] == saying(f"{tag}2").text


async def test_get_conversations_session_messages_prompt(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    sent = await account.ask(conversation, saying(tag).model)
    assert await account.call("GET", f"{messages}/{sent['id']}") == sent
    assert await account.refusal(404, "GET", f"{messages}/2") == "Conversation message with id 2 not found"


async def test_put_conversations_session_messages_prompt_feedback(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    sent = await account.call("POST", f"{messages}?external_id=me", {"prompt": saying(tag).model})
    rated = await account.call("PUT", f"{messages}/{sent['id']}/feedback", {"reaction": "liked"})
    feedback = rated["response_feedback"]
    check_times(feedback)
    assert rated == {**sent, "response_feedback": feedback}
    assert (feedback["reaction"], set(feedback)) == ("liked", {"created_at", "updated_at", "user_id", "reaction"})
    again = await account.call("PUT", f"{messages}/{sent['id']}/feedback", {"reaction": "neutral"})
    assert again["response_feedback"]["reaction"] == "neutral"
    assert again["response_feedback"]["created_at"] == feedback["created_at"]
    assert (await account.call("GET", messages))["messages"]["data"] == [again]
    assert conversation["id"] == sent["conversation_id"]


async def test_get_projects_id_sources(account: Account) -> None:
    project = await account.project(sitemap_path="https://example.invalid/sitemap.xml")
    empty = (await account.call("GET", "/projects/1/sources"))["uploads"]
    assert (empty["type"], empty["settings"], empty["pages"], empty["id"]) == ("upload", {}, [], 0)
    check_times(empty)
    await account.upload(project, "cats.md", CATS)
    await account.upload(project, "dogs.txt", b"Dogs bark.")
    sources = await account.call("GET", "/projects/1/sources")
    assert set(sources) == {"sitemaps", "uploads"}
    [sitemap] = sources["sitemaps"]
    check_times(sitemap)
    assert set(sitemap) == {"id", "created_at", "updated_at", "type", "settings", "pages"}
    assert sitemap["settings"] == {
        "executive_js": True,
        "data_refresh_frequency": "never",
        "create_new_pages": True,
        "remove_unexist_pages": True,
        "refresh_existing_pages": "never",
        "sitemap_path": "https://example.invalid/sitemap.xml",
    }
    [page] = sitemap["pages"]
    assert (page["id"], page["page_url"], page["is_file"]) == (1, "https://example.invalid/sitemap.xml", False)
    assert [page["filename"] for page in sources["uploads"]["pages"]] == ["cats.md", "dogs.txt"]


async def test_post_projects_id_sources(account: Account) -> None:
    await account.project()
    fields = {"file_data_retension": "true", "is_ocr_enabled": "false"}
    status, document = await account.post_form("/projects/1/sources", fields, file=("cats.md", CATS))
    assert (status, document["data"]["type"], document["data"]["settings"]) == (201, "upload", {})
    address = "https://example.invalid/about"
    status, document = await account.post_form("/projects/1/sources", {"sitemap_path": address})
    assert (status, document["data"]["type"], document["data"]["settings"]["sitemap_path"]) == (201, "sitemap", address)
    assert await account.refusal(400, "POST", "/projects/1/sources") == "Sitemap URL is empty"


async def test_put_projects_id_sources_sid(account: Account) -> None:
    await account.project(sitemap_path="https://example.invalid/sitemap.xml")
    schedule = [{"days": [0, 4], "hours": ["00:00", "23:45"]}]
    told = {"executive_js": False, "data_refresh_frequency": "advanced", "refresh_schedule": schedule}
    changed = await account.call("PUT", "/projects/1/sources/1", told, status=201)
    assert {name: changed["settings"][name] for name in told} == told
    again = await account.call("PUT", "/projects/1/sources/1", {"refresh_existing_pages": "always"}, status=201)
    assert again["settings"] == {**changed["settings"], "refresh_existing_pages": "always"}
    [sitemap] = (await account.call("GET", "/projects/1/sources"))["sitemaps"]
    assert sitemap["settings"] == again["settings"]
    assert await account.refusal(404, "PUT", "/projects/1/sources/9", told) == "Project source with id 9 not found"


async def test_put_projects_id_sources_sid_instant_sync(account: Account) -> None:
    project = await account.project(sitemap_path="https://example.invalid/sitemap.xml")
    await account.settled(project, 1)
    synced = await account.call("PUT", "/projects/1/sources/1/instant-sync", status=201)
    assert (synced["id"], synced["type"], synced["pages"][0]["crawl_status"]) == (1, "sitemap", "queued")
    page = await account.upload(project, "cats.md", CATS)
    path = f"/projects/1/sources/{page['id']}/instant-sync"
    assert await account.refusal(403, "PUT", path) == "Agent source can't be synced"


async def test_delete_projects_id_sources_sid(account: Account) -> None:
    await account.project(sitemap_path="https://example.invalid/sitemap.xml")
    assert await account.call("DELETE", "/projects/1/sources/1") == {"deleted": True}
    assert (await account.call("GET", "/projects/1/sources"))["sitemaps"] == []
    assert await account.refusal(404, "DELETE", "/projects/1/sources/1") == "Project source with id 1 not found"


async def test_get_projects_id_pages(account: Account) -> None:
    project = await account.project()
    made = [await account.upload(project, f"cats-{place}.md", CATS + bytes([65 + place])) for place in range(3)]
    bad = await account.post_form("/projects/1/sources", {"sitemap_path": "https://example.invalid/about"})
    failed = await account.settled(project, bad[1]["data"]["id"])
    listed = await account.call("GET", "/projects/1/pages")
    assert listed["project"] == project
    assert (listed["pages"]["data"], listed["pages"]["per_page"]) == ([failed, *made[::-1]], 20)
    assert set(failed) == PAGE_FIELDS
    assert (failed["crawl_status"], failed["index_status"], failed["page_url"]) == (
        "failed",
        "failed",
        "https://example.invalid/about",
    )
    page = await account.call("GET", "/projects/1/pages?limit=2&page=2&order=asc&crawl_status=all")
    assert (page["pages"]["data"], page["pages"]["last_page"]) == ([made[2], failed], 2)
    ready = await account.call("GET", "/projects/1/pages?crawl_status=ok&index_status=ok&order=asc")
    assert (ready["pages"]["data"], ready["pages"]["total"]) == (made, 3)
    for filters in ("crawl_status=limited", "crawl_status=ok&index_status=failed"):
        assert (await account.call("GET", f"/projects/1/pages?{filters}"))["pages"]["total"] == 0


async def test_delete_projects_id_pages_pid(account: Account) -> None:
    page = await account.upload(await account.project(), "cats.md", CATS)
    assert await account.call("DELETE", f"/projects/1/pages/{page['id']}") == {"deleted": True}
    assert await account.refusal(404, "DELETE", "/projects/1/pages/1") == "Page with id 1 not found"


async def test_post_projects_id_pages_pid_reindex(account: Account) -> None:
    project = await account.project(sitemap_path="https://example.invalid/about")
    await account.settled(project, 1)
    assert await account.call("POST", "/projects/1/pages/1/reindex") == {"updated": True}
    page = await account.upload(project, "no.pdf", b"%PDF-1.4 this is no document")
    assert page["crawl_status"] == "failed"
    refused = f"The Document with the id {page['id']} couldn't have been updated"
    assert await account.refusal(403, "POST", f"/projects/1/pages/{page['id']}/reindex") == refused


async def test_get_and_put_projects_id_pages_pid_metadata(account: Account) -> None:
    await account.upload(await account.project(), "cats.md", CATS)
    path = "/projects/1/pages/1/metadata"
    before = await account.call("GET", path)
    assert before == {"id": 1, "url": None, "title": before["title"], "description": None, "image": None}
    told = {"title": "All about cats", "url": "https://example.com/cats", "description": "Purring."}
    assert await account.call("PUT", path, told) == {"id": 1, **told, "image": None}
    long = "c" * 255
    assert (await account.call("PUT", path, {"title": long, "description": None})) == {
        "id": 1,
        "title": long,
        "url": told["url"],
        "description": None,
        "image": None,
    }
    assert (await account.call("GET", path))["title"] == long
    assert await account.refusal(400, "PUT", path, {"image": "no url"}) == "Image must be valid url."


async def test_get_projects_id_citations_cid(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    await account.upload({"id": 1}, "cats.md", CATS)
    prompt = f"{saying(tag).model}&finish=stop"
    async with account.session.patch("/chat/v1/chatbots/1", json={"model": prompt}) as response:
        assert response.status == 200
    sent = await account.ask(conversation, "How long does a cat sleep?")
    assert sent["citations"] == [1]
    *_, finish = await account.stream(f"{messages}?stream=1", {"prompt": "When do cats purr?"})
    assert finish["citations"] == [1]
    cited = await account.call("GET", "/projects/1/citations/1")
    assert (cited["id"], set(cited)) == (1, {"id", "url", "title", "description", "image"})
    assert cited["title"]
    assert await account.refusal(404, "GET", "/projects/1/citations/2") == "Page with id 2 not found"


async def test_get_preview_id(account: Account) -> None:
    await account.upload(await account.project(), "cats.md", CATS)
    async with account.session.post("/chat/v1/chatbots/1/sources", json={"text": "Dogs bark."}) as response:
        assert (await response.json())["number"] == 2
    async with account.session.get("/api/v1/preview/2") as response:
        assert (response.status, await response.text()) == (200, "Dogs bark.")
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert await account.refusal(404, "GET", "/preview/1") == "The file of the page with id 1 is not kept"
    assert await account.refusal(404, "GET", "/preview/3") == "Page with id 3 not found"


async def test_get_user(account: Account) -> None:
    user = await account.call("GET", "/user")
    check_times(user)
    fields = {"id", "email", "name", "current_team_id", "profile_photo_url", "created_at", "updated_at"}
    assert (set(user), user["id"], user["name"]) == (fields, 1, "Ada")


async def test_post_user(account: Account, house: Stack, session: aiohttp.ClientSession) -> None:
    assert await account.refusal(403, "POST", "/user", {"name": "Grace"})
    operator = Account(session, house.apis[0].url, house.key)
    before = await operator.call("GET", "/user")
    try:
        assert (await operator.post_form("/user", {"name": "Grace"}))[1]["data"]["name"] == "Grace"
        assert (await operator.call("GET", "/user"))["name"] == "Grace"
        status, document = await operator.post_form("/user", profile_photo=("me.png", b"png"))
        assert (status, document["data"]["code"]) == (501, 501)
    finally:
        await operator.call("POST", "/user", {"name": before["name"]})


async def test_get_limits_usage(account: Account, tag: str) -> None:
    conversation, _ = await account.chat()
    await account.upload({"id": 1}, "cats.md", CATS)
    await account.ask(conversation, saying(tag).model)
    limits = await account.call("GET", "/limits/usage")
    assert {name: value for name, value in limits.items() if name.startswith("current")} == {
        "current_projects_num": 1,
        "current_total_storage_credits": 1,
        "current_queries": 1,
    }
    assert {name for name in limits if name.startswith("max")} == {
        "max_projects_num",
        "max_total_storage_credits",
        "max_queries",
    }


@pytest.mark.parametrize("path", ["plugins", "licenses", "licenses/1", "reports/traffic", "reports/intelligence"])
async def test_plugins_licenses_and_reports_are_not_offered(account: Account, path: str) -> None:
    assert (await account.refusal(501, "GET", f"/projects/1/{path}")).endswith("are not offered here.")


async def test_post_projects_id_chat_completions(account: Account, house: Stack, tag: str) -> None:
    await account.project()
    await account.post_form("/projects/1/settings", {"persona_instructions": "You are a pirate."})
    script = saying(tag)
    parts = [{"type": "text", "text": script.model}]
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ahoy"},
        {"role": "user", "content": parts},
    ]
    body = {"model": "gpt-4", "messages": said, "lang": "en", "is_inline_citation": False, "temperature": 0.5}
    async with account.session.post("/api/v1/projects/1/chat/completions", json=body) as response:
        assert response.status == 200
        completion = await response.json()
    assert (completion["object"], completion["model"]) == ("chat.completion", "gpt-4")
    [choice] = completion["choices"]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", script.text)
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("stop", None, 0)
    usage = completion["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    details = {"reasoning_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert usage["completion_tokens_details"] == details
    [asked] = house.upstream.requests(tag)
    assert [message["content"] for message in asked.messages] == ["You are a pirate.", "Hi", "Ahoy", script.model]
    assert asked.body["temperature"] == 0.5
    assert (await account.call("GET", "/projects/1/conversations"))["total"] == 0


async def test_post_projects_id_chat_completions_streamed(account: Account, tag: str) -> None:
    await account.project()
    script = saying(tag)
    body = {"model": "any", "messages": [{"role": "user", "content": script.model}], "stream": True}
    async with account.session.post("/api/v1/projects/1/chat/completions", json=body) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        told = read(await response.read())
    assert told[-1].data == "[DONE]"
    chunks = [json.loads(event.data) for event in told[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == script.text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
async def test_what_chat_completions_cannot_do_is_refused(account: Account, more: Json, what: str) -> None:
    await account.project()
    body = {"messages": [{"role": "user", "content": "Hi"}], **more}
    message = await account.refusal(501, "POST", "/projects/1/chat/completions", body)
    assert message == f"{what} is not yet supported. Please remove them from your request and try again."
