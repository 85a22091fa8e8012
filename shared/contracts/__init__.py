"""Every message and resource of Parley, each declared once. Imports pydantic and nothing else."""
