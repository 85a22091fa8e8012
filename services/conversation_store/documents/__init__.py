"""What the documents in MongoDB hold, and what they are to the rest of the store: one module per kind, pure."""
