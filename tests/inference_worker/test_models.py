"""The models file, as a person meets it, and who answers for a model by it."""

import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.inference_worker.main import WorkerSettings
from services.inference_worker.models import ServersFile, open_models
from services.inference_worker.providers import ProviderRefused
from shared.process import load_settings
from tests.fakes.script import Script
from tests.fakes.upstream import FakeUpstream
from tests.inference_worker.jobs import job

SECRET = "sk-s3cret-of-the-test"

GOOD = """
[models."*"]
continuation = "prefill"

[models.small]
base_url = "http://127.0.0.1:9100/v1"
api_key_env = "SMALL_KEY"

[models.large]
base_url = "http://127.0.0.1:9200/v1"
api_key_file = "large.key"
continuation = "prefill"
prefill_parameters = { add_generation_prompt = false, continue_final_message = true }
"""


def test_file_is_read_with_the_keys_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.toml").write_text(GOOD)
    (tmp_path / "large.key").write_text(f"{SECRET}-2\n")
    monkeypatch.setenv("SMALL_KEY", f"{SECRET}-1")
    monkeypatch.setenv("PARLEY_MODELS_FILE", str(tmp_path / "models.toml"))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9300/v1")
    file = load_settings(WorkerSettings).models_file
    assert {name: model.continuation for name, model in file.models.items()} == {
        "*": "prefill",
        "small": "restart",
        "large": "prefill",
    }
    assert file.models["large"].prefill_parameters == {"add_generation_prompt": False, "continue_final_message": True}
    assert {name: key and key.get_secret_value() for name, key in file.server_keys.items()} == {
        "*": None,
        "small": f"{SECRET}-1",
        "large": f"{SECRET}-2",
    }
    assert SECRET not in repr(file)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("models = 3", "models: "),
        ("[models.x]\ncontinuation = 'maybe'", "models.x.continuation: "),
        ("[models.x]\nbase_url = 'localhost:9100'", "models.x.base_url: "),
        ("[models.x]\napi_key = 'sk-s3cret-of-the-test'", "models.x.api_key: "),
        ("[models.x]\napi_key_env = 'NO_SUCH_KEY'", "models.x: "),
        ("[models.x]\nbase_url = 'http://x/'\napi_key_env = 'NO_SUCH_KEY'", "models.x.api_key_env: NO_SUCH_KEY"),
        ("[models.x]\nbase_url = 'http://x/'\napi_key_file = 'none.key'", "models.x.api_key_file: FileNotFoundError"),
        ("[models.x]\nbase_url = 'http://x/'\napi_key_env = 'A'\napi_key_file = 'b'", "models.x: "),
        ("[modles.x]\ncontinuation = 'prefill'", "modles: "),
        ("[models.x\n", "at line 1"),
    ],
)
def test_wrong_file_stops_the_start_and_its_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, place: str
) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    monkeypatch.setenv("PARLEY_MODELS_FILE", str(path))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(SystemExit) as ended:
        load_settings(WorkerSettings)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.match(rf"wrong setting: PARLEY_MODELS_FILE: .*{re.escape(str(path))}.*{re.escape(place)}", said)
    assert SECRET not in said


def test_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARLEY_MODELS_FILE", str(tmp_path / "none.toml"))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(SystemExit):
        load_settings(WorkerSettings)
    assert f"cannot read {tmp_path}/none.toml" in capsys.readouterr().err


async def test_each_model_is_asked_of_its_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", f"{SECRET}-other")
    async with FakeUpstream() as usual, FakeUpstream() as other:
        path = tmp_path / "models.toml"
        path.write_text(
            f"""
            [models."fake?tag=other"]
            base_url = "{other.base_url}"
            api_key_env = "OTHER_KEY"
            [models."fake?tag=here"]
            continuation = "prefill"
            """
        )
        async with open_models(ServersFile.read(path), usual.base_url, SecretStr(f"{SECRET}-usual")) as models:
            for tag in ("other", "here", "unnamed"):
                asked = job(Script(tag=tag))
                text = [piece.text async for piece in models.of(asked.model).provider.stream(asked)]
                assert "".join(text) == Script(tag=tag).text
            assert [models.of(f"fake?tag={tag}").continuation for tag in ("other", "here", "unnamed")] == [
                "restart",
                "prefill",
                "restart",
            ]
        asked_for = {
            request.script.tag: request.headers["Authorization"] for request in (*usual.received, *other.received)
        }
        assert asked_for == {
            "other": f"Bearer {SECRET}-other",
            "here": f"Bearer {SECRET}-usual",
            "unnamed": f"Bearer {SECRET}-usual",
        }
        assert len(other.received) == 1


async def test_model_that_no_server_answers_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('[models.known]\nbase_url = "http://127.0.0.1:9/v1"\n')
    async with open_models(ServersFile.read(path), None, None) as models:
        assert models.of("known").continuation == "restart"
        with pytest.raises(ProviderRefused, match="No model server is configured"):
            await anext(models.of("unknown").provider.stream(job(Script())))
