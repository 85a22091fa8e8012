"""What a tenant has used, day by day."""

from collections.abc import Generator
from datetime import date, timedelta
from typing import Any

import orjson

from services.api.dialects import Answer, Command, Endpoint, Incoming, Steps, asking
from services.api.dialects.ablt.validation import JSON, entry, read, unprocessable
from services.api.dialects.bodies import Lenient
from shared.contracts.accounts import USAGE_DAYS_MAX, DayOfUsage, GetUsage
from shared.contracts.base import Request
from shared.contracts.store import PAGE_LIMIT_MAX

PATH = "/v1/user/usage-statistics"
DAYS_MAX = 10 * USAGE_DAYS_MAX
ALL_USERS = -1

_ONE_DAY = timedelta(days=1)


class Wanted(Lenient):
    """What POST /v1/user/usage-statistics takes; both days are included."""

    user_id: int = ALL_USERS
    start_date: date
    end_date: date


def _get_statistics(call: Incoming) -> Command:
    wanted = read(Wanted, call.body)
    if isinstance(wanted, Answer):
        return wanted
    if (wanted.end_date - wanted.start_date).days >= DAYS_MAX:
        return unprocessable(entry("value_error", f"at most {DAYS_MAX} days at a time", "end_date"))
    return _counted(call.tenant, wanted)


def _counted(tenant: str, wanted: Wanted) -> Steps:
    end_user = None if wanted.user_id == ALL_USERS else str(wanted.user_id)
    used: dict[date, DayOfUsage] = {}
    first = wanted.start_date
    while first <= wanted.end_date:
        last = first + min(wanted.end_date - first, (USAGE_DAYS_MAX - 1) * _ONE_DAY)
        used |= yield from _used(tenant, end_user, first, last)
        if last == date.max:
            break
        first = last + _ONE_DAY
    count = max(0, (wanted.end_date - wanted.start_date).days + 1)
    days = [wanted.start_date + number * _ONE_DAY for number in range(count)]
    items = [_figures(used.get(day)) for day in days]
    total = {name: sum(item[name] for item in items) for name in _figures(None)}
    told = [{**item, "date": day.isoformat()} for day, item in zip(days, items, strict=True)]
    return Answer(200, orjson.dumps({"total": total, "items": told}), JSON)


def _used(
    tenant: str, end_user: str | None, first: date, last: date
) -> Generator[Request[Any], Any, dict[date, DayOfUsage]]:
    """The days of usage among these."""
    used: dict[date, DayOfUsage] = {}
    cursor: str | None = None
    while True:
        page = yield from asking(
            GetUsage(tenant=tenant, first=first, last=last, end_user=end_user, limit=PAGE_LIMIT_MAX, cursor=cursor)
        )
        used |= {day.date: day for day in page.data}
        if (cursor := page.next_cursor) is None:
            return used


def _figures(day: DayOfUsage | None) -> dict[str, int]:
    """The spelling is the API's own. What a chatbot's instructions and sources add is counted as the client's."""
    tokens = (day.input_tokens, day.output_tokens) if day is not None else (0, 0)
    words = (day.input_words, day.output_words) if day is not None else (0, 0)
    return {
        "original_tokens": tokens[0],
        "enchancement_tokens": 0,
        "response_tokens": tokens[1],
        "total_tokens": sum(tokens),
        "original_words": words[0],
        "enchancement_words": 0,
        "response_words": words[1],
        "total_words": sum(words),
    }


ENDPOINTS = (Endpoint("POST", PATH, _get_statistics),)
