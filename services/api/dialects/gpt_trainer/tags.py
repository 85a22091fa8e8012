"""Source tags of the GPT-trainer API: they are kept with the chatbot."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from services.api.dialects import Endpoint, Incoming, Steps
from services.api.dialects.bodies import Lenient, read_body
from services.api.dialects.gpt_trainer.kept import Kept, changed, holder, kept_of, key_of
from services.api.dialects.gpt_trainer.resources import (
    PREFIX,
    Document,
    answer,
    id_of,
    path_id,
    success,
    time_of,
    uuid_of,
)
from shared.contracts.problems import refused


def _is_uuid(uuid: str) -> str:
    id_ = id_of(uuid)
    if id_ is None:
        raise ValueError("must be the uuid of a data source")
    return uuid_of(id_)


Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Color = Annotated[str, StringConstraints(pattern=r"^#[0-9A-Fa-f]{6}$")]
Uuid = Annotated[str, AfterValidator(_is_uuid)]


class ChangedTag(Lenient):
    """What POST /source-tag/{uuid}/update takes: only what is to be changed."""

    name: Name | None = None
    color: Color | None = None
    data_source_uuids: list[Uuid] | None = None


class NewTag(ChangedTag):
    """What POST /chatbot/{uuid}/source-tag/create takes."""

    name: Name
    color: Color


def _create_tag(call: Incoming) -> Steps:
    chatbot_id = path_id(call, "chatbot")
    body = read_body(NewTag, call.body)
    now = time_of(datetime.now(UTC))
    tag: Document = {
        "uuid": uuid_of(call.fresh_id),
        "name": body.name,
        "color": body.color,
        "data_source_uuids": body.data_source_uuids or [],
        "created_at": now,
        "modified_at": now,
    }

    def change(kept: Kept) -> tuple[Kept, Document]:
        return kept.with_(tags=[*kept.tags, tag]), {}

    yield from changed(call.tenant, chatbot_id, "chatbot", change)
    return answer(tag)


def _list_tags(call: Incoming) -> Steps:
    chatbot = yield from holder(call.tenant, path_id(call, "chatbot"), "chatbot")
    return answer(kept_of(chatbot).tags)


def _update_tag(call: Incoming) -> Steps:
    tag_id = path_id(call, "source tag")
    given = read_body(ChangedTag, call.body or b"{}").model_dump(exclude_none=True)

    def change(kept: Kept) -> tuple[Kept, Document]:
        before = _tag(kept, tag_id)
        after = before | given | {"modified_at": time_of(datetime.now(UTC))}
        return kept.with_(tags=[after if one is before else one for one in kept.tags]), {}

    chatbot = yield from changed(call.tenant, key_of(uuid_of(tag_id)), "source tag", change)
    return answer(_tag(kept_of(chatbot), tag_id))


def _delete_tag(call: Incoming) -> Steps:
    tag_id = path_id(call, "source tag")

    def change(kept: Kept) -> tuple[Kept, Document]:
        gone = _tag(kept, tag_id)
        return kept.with_(tags=[one for one in kept.tags if one is not gone]), {}

    yield from changed(call.tenant, key_of(uuid_of(tag_id)), "source tag", change)
    return success()


def _tag(kept: Kept, tag_id: str) -> Document:
    tag = next((one for one in kept.tags if one["uuid"] == uuid_of(tag_id)), None)
    if tag is None:
        raise refused("not_found", "There is no such source tag.")
    return tag


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/chatbot/{{uuid}}/source-tag/create", _create_tag, "admin"),
    Endpoint("GET", f"{PREFIX}/chatbot/{{uuid}}/source-tags", _list_tags),
    Endpoint("POST", f"{PREFIX}/source-tag/{{uuid}}/update", _update_tag, "admin"),
    Endpoint("DELETE", f"{PREFIX}/source-tag/{{uuid}}/delete", _delete_tag, "admin"),
)
