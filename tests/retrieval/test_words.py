"""How often the passage that answers a question is found by the question's words alone."""

from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import Repository
from shared.broker import open_broker
from tests.retrieval.quality import PAIRS, TEXTS, found_among_the_first, well_read
from tests.stack.rooms import Vhost

ENOUGH = 24


def test_the_pairs_are_thirty_and_their_answers_stand_in_the_texts() -> None:
    texts = [path.read_text() for path in TEXTS]
    assert len(PAIRS) == 30
    for pair in PAIRS:
        assert sum(pair.passage in text for text in texts) == 1, pair


async def test_of_thirty_questions_enough_find_their_passage_by_words_alone(
    repository: Repository, vhost: Vhost
) -> None:
    async with (
        open_broker(vhost.amqp_url("parley-store"), "conversation_store") as broker,
        well_read(repository, broker, None) as chatbot,
    ):
        found = await found_among_the_first(Retrieval(repository, broker, embedding_model=None), chatbot)
    assert len(found) >= ENOUGH
