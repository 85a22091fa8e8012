"""Chatbots as the store keeps them, over a real broker."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.main import StoreSettings
from shared.contracts.base import Request
from shared.contracts.chatbots import (
    Chatbot,
    ChatbotChanges,
    DeleteChatbot,
    GetChatbot,
    ListChatbots,
    UpdateChatbot,
)
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.store import ConversationToUse
from shared.ids import new_id
from shared.models_file import ModelSettings, ModelsFile
from shared.process import load_settings
from tests.conversation_store.conftest import Surroundings, surrounded
from tests.conversation_store.making import TENANT, create_chatbot, create_conversation, submit_turn
from tests.stack.rooms import Vhost

UUID = "01890a5d-ac96-774b-bcce-b302099a8057"

Database = AsyncDatabase[dict[str, Any]]


async def problem(around: Surroundings, request: Request[Any]) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(request)
    return refusal.value.problem


async def made(around: Surroundings, name: str = "Guide", **fields: Any) -> Chatbot:
    return await around.api.call(create_chatbot(name, **fields))


def get(reference: str | int, tenant: str = TENANT) -> GetChatbot:
    return GetChatbot(tenant=tenant, chatbot=str(reference))


def update(reference: str, **changes: Any) -> UpdateChatbot:
    return UpdateChatbot(tenant=TENANT, chatbot=reference, changes=ChatbotChanges(**changes))


async def test_chatbot_is_found_by_id_slug_and_number(around: Surroundings) -> None:
    full = {
        "model": "m",
        "temperature": 0.5,
        "instructions": "Be $brief.",
        "metadata": {"a.b": {"$c": 1}},
        "foreign": {"other": {"colour": "red"}},
    }
    chatbot = await made(around, "Travel Guide", **full)
    assert (chatbot.number, chatbot.slug, chatbot.name) == (1, "travel-guide", "Travel Guide")
    assert {name: getattr(chatbot, name) for name in full} == full
    for reference in (chatbot.id, chatbot.slug, chatbot.number):
        assert await around.api.call(get(reference)) == chatbot
    for reference in (new_id(), "travel", "2", "007", "999999999999999999"):
        assert (await problem(around, get(reference))).code == "not_found"


async def test_same_creation_twice_is_one_chatbot(around: Surroundings) -> None:
    for command in (create_chatbot(slug="guide"), create_chatbot("Another")):
        assert await around.api.call(command) == await around.api.call(command)
        taken = create_chatbot("Third", chatbot_id=command.chatbot_id, tenant="other")
        assert [error.path for error in (await problem(around, taken)).errors] == ["/chatbot_id"]


async def test_slug_that_is_asked_for_and_taken_is_refused_and_one_that_is_made_gets_a_suffix(
    around: Surroundings,
) -> None:
    first = await made(around, "Guide")
    assert (await problem(around, create_chatbot("X", slug="guide"))).code == "slug_taken"
    others = await asyncio.gather(*(made(around, "Guide") for _ in range(8)))
    assert {other.slug for other in others} == {f"guide-{other.number}" for other in others}
    assert (await made(around, "Guide", tenant="other")).slug == first.slug
    long = [(await made(around, "x" * 79 + " y")).slug for _ in range(2)]
    assert long[0] == "x" * 79
    assert long[1].startswith("xxx")
    assert len(long[1]) <= 80


async def test_suffix_that_is_taken_too_is_no_obstacle(around: Surroundings) -> None:
    await made(around, "Guide")
    await made(around, "Other", slug="guide-3")
    assert (await made(around, "Guide")).slug.startswith("guide-")


@pytest.mark.parametrize(
    ("name", "slug"),
    [("2024", "chatbot-2024"), ("🙂", "chatbot"), ("東京", "東京"), (UUID, f"chatbot-{UUID}")],
)
async def test_name_that_makes_no_slug_of_its_own_gets_one(around: Surroundings, name: str, slug: str) -> None:
    chatbot = await made(around, name)
    assert chatbot.slug == slug
    assert (await around.api.call(get(slug))).id == chatbot.id


async def test_numbers_are_each_tenants_own_and_are_never_used_again(around: Surroundings) -> None:
    made_at_once = await asyncio.gather(*(made(around, tenant="crowd") for _ in range(10)))
    assert sorted(chatbot.number for chatbot in made_at_once) == list(range(1, 11))
    assert (await made(around)).number == 1
    await around.api.call(DeleteChatbot(tenant="crowd", chatbot="10"))
    assert (await made(around, tenant="crowd")).number == 11


async def test_changes_are_of_what_is_set_only(around: Surroundings) -> None:
    chatbot = await made(around, "Guide", model="m", temperature=1.0, instructions="Be brief.", metadata={"a": 1})
    renamed = await around.api.call(update("guide", name="Leader"))
    assert renamed == chatbot.model_copy(update={"name": "Leader", "updated_at": renamed.updated_at})
    assert renamed.updated_at > chatbot.updated_at
    changed = await around.api.call(update("1", slug="leader", model=None, instructions=None, metadata={}))
    assert (changed.slug, changed.model, changed.instructions, changed.metadata) == ("leader", None, None, {})
    assert changed.temperature == 1.0
    assert (await problem(around, get("guide"))).code == "not_found"
    await made(around, "Guide")
    assert (await problem(around, update("guide", slug="leader"))).code == "slug_taken"
    assert (await problem(around, update("nobody", name="x"))).code == "not_found"


async def test_dialect_changes_what_it_keeps_itself_and_nothing_of_others(around: Surroundings) -> None:
    chatbot = await made(around, foreign={"one": {"a.b": 1}, "two": {"$c": 2}})
    changed = await around.api.call(update(chatbot.slug, foreign={"two": {"d": 3}, "three": {}}))
    assert changed.foreign == {"one": {"a.b": 1}, "two": {"d": 3}, "three": {}}
    assert (await around.api.call(get(chatbot.id))).foreign == changed.foreign


async def test_chatbots_are_paged_in_the_order_of_their_creation(around: Surroundings) -> None:
    names = [(await made(around, f"Bot {n}")).name for n in range(7)]
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot="4"))
    seen: list[str] = []
    cursor = None
    while True:
        page = await around.api.call(ListChatbots(tenant=TENANT, limit=3, cursor=cursor))
        seen += [chatbot.name for chatbot in page.data]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == names[:3] + names[4:]
    wrong = ListChatbots(tenant=TENANT, limit=3, cursor="Zm9yZ2Vk")
    assert (await problem(around, wrong)).code == "invalid_cursor"


async def test_deleted_chatbot_is_gone_and_leaves_no_text(around: Surroundings, documents: Database) -> None:
    chatbot = await made(around, "Marked name", instructions="marked words", metadata={"marked": "words"}, model="mark")
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=chatbot.slug))
    for reference in (chatbot.id, chatbot.slug, str(chatbot.number)):
        requests: tuple[Request[Any], ...] = (
            get(reference),
            update(reference, name="x"),
            DeleteChatbot(tenant=TENANT, chatbot=reference),
        )
        for request in requests:
            assert (await problem(around, request)).code == "not_found"
    assert (await around.api.call(ListChatbots(tenant=TENANT, limit=3, cursor=None))).data == ()
    refusal = await problem(around, create_conversation(chatbot_id=chatbot.id))
    assert [error.path for error in refusal.errors] == ["/chatbot_id"]
    assert "mark" not in str(await documents.chatbots.find_one({"_id": chatbot.id})).lower()
    assert (await made(around, "Marked name")).slug == chatbot.slug


async def test_no_chatbot_crosses_tenants(around: Surroundings) -> None:
    chatbot = await made(around, "Mine")
    theirs = {"tenant": "other", "chatbot": chatbot.id}
    requests: tuple[Request[Any], ...] = (
        *(get(reference, "other") for reference in (chatbot.id, chatbot.slug, chatbot.number)),
        UpdateChatbot(**theirs, changes=ChatbotChanges(name="Theirs")),
        DeleteChatbot(**theirs),
    )
    for request in requests:
        assert (await problem(around, request)).code == "not_found"
    assert (await around.api.call(ListChatbots(tenant="other", limit=3, cursor=None))).data == ()
    assert (await problem(around, create_conversation(tenant="other", chatbot_id=chatbot.id))).code == "invalid_request"
    assert await around.api.call(get(chatbot.id)) == chatbot


async def test_model_that_the_models_file_does_not_name_is_refused_with_those_that_it_does(
    vhost: Vhost, migrated: str, tmp_path: Path
) -> None:
    (tmp_path / "models.toml").write_text("[models.large]\n[models.small]\n")
    async with surrounded(vhost, migrated, default_model=None, models_file=tmp_path / "models.toml") as around:
        chatbot = await made(around, model="small")
        requests: tuple[Request[Any], ...] = (
            create_chatbot(model="lagre"),
            update(chatbot.slug, model="lagre"),
            submit_turn(model="lagre"),
            submit_turn(model="lagre", chatbot_id=chatbot.id),
            submit_turn(model="lagre", conversation=ConversationToUse(id=(unused := new_id()))),
        )
        for request in requests:
            refusal = await problem(around, request)
            assert refusal.code == "invalid_request"
            assert [(error.path, error.message) for error in refusal.errors] == [
                ("/model", "this model is not known; there are: large, small")
            ]
        assert (await problem(around, submit_turn(conversation_id=unused))).code == "not_found", "nothing was made"
        assert (await around.api.call(update(chatbot.slug, name="Other", model="large"))).model == "large"
        assert (await around.api.call(submit_turn(model=None, chatbot_id=chatbot.id))).run.model == "large"


@pytest.mark.parametrize("models", [{}, {"*": ModelSettings()}, {"*": ModelSettings(), "large": ModelSettings()}])
def test_models_file_that_leaves_it_to_the_provider_knows_no_names(models: dict[str, ModelSettings]) -> None:
    assert ModelsFile(models).known is None


def test_default_model_must_be_one_of_the_models_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models.toml"
    # The key is the workers' own, and need not be there for the store.
    path.write_text("[models.large]\nbase_url = 'http://x/'\napi_key_env = 'NO_SUCH_KEY'\n")
    monkeypatch.setenv("PARLEY_MODELS_FILE", str(path))
    monkeypatch.setenv("PARLEY_BOOTSTRAP_KEY", "x" * 16)
    monkeypatch.setenv("PARLEY_KEY_PEPPER", "x" * 16)
    assert load_settings(StoreSettings).models_file.known == frozenset({"large"})
    monkeypatch.setenv("PARLEY_DEFAULT_MODEL", "lagre")
    with pytest.raises(SystemExit):
        load_settings(StoreSettings)
    assert "PARLEY_DEFAULT_MODEL is none of those in PARLEY_MODELS_FILE" in capsys.readouterr().err
