"""The answers to `chat.requests`: one module per resource, one function per message."""
