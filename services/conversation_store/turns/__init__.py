"""What a turn is, what may become of it and what its prompt holds: decided here, without I/O."""
