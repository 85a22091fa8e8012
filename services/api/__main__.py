"""`python -m services.api`."""

from services.api.main import ApiSettings, serve
from shared.process import run

if __name__ == "__main__":
    run("api", ApiSettings, serve)
