"""The work of answering a turn: from its submission, by way of the job queue and a worker, to its end."""
