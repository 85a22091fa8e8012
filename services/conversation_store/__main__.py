"""`python -m services.conversation_store` serves; with `migrate` it prepares the database and ends."""

from services.conversation_store.main import main

main()
