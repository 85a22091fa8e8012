"""What nobody waits for: turns left undone are brought to their end, and what was deleted is removed."""
