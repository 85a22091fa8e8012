"""What clients of the CustomGPT.ai API are refused, and how: the status, the envelope and the very words."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import pytest
from yarl import URL

from services.api.dialects.customgpt.messages import KEPT_MAX_CHARACTERS
from shared.contracts.base import TEXT_MAX_CHARACTERS
from shared.contracts.sources import FILE_MAX_BYTES
from tests.cores.event_stream import read
from tests.dialects.customgpt import UNKNOWN_SESSION, Account, Json, form, messages_of, opened_account, saying
from tests.dialects.transcripts import Heard, read_until
from tests.fakes.script import expected_text
from tests.stack.services import Stack

NO_KEY = "API Token is either missing or invalid"


@pytest.fixture
async def account(house: Stack) -> AsyncIterator[Account]:
    async with opened_account(house) as account:
        yield account


PATHS = [
    ("GET", "/projects"),
    ("POST", "/projects"),
    ("GET", "/projects/1/settings"),
    ("POST", "/projects/1/conversations/x/messages"),
    ("POST", "/projects/1/chat/completions"),
    ("GET", "/preview/1"),
    ("GET", "/user"),
    ("GET", "/limits/usage"),
    ("GET", "/projects/1/plugins"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("headers", [{"Authorization": ""}, {"Authorization": "Bearer of-nobody"}])
async def test_no_key_or_a_wrong_one_is_401(account: Account, method: str, path: str, headers: dict[str, str]) -> None:
    assert await account.refusal(401, method, path, headers=headers) == NO_KEY


OF_A_PROJECT = [
    ("GET", ""),
    ("POST", ""),
    ("DELETE", ""),
    ("POST", "/replicate"),
    ("GET", "/stats"),
    ("GET", "/settings"),
    ("POST", "/settings"),
    ("GET", "/conversations"),
    ("POST", "/conversations"),
    ("PUT", f"/conversations/{UNKNOWN_SESSION}"),
    ("DELETE", f"/conversations/{UNKNOWN_SESSION}"),
    ("GET", f"/conversations/{UNKNOWN_SESSION}/messages"),
    ("GET", f"/conversations/{UNKNOWN_SESSION}/messages/1"),
    ("GET", "/sources"),
    ("PUT", "/sources/1"),
    ("PUT", "/sources/1/instant-sync"),
    ("DELETE", "/sources/1"),
    ("GET", "/pages"),
    ("DELETE", "/pages/1"),
    ("POST", "/pages/1/reindex"),
    ("GET", "/pages/1/metadata"),
    ("PUT", "/pages/1/metadata"),
    ("GET", "/citations/1"),
]


async def test_project_that_is_none_is_404_or_400_everywhere(account: Account) -> None:
    for method, path in OF_A_PROJECT:
        assert await account.refusal(404, method, f"/projects/77{path}") == "Agent with id 77 not found"
        assert await account.refusal(400, method, f"/projects/x{path}") == "Agent id must be integer"
    for number in ("0", "-1", "9" * 25):
        assert await account.refusal(404, "GET", f"/projects/{number}") == f"Agent with id {number} not found"


async def test_project_of_another_account_is_404(account: Account, house: Stack) -> None:
    conversation, messages = await account.chat()
    async with opened_account(house) as other:
        assert await other.refusal(404, "GET", "/projects/1") == "Agent with id 1 not found"
        await other.project()
        gone = f"Conversation with session id {conversation['session_id']} not found"
        assert await other.refusal(404, "POST", messages, {"prompt": "Hi"}) == gone


async def test_session_that_is_none_is_404(account: Account) -> None:
    conversation = await account.conversation(await account.project())
    await account.project("Another")
    foreign = f"/projects/2/conversations/{conversation['session_id']}"
    for path in (f"/projects/1/conversations/{UNKNOWN_SESSION}", "/projects/1/conversations/x", foreign):
        missing = f"Conversation with session id {path.rpartition('/')[2]} not found"
        for method, more, body in [
            ("PUT", "", {"name": "x"}),
            ("DELETE", "", None),
            ("GET", "/messages", None),
            ("POST", "/messages", {"prompt": "Hi"}),
            ("GET", "/messages/1", None),
            ("PUT", "/messages/1/feedback", {"reaction": "liked"}),
        ]:
            assert await account.refusal(404, method, path + more, body) == missing


async def test_message_page_or_source_that_is_none_is_404(account: Account) -> None:
    _, messages = await account.chat()
    for number in ("5", "0", "99999999999"):
        missing = f"Conversation message with id {number} not found"
        assert await account.refusal(404, "GET", f"{messages}/{number}") == missing
        feedback = {"reaction": "liked"}
        assert await account.refusal(404, "PUT", f"{messages}/{number}/feedback", feedback) == missing
        missing = f"Page with id {number} not found"
        assert await account.refusal(404, "POST", f"/projects/1/pages/{number}/reindex") == missing
        assert await account.refusal(404, "GET", f"/projects/1/citations/{number}") == missing
        assert await account.refusal(404, "GET", f"/preview/{number}") == missing
        missing = f"Project source with id {number} not found"
        assert await account.refusal(404, "PUT", f"/projects/1/sources/{number}", {}) == missing
    assert await account.refusal(400, "GET", "/preview/x") == "Page id must be integer"


SENT: list[tuple[Json, str]] = [
    ({}, "The prompt field is required."),
    ({"prompt": None}, "The prompt field is required."),
    ({"prompt": " \n"}, "The prompt field is required."),
    ({"prompt": 7}, "The prompt field is not valid: Input should be a valid string."),
    ({"prompt": "\ud800"}, "The prompt field is not valid: contains a lone surrogate"),
    (
        {"prompt": "a" * (TEXT_MAX_CHARACTERS + 1)},
        f"The prompt field is not valid: may have {TEXT_MAX_CHARACTERS} characters at most.",
    ),
    ({"prompt": "a", "stream": "perhaps"}, "The stream field is not valid: "),
    ({"prompt": "a", "response_source": "mine"}, "The response source field is not valid: "),
    ({"prompt": "a", "external_id": "a" * 129}, "The external id field is not valid: "),
]


@pytest.mark.parametrize(("body", "message"), SENT, ids=range(len(SENT)))
async def test_message_that_is_not_valid_is_400_and_says_where(account: Account, body: Json, message: str) -> None:
    _, messages = await account.chat()
    assert (await account.refusal(400, "POST", messages, body)).startswith(message)
    assert (await account.call("GET", messages))["messages"]["total"] == 0


@pytest.mark.parametrize("body", [b"{", b"[]", b'"text"', b"\xff", b'{"prompt": NaN}'])
async def test_body_that_is_no_json_object_is_400(account: Account, body: bytes) -> None:
    _, messages = await account.chat()
    for path in (messages, "/projects", "/projects/1/settings", "/projects/1/chat/completions"):
        async with account.session.post(f"/api/v1{path}", data=body) as response:
            document = await response.json()
        assert (response.status, document["data"]["code"]) == (400, 400)
        assert document["data"]["message"].startswith("The body is not")


async def test_body_that_is_too_large_is_413(account: Account) -> None:
    _, messages = await account.chat()
    async with account.session.post(f"/api/v1{messages}", data=io.BytesIO(b" " * (3 * 1024 * 1024))) as response:
        assert (response.status, (await response.json())["data"]["code"]) == (413, 413)


async def test_what_a_project_lacks_is_said_in_the_words_of_the_api(account: Account) -> None:
    for body in ({}, {"project_name": ""}, {"project_name": None}):
        assert await account.refusal(400, "POST", "/projects", body) == "Agent name can't be empty"
    empty = {"project_name": "Guide", "sitemap_path": ""}
    status, document = await account.post_form("/projects", empty)
    assert (status, document["data"]["message"]) == (400, "Sitemap path can't be empty")
    message = await account.refusal(400, "POST", "/projects", {"project_name": "Guide", "sitemap_path": "no address"})
    assert message == "The sitemap path field is not valid: must be an address of the web."
    assert (await account.refusal(400, "POST", "/projects", {"project_name": "a" * 201})).startswith(
        "The project name field is not valid: "
    )
    assert (await account.call("GET", "/projects"))["total"] == 0
    await account.project()
    assert await account.refusal(400, "POST", "/projects/1", {"project_name": ""}) == "Agent name can't be empty"
    assert await account.refusal(400, "POST", "/projects/1", {"sitemap_path": ""}) == "Sitemap path can't be empty"
    # Nothing of it is done.
    status, _ = await account.post_form("/projects/1", {"project_name": "a" * 201}, file=("cats.md", b"Cats purr."))
    assert status == 400
    assert (await account.call("GET", "/projects/1/pages"))["pages"]["total"] == 0


async def test_file_that_cannot_be_read_is_refused_and_leaves_no_project(account: Account) -> None:
    fields = {"project_name": "Cats"}
    status, document = await account.post_form("/projects", fields, file=("cats.exe", b"MZ\x00\x01"))
    assert (status, document["data"]["code"]) == (400, 400)
    status, document = await account.post_form("/projects", fields, file=("cats.md", b""))
    assert (status, document["status"]) == (400, "error")
    large = b"a" * (FILE_MAX_BYTES + 1)
    status, document = await account.post_form("/projects", fields, file=("cats.txt", large))
    assert (status, document["data"]["code"]) == (413, 413)
    body, content_type = form(fields)
    headers = {"Content-Type": content_type}
    async with account.session.post("/api/v1/projects", data=body[:-20], headers=headers) as response:
        assert (response.status, (await response.json())["status"]) == (400, "error")
    assert (await account.call("GET", "/projects"))["total"] == 0


async def test_setting_that_is_not_valid_is_400_and_changes_nothing(account: Account) -> None:
    await account.project()
    before = await account.call("GET", "/projects/1/settings")
    for fields, name in [
        ({"enable_citations": "4", "default_prompt": "Hi"}, "enable citations"),
        ({"response_source": "mine", "default_prompt": "Hi"}, "response source"),
        ({"is_loading_indicator_enabled": "perhaps"}, "is loading indicator enabled"),
        ({"persona_instructions": "a" * 40_000}, "persona instructions"),
        ({"example_questions[]": "a" * 1_001}, "example questions/0"),
    ]:
        status, document = await account.post_form("/projects/1/settings", fields)
        assert status == 400
        assert document["data"]["message"].startswith(f"The {name} field is not valid: ")
    status, document = await account.post_form("/projects/1/settings", chat_bot_avatar=("me.png", b"png"))
    assert (status, document["data"]["message"].split()[0]) == (501, "chat_bot_avatar")
    assert await account.call("GET", "/projects/1/settings") == before


async def test_more_than_can_be_kept_of_settings_is_400(account: Account) -> None:
    await account.project()
    questions = {"example_questions": ["a" * 1_000] * 20}
    message = await account.refusal(400, "POST", "/projects/1/settings", questions)
    assert message == "The settings field is not valid: may be 16384 characters long at most."


async def test_key_for_chats_alone_may_not_manage_projects(account: Account) -> None:
    await account.project()
    async with account.session.post("/chat/v1/keys", json={"name": "chat", "scope": "chat"}) as made:
        headers = {"Authorization": f"Bearer {(await made.json())['secret']}"}
    for method, path in [
        ("POST", "/projects"),
        ("POST", "/projects/1"),
        ("DELETE", "/projects/1"),
        ("POST", "/projects/1/replicate"),
        ("POST", "/projects/1/settings"),
        ("POST", "/projects/1/sources"),
        ("PUT", "/projects/1/sources/1"),
        ("PUT", "/projects/1/sources/1/instant-sync"),
        ("DELETE", "/projects/1/sources/1"),
        ("DELETE", "/projects/1/pages/1"),
        ("POST", "/projects/1/pages/1/reindex"),
        ("PUT", "/projects/1/pages/1/metadata"),
        ("POST", "/user"),
    ]:
        assert await account.refusal(403, method, path, headers=headers)
    made_by_chat_key = await account.call("POST", "/projects/1/conversations", {}, status=201, headers=headers)
    assert made_by_chat_key["project_id"] == 1


async def test_unknown_path_and_method_are_refused_in_the_envelope(account: Account) -> None:
    for path in ("/projects/1/nothing", "/user/x", "/limits/x", "/preview"):
        assert await account.refusal(404, "GET", path) == "There is nothing at this path."
    async with account.session.patch("/api/v1/projects/1", json={}) as response:
        assert (response.status, (await response.json())["data"]["code"]) == (405, 405)
        assert (
            response.headers["Allow"] == "DELETE,GET,HEAD,POST".replace(",", ", ") or "GET" in response.headers["Allow"]
        )


async def test_account_over_its_limit_is_429_and_told_when_to_come_back(
    house: Stack, session: aiohttp.ClientSession, tag: str
) -> None:
    limits = {"active_runs": 1}
    async with session.post("/chat/v1/tenants", json={"name": "Poor", "limits": limits}) as made:
        key = (await made.json())["key"]["secret"]
    async with aiohttp.ClientSession(house.apis[0].url, headers={"Authorization": f"Bearer {key}"}) as own:
        poor = Account(own, house.apis[0].url, key)
        _, messages = await poor.chat()
        held = {"prompt": saying(tag, hold_after=1).model}
        async with own.post(f"/api/v1{messages}?stream=1", json=held) as streaming:
            message = await poor.refusal(429, "POST", messages, {"prompt": "More"})
            assert message.startswith("You have exhausted your current query credits. ")
            async with own.post(f"/api/v1{messages}?stream=1", json={"prompt": "More"}) as response:
                assert (response.status, response.content_type) == (429, "application/json")
                assert int(response.headers["Retry-After"]) >= 1
            await house.upstream.gate(tag).open()
            assert b"event: finish" in await streaming.read()


@pytest.mark.parametrize("query", ["", "?stream=1"])
@pytest.mark.parametrize("trouble", [{"status": 400}, {"status": 500}, {"cut_after": 0}], ids=str)
async def test_provider_that_fails_before_the_first_token_is_500(
    account: Account, tag: str, query: str, trouble: Json
) -> None:
    _, messages = await account.chat()
    body = {"prompt": saying(tag, **trouble).model}
    assert await account.refusal(500, "POST", messages + query, body)
    [message] = (await account.call("GET", messages))["messages"]["data"]
    assert message["openai_response"] is None
    completion = {"messages": [{"role": "user", "content": saying(tag, **trouble).model}]}
    assert await account.refusal(500, "POST", f"/projects/1/chat/completions{query}", completion)


async def test_provider_that_fails_after_the_first_token_ends_the_stream_with_an_error(
    account: Account, tag: str
) -> None:
    _, messages = await account.chat()
    script = saying(tag, tokens=6, cut_after=4)
    *said, error = await account.stream(f"{messages}?stream=1", {"prompt": script.model})
    told = "".join(event["message"] for event in said if event["status"] == "progress")
    assert told == saying(tag, tokens=4).text
    assert (error["status"], error["error"]) == ("error", error["message"])
    assert error["message"]
    # What came is kept; as a whole answer it is not given out.
    [message] = (await account.call("GET", messages))["messages"]["data"]
    assert message["openai_response"] == told
    assert await account.refusal(500, "POST", messages, {"prompt": saying(f"{tag}2", tokens=6, cut_after=4).model})


async def test_answer_whose_worker_dies_is_told_whole_and_its_client_notices_nothing(
    account: Account, house: Stack, tag: str
) -> None:
    script = saying(tag, tokens=30, hold_after=10)
    begun = asyncio.Barrier(5)

    async def hear(path: str, body: Json) -> list[Json]:
        async with account.session.post(f"/api/v1{path}", json=body) as response:
            heard = Heard(response.status, response.headers)
            await read_until(heard, response, f"{tag}w9".encode())
            await begun.wait()
            stream = heard.body + await response.content.read()
        return [json.loads(event.data) for event in read(stream) if event.data != "[DONE]"]

    async with asyncio.timeout(30), asyncio.TaskGroup() as streams:
        told = []
        # One is gone on with; of the other, the next attempt says the same once more.
        for number, model in enumerate(("goes-on", "begins-anew"), start=1):
            conversation = await account.conversation(await account.project())
            async with account.session.patch(f"/chat/v1/chatbots/{number}", json={"model": model}) as response:
                assert response.status == 200
            message = {"prompt": script.model, "stream": True}
            told.append(streams.create_task(hear(messages_of(conversation), message)))
            completion = {"messages": [{"role": "user", "content": script.model}], "stream": True}
            told.append(streams.create_task(hear(f"/projects/{number}/chat/completions", completion)))
        await begun.wait()
        house.workers[-1].kill()
        await house.start("inference_worker").wait_ready()
        await house.upstream.gate(tag).open()
    for messages in (told[0].result(), told[2].result()):
        assert [messages[0]["status"], messages[-1]["status"]] == ["start", "finish"]
        assert "".join(event["message"] for event in messages[1:-1]) == script.text
    for chunks in (told[1].result(), told[3].result()):
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == script.text
    assert {request.prefix for request in house.upstream.requests(tag)} == {"", expected_text(10, tag)}


async def test_bytes_that_are_no_text_are_refused_in_the_envelope_or_replaced(account: Account, tag: str) -> None:
    _, messages = await account.chat()
    for path in ("/projects/%FF", "/projects/1/conversations/%FF/messages", "/preview/%FF"):
        async with account.session.get(URL(f"/api/v1{path}", encoded=True)) as response:
            assert (await response.json())["data"]["code"] == response.status in (400, 404)
    for query in ("external_id=%00", "name=%00&external_id=%FF%0A"):
        assert await account.refusal(400, "POST", f"{messages}?{query}", {"prompt": "Hi"})
    raw = f"POST /api/v1{messages} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {account.key}\r\n".encode()
    body = f'{{"prompt":"{saying(tag).model}"}}'.encode()
    raw += b"User-Agent: caf\xe9\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    at = urlsplit(account.url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    writer.write(raw)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"user_agent":"caf?"' in answer


async def test_what_is_kept_of_a_message_is_bounded(account: Account, tag: str) -> None:
    conversation, messages = await account.chat()
    headers = {"User-Agent": "a" * 5_000}
    body = {"prompt": saying(tag).model, "chatbot_model": "m" * 5_000, "lang": "l" * 5_000}
    sent = await account.call("POST", messages, body, headers=headers)
    assert sent["metadata"]["user_agent"] == "a" * KEPT_MAX_CHARACTERS
    assert messages_of(conversation) == messages
