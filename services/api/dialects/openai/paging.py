"""Lists as OpenAI has them: so many items after the one that is named, newest first unless asked otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from services.api.dialects import Incoming
from services.api.dialects.bodies import Query, read_query

LIMIT_MAX = 100


class PageQuery(Query):
    """What every list takes."""

    after: str | None = None
    limit: int = 20
    order: Literal["asc", "desc"] = "desc"


def read_known(model: type[PageQuery], call: Incoming) -> PageQuery:
    """The parameters that a list knows; all others are ignored. Raises ServiceError(invalid_request)."""
    return read_query(model, [(name, value) for name, value in call.query if name in model.model_fields])


def listed(items: Sequence[Mapping[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """The page with these items."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def bounded(limit: int) -> int:
    """How many are given to who asks for so many."""
    return min(max(1, limit), LIMIT_MAX)
