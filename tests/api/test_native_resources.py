"""The native API shows of each resource what it always has, and nothing that is there for other dialects alone."""

from datetime import UTC, date, datetime

import orjson
import pytest

from services.api.dialects.native.events import NativeEvents
from services.api.dialects.native.resources import native_json
from shared.contracts.accounts import DayOfUsage, UsagePage
from shared.contracts.base import Contract
from shared.contracts.chatbots import Chatbot, ChatbotPage
from shared.contracts.resources import Citation, ConversationMessage, MessagePage, Run
from shared.contracts.sources import Source, SourcePage

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
NOW = datetime.now(UTC)

CHATBOT = Chatbot(
    id=ID,
    number=1,
    name="Guide",
    slug="guide",
    model=None,
    temperature=None,
    instructions=None,
    metadata={},
    foreign={"other": {"a": 1}},
    foreign_keys=("other:1",),
    created_at=NOW,
    updated_at=NOW,
)
SOURCE = Source(
    id=ID,
    chatbot_id=ID,
    number=1,
    type="file",
    title="A",
    url=None,
    file_name="a.txt",
    size=1,
    words=1,
    tokens=1,
    status="ready",
    reason=None,
    passages=1,
    embedding_model=None,
    foreign={"other": {"a": 1}},
    created_at=NOW,
    updated_at=NOW,
)
DAY = DayOfUsage(
    date=date(2026, 1, 1), runs=1, input_tokens=1, output_tokens=1, estimated=False, input_words=1, output_words=1
)
CITATION = Citation(source_id=ID, source_number=7, title="A", passage="words", score=1.0)
RUN = Run(
    id=ID,
    conversation_id=None,
    status="completed",
    attempt=1,
    model="m",
    output="Hi",
    finish_reason="stop",
    usage=None,
    error=None,
    receipt=None,
    citations=(CITATION,),
    metadata={},
    created_at=NOW,
    started_at=NOW,
    finished_at=NOW,
)
MESSAGE = ConversationMessage(
    id=f"{ID}.1", role="assistant", content="Hi", run_id=ID, status="completed", citations=(CITATION,), created_at=NOW
)

CITATION_FIELDS = {"source_id", "title", "passage", "score"}
FIELDS: dict[type[Contract], set[str]] = {
    Chatbot: {
        "id",
        "number",
        "name",
        "slug",
        "model",
        "temperature",
        "instructions",
        "metadata",
        "created_at",
        "updated_at",
    },
    Source: {
        "id",
        "chatbot_id",
        "number",
        "type",
        "title",
        "url",
        "status",
        "reason",
        "passages",
        "embedding_model",
        "created_at",
        "updated_at",
    },
    DayOfUsage: {"date", "key_id", "chatbot_id", "runs", "input_tokens", "output_tokens", "estimated"},
}


@pytest.mark.parametrize(
    "page",
    [
        ChatbotPage(data=(CHATBOT,), next_cursor=None, total=1),
        SourcePage(data=(SOURCE,), next_cursor=None, total=1),
        UsagePage(data=(DAY,), next_cursor=None),
    ],
    ids=lambda page: type(page).__name__,
)
def test_a_resource_is_shown_as_it_always_was_alone_and_in_a_page(page: ChatbotPage | SourcePage | UsagePage) -> None:
    shown = orjson.loads(native_json(page))
    [in_page] = shown["data"]
    assert set(shown) == {"data", "next_cursor"}
    assert set(in_page) == FIELDS[type(page.data[0])]
    assert orjson.loads(native_json(page.data[0])) == in_page


def test_citations_are_shown_as_they_always_were_in_runs_messages_and_the_last_word_of_a_stream() -> None:
    message = orjson.loads(native_json(MessagePage(data=(MESSAGE,), next_cursor=None)))["data"][0]
    last_word = NativeEvents(ID).ended(1, 2, RUN).split(b"data: ", 1)[1].strip()
    for shown in (orjson.loads(native_json(RUN)), message, orjson.loads(last_word)["run"]):
        assert [set(citation) for citation in shown["citations"]] == [CITATION_FIELDS]
