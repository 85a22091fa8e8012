"""A subscriber that holds its frames to the rules of positions."""

from dataclasses import dataclass, field

from shared.contracts.events import FRAME_MAX_BYTES, Frame, MessageDelta, RunStarted, TextWanted, WorkerAlive


@dataclass
class Reader:
    """What a subscriber makes of its frames, as strict as the rules of positions allow."""

    texts: dict[str, str] = field(default_factory=dict)
    started: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    wanted: list[TextWanted] = field(default_factory=list)

    def hear(self, body: bytes, now: float = 0.0) -> None:
        assert len(body) < FRAME_MAX_BYTES
        frame = Frame.read(body)
        self.frames.append(frame)
        self.times.append(now)
        for event in frame.events:
            match event:
                case RunStarted():
                    assert event.offset <= len(self.texts.get(event.run_id, "")), "starts beyond what the reader has"
                    self.texts[event.run_id] = self.texts.get(event.run_id, "")[: event.offset]
                    self.started[event.run_id] = (event.attempt, event.offset, event.model)
                case MessageDelta():
                    assert event.run_id in self.started, "a delta before its run's start"
                    assert event.offset == len(self.texts[event.run_id]), "a gap or a repeat"
                    assert event.text
                    self.texts[event.run_id] += event.text
                case WorkerAlive():
                    for run_id, (attempt, offset) in event.runs.items():
                        assert attempt == self.started[run_id][0]
                        assert offset == len(self.texts[run_id]), "the heartbeat is ahead of what was sent"
                case TextWanted():
                    self.wanted.append(event)
                case _:
                    raise AssertionError(f"a worker does not send {event.type}")
