"""Asks the service in this container whether it is ready: exit code 0 if it is, else 1 and what it says."""

import sys
from http.client import HTTPConnection, HTTPException

PORT = 8080


def ready(port: int = PORT) -> tuple[bool, str]:
    """Whether `/readyz` on this machine's `port` answers 200 within 5 s, and its answer or what went wrong."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        return response.status == 200, response.read(1000).decode(errors="replace")
    except (OSError, HTTPException) as error:
        return False, str(error)
    finally:
        connection.close()


if __name__ == "__main__":
    is_ready, said = ready()
    print(said)
    sys.exit(0 if is_ready else 1)
