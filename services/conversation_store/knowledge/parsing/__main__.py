"""The process that reads one file: its limits first, then the file on standard input, and what came of it as JSON.

python -m services.conversation_store.knowledge.parsing TYPE CPU_SECONDS MEMORY_BYTES CHARACTERS_MAX
"""

import resource
import sys
from typing import Any

import orjson

from services.conversation_store.knowledge.parsing import Unreadable, too_long


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        resource.setrlimit(name, (most, most))


def _read(kind: str, content: bytes, characters_max: int) -> dict[str, Any]:
    # Imported under the limits, and only what this file needs.
    from services.conversation_store.knowledge.parsing import formats

    if kind == "sitemap":
        pages, sitemaps = formats.sitemap(content)
        return {"pages": pages, "sitemaps": sitemaps}
    parsed = formats.READERS[kind](content)
    if not parsed.text.strip():
        raise Unreadable(
            "The PDF holds no text: pages that are pictures, as scanned ones are, cannot be read."
            if kind == "pdf"
            else "The file holds no text."
        )
    if len(parsed.text) > characters_max:
        raise too_long(characters_max)
    return {"title": parsed.title, "text": parsed.text}


def main() -> None:
    """Reads one file."""
    kind = sys.argv[1]
    cpu_seconds, memory_bytes, characters_max = map(int, sys.argv[2:])
    _limit(cpu_seconds, memory_bytes)
    try:
        told = _read(kind, sys.stdin.buffer.read(), characters_max)
    except Unreadable as error:
        told = {"refused": str(error)}
    except MemoryError:
        told = {"refused": f"Reading the file takes more than {memory_bytes // 2**20} MiB of memory."}
    except RecursionError:
        told = {"refused": "The file is nested too deeply."}
    except Exception:
        # Of whatever kind: what the readers raise for a broken file is without number.
        told = {"refused": f"The {kind} is broken: it cannot be read."}
    sys.stdout.buffer.write(orjson.dumps(told))


if __name__ == "__main__":
    main()
