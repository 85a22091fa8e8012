"""Other people's clients, unmodified, against the whole of Parley: what they expect of the APIs that it speaks."""
