"""The ids of chatbots in Chatzuri's form: 21 characters that are safe in addresses, another spelling of Parley's id."""

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from uuid import RFC_4122, UUID

from pydantic import TypeAdapter, ValidationError

from shared.contracts.base import is_id
from shared.contracts.chatbots import ChatbotReference
from shared.contracts.problems import refused

_REFERENCE: TypeAdapter[str] = TypeAdapter(ChatbotReference)
# Of the 128 bits of a UUIDv7, 6 are the same in all. The 122 others fit into the 126 of 21 characters; the first of
# these is therefore a capital letter, which no slug has.
_SHORT = re.compile(r"[A-D][A-Za-z0-9_-]{20}")
_LOW_BITS = 62
_MIDDLE_BITS = 12


def shown_id(id_: str) -> str:
    """Parley's id as this API has it; one that is no UUIDv7 stays as it is."""
    uuid = UUID(id_)
    if uuid.variant != RFC_4122 or uuid.version != 7:
        return id_
    high, middle, low = uuid.int >> 80, _low(uuid.int >> 64, _MIDDLE_BITS), _low(uuid.int, _LOW_BITS)
    number = (high << _MIDDLE_BITS | middle) << _LOW_BITS | low
    # Two bits more make whole bytes of them, and a 22nd character.
    return urlsafe_b64encode((number << 2).to_bytes(16, "big")).decode()[:21]


def reference(text: str) -> str:
    """The id that was shown as `text`, or Parley's own id, number or slug of a chatbot, as the store takes them.

    Raises ServiceError(not_found) for what can name none.
    """
    if _SHORT.fullmatch(text):
        number = int.from_bytes(urlsafe_b64decode(text + "A==")) >> 2
        high, middle = number >> _MIDDLE_BITS + _LOW_BITS, _low(number >> _LOW_BITS, _MIDDLE_BITS)
        return str(UUID(int=high << 80 | 7 << 76 | middle << 64 | 2 << 62 | _low(number, _LOW_BITS)))
    try:
        return _REFERENCE.validate_python(text.lower() if is_id(text.lower()) else text)
    except ValidationError:
        raise refused("not_found", "There is no such chatbot.") from None


def _low(number: int, bits: int) -> int:
    return number & (1 << bits) - 1
