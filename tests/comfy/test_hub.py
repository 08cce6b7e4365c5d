"""A training that tells everybody, and Push to Hub, in a real server; and that no secret stays anywhere behind."""

import json

import pytest
from comfy_server import ServerError
from graphs import sampled, workflow
from local_hub import local_hub
from PIL import Image

SECRETS = {"HF_TOKEN": "hf_SecretOfTheServer", "WANDB_API_KEY": "5ecre7" * 6 + "5ecr", "HOOK": "SecretOfTheHook"}


@pytest.fixture(scope="module")
def told():
    with local_hub(SECRETS["HF_TOKEN"]) as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("WANDB_MODE", "offline")
        yield hub


@pytest.fixture(scope="module")
def telling(told, start):
    """A server whose environment knows the secrets."""
    return start()


def graph(server, **tracking):
    hook = server.base / "hook.json"
    hook.write_text(json.dumps({"webhook_type": "raw", "callback_url": "http://127.0.0.1:9/{env:HOOK}"}))
    told = {
        "local_report": True,
        "tensorboard": True,
        "wandb": True,
        "tracker_project_name": "tests",
        "tracker_run_name": "",
        "push_to_hub": True,
        "push_checkpoints_to_hub": True,
        "hub_model_id": "us/told",
        "model_card_private": True,
        "model_card_note": "",
        "webhook_config": str(hook),
    }
    made = workflow("told", steps=4)
    made["tracking"] = {"class_type": "Lumina2ReportSettings", "inputs": {**told, **tracking}}
    made["train"]["inputs"]["config"] = ["tracking", 0]
    return made


def test_everybody_is_told_and_no_secret_stays(telling, told):
    made = graph(telling)
    made["push"] = {
        "class_type": "Lumina2PushToHub",
        "inputs": {"run_or_lora": ["train", 2], "repo_id": "me/again", "private": False, "note": "Once more."},
    }
    made |= sampled("after", ["train", 0])
    telling.run(made)
    run = telling.base / "output" / "lumina2" / "told"
    lora = telling.base / "models" / "loras" / "lumina2" / "told.safetensors"
    assert told.repos["us/told"]["private"]
    assert not told.repos["me/again"]["private"]
    for repo in ("us/told", "me/again"):
        files = told.repos[repo]["files"]
        assert files["told.safetensors"] == lora.read_bytes()
        assert "pytorch_lora_weights.safetensors" in files
    assert "checkpoints/told-4.safetensors" in told.repos["us/told"]["files"]
    assert "Once more." in told.repos["me/again"]["files"]["README.md"].decode()
    assert list((run / "tensorboard").glob("events.out.tfevents*"))
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert "finished" in (run / "report.html").read_text(encoding="utf-8")

    files = [path for path in telling.base.rglob("*") if path.is_file() and not path.is_symlink()]
    pictures = [path for path in files if path.suffix == ".png" and path.name.startswith("after")]
    texts = {str(path): path.read_bytes() for path in files}
    texts |= {f"{path} metadata": str(Image.open(path).info).encode() for path in pictures}
    texts |= {f"hub {path}": content for repo in told.repos.values() for path, content in repo["files"].items()}
    assert any(b"Lumina2PushToHub" in texts[f"{path} metadata"] for path in pictures), "the workflow is in the picture"
    assert telling.log in files
    assert [(n, s) for n, text in texts.items() for s, secret in SECRETS.items() if secret.encode() in text] == []
    assert SECRETS["HF_TOKEN"] not in json.dumps(telling.ask("/history"))


@pytest.mark.parametrize(
    ("tracking", "sentence"),
    [
        ({"hub_model_id": "them/told"}, "may not write to them/told"),
        ({"webhook_config": "https://discord.com/api/webhooks/1/x"}, "webhook_config is not a file"),
        ({"webhook_config": "nowhere.json"}, "cannot be read"),
    ],
)
def test_what_would_fail_later_is_said_before(telling, tracking, sentence):
    made = graph(telling, **tracking)
    made["train"]["inputs"]["run_name"] = "never"
    with pytest.raises(ServerError, match=sentence):
        telling.run(made)
    assert not (telling.base / "output" / "lumina2" / "never").exists()
