"""The page's routes in a real server: what they tell, whom they obey, and what they never give away."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from graphs import run_json, workflow
from listening import Page
from PIL import Image


def ask(server, route, body=None, headers=None, **query):
    """(status, answer); with a body a POST as the page sends it."""
    url = f"{server.url}/api/lumina2/{route}?{urllib.parse.urlencode(query)}"
    given = {"Content-Type": "application/json", **(headers or {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, given), timeout=120) as answer:
            content = answer.read()
            return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def shown(prompt, key="train"):
    """A node of a prompt as the page describes it."""
    node = prompt[key]
    linked = {name: value[0] for name, value in node["inputs"].items() if isinstance(value, list)}
    return {
        "type": node["class_type"],
        "widgets": {name: value for name, value in node["inputs"].items() if name not in linked},
        "inputs": {name: shown(prompt, origin) for name, origin in linked.items()},
    }


def wait_for(what, limit_s=120):
    deadline = time.monotonic() + limit_s
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def trained(server):
    server.run(workflow("routed", steps=6))
    pictures = server.base / "output" / "lumina2" / "routed" / "samples" / "step-6"
    pictures.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (400, 200), "red").save(pictures / "0.png")
    return server


def test_a_run_is_told_from_its_folder(trained):
    _, listed = ask(trained, "runs", name="routed")
    assert [(run["run_id"], run["status"], run["step"]) for run in listed["runs"]] == [("routed", "finished", 6)]
    assert ask(trained, "runs", name="another")[1] == {"runs": []}
    _, run = ask(trained, "run", run_id="routed")
    assert run["lora_name"] == "lumina2/routed.safetensors"
    assert run["changed"]["learning_rate"] == [1e-3, 1e-4]
    assert [each["step"] for each in run["checkpoints"]] == [6]
    _, curves = ask(trained, "curves", run_id="routed")
    assert curves["step"] == list(range(1, 7))
    assert ask(trained, "curves", run_id="routed", after=curves["next"])[1]["step"] == []
    assert ask(trained, "run", run_id="nothing")[0] == 404
    assert "no training run 'nothing'" in ask(trained, "run", run_id="nothing")[1]["error"]


def test_a_run_is_taken_elsewhere(trained):
    _, run = ask(trained, "run", run_id="routed")
    assert [(each["pictures"], each["sizes"]) for each in run["data"]["datasets"]] == [(16, ["64×64"])]
    _, written = ask(trained, "simpletuner", run_id="routed")
    config = written["files"]["config.json"]
    assert (config["tracker_run_name"], config["max_train_steps"], config["lora_rank"]) == ("routed", 6, 16)
    status, lora = ask(trained, "checkpoint", run_id="routed", step=6)
    folder = trained.base / "output" / "lumina2" / "routed"
    assert (status, lora) == (200, (folder / "checkpoint-6" / "lora.safetensors").read_bytes())
    assert ask(trained, "checkpoint", run_id="routed", step=5)[0] == 404
    assert ask(trained, "checkpoint", run_id="..", step=6)[0] == 404
    ended = (folder / "run.json").stat().st_mtime
    assert ask(trained, "ended", since=int(ended) - 1)[1]["ended"] >= 1
    assert ask(trained, "ended", since=int(ended) + 9)[1] == {"ended": 0}


def test_every_preset_is_possible(trained):
    known = trained.ask("/object_info")
    settings = defaults(known["Lumina2TrainingSettings"])
    for kind, presets in ask(trained, "presets")[1].items():
        train = defaults(known[kind]) | {"run_name": "never trained"}
        for preset in presets["memory"] + presets["subject"]:
            assert preset["widgets"].keys() <= train.keys()
            assert preset["settings"].keys() <= settings.keys()
            config = {"type": "Lumina2TrainingSettings", "widgets": settings | preset["settings"], "inputs": {}}
            node = {"type": kind, "widgets": train | preset["widgets"], "inputs": {"config": config}}
            told = ask(trained, "plan", {"node": node})[1]
            assert (told.get("error"), told.get("does")) == (None, "new"), (kind, preset["name"])
    assert [each["name"] for each in presets["subject"]] == ["style", "character", "concept"]


def defaults(known):
    """The widgets of a node with the values that a new one has."""
    values = {}
    for name, (kind, *more) in {**known["input"].get("required", {}), **known["input"].get("optional", {})}.items():
        options = more[0] if more else {}
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices or "default" in options:
            values[name] = options.get("default", choices and choices[0])
    return values


def test_pictures_are_given_whole_and_small_and_no_other_file(trained):
    path = "samples/step-6/0.png"
    status, whole = ask(trained, "sample", run_id="routed", path=path)
    assert (status, whole[:4]) == (200, b"\x89PNG")
    _, small = ask(trained, "sample", run_id="routed", path=path, size=100)
    assert (small[:4], small[8:12]) == (b"RIFF", b"WEBP")
    assert len(small) < len(whole) + 2000
    outside = trained.base / "output" / "outside.png"
    Image.new("RGB", (9, 9)).save(outside)
    for run_id, path in (
        ("routed", "../../outside.png"),
        ("routed", str(outside)),
        ("routed", "run.json"),
        ("..", "outside.png"),
        ("", "outside.png"),
    ):
        status, answer = ask(trained, "sample", run_id=run_id, path=path)
        assert (status, list(answer)) == (404, ["error"])


def test_other_sites_change_nothing(trained):
    said = "Only this ComfyUI's own page may ask for that."
    assert ask(trained, "delete", {"run_id": "routed"}, {"Content-Type": "text/plain"}) == (403, {"error": said})
    # Newer ComfyUIs refuse it by themselves, without a word.
    refused = ask(trained, "delete", {"run_id": "routed"}, {"Sec-Fetch-Site": "cross-site"})
    assert refused in [(403, {"error": said}), (403, {})]
    assert ask(trained, "delete", run_id="routed")[0] in (404, 405), "a GET changes nothing"
    assert ask(trained, "delete", ["routed"])[0] == 400
    assert run_json(trained, "routed")["status"] == "finished"


def test_commands_need_a_run_that_goes_on(trained):
    for name in ("stop", "pause", "resume", "save", "sample", "learning-rate"):
        status, answer = ask(trained, name, {"run_id": "routed", "rate": 1})
        assert status == 404
        assert "does not go on" in answer["error"]


def test_what_run_will_do_and_need_is_told_before(trained):
    def plan(**changed):
        prompt = workflow("routed", steps=6)
        prompt["train"]["inputs"] |= changed
        return ask(trained, "plan", {"node": shown(prompt)})[1]

    assert (plan()["does"], plan()["folder"]) == ("trained", "routed")
    assert (plan(steps=9)["does"], plan(steps=9)["step"]) == ("continues", 6)
    assert (plan(seed=43)["does"], plan(seed=43)["differs"]) == ("changed", ["seed"])
    assert plan(run_name="another name")["does"] == "new"
    assert plan(rank=4)["over"] == {"rank": 16}, "LoRA Settings win over the widget"
    assert "cannot be a folder" in plan(run_name="a/b")["error"]
    assert "batch_size is 0" in plan(batch_size=0)["error"]
    unseen = shown(workflow("routed"))
    unseen["inputs"]["adapter"] = None
    assert ask(trained, "plan", {"node": unseen})[1]["does"] == "unknown"
    assert ask(trained, "plan", {"node": "no node"})[0] == 400

    small, large = workflow(), workflow()
    large["train"]["inputs"]["batch_size"] = 64
    needs = [ask(trained, "forecast", {"node": shown(each)})[1] for each in (small, large)]
    assert all(each["known"] and each["free"] > 0 for each in needs)
    assert needs[0]["total"] < needs[1]["total"]
    assert sum(needs[0]["parts"].values()) == needs[0]["total"]
    assert ask(trained, "forecast", {"node": {**unseen, "inputs": {}}})[1]["known"] is False


def test_load_dataset_shows_what_it_read(trained):
    folder = trained.base / "input" / "shown"
    folder.mkdir()
    for number, size in enumerate(((64, 64), (64, 64), (40, 40))):
        Image.new("RGB", size, "red").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("red")
    (folder / "broken.png").write_bytes(b"no picture")
    prompt = {key: node for key, node in workflow(folder="shown").items() if key in ("model", "data", "latents")}
    (read,) = trained.run(prompt)["data"]["lumina2_dataset"]
    assert (read["pictures"], read["buckets"], read["enlarged"]) == (3, [[64, 64, 3]], 1)
    assert [sentence for sentence in read["problems"] if "broken.png" in sentence]
    assert len(read["crops"]) == 3
    with urllib.request.urlopen(read["crops"][0]) as crop:
        assert Image.open(crop).size == (64, 64)


def test_folders_are_completed_inside_input_only(trained):
    for name in ("cats/10_tabby", "cats/5_black", "Catalogue", ".hidden"):
        (trained.base / "input" / name).mkdir(parents=True)
    assert ask(trained, "folders", typed="cat")[1]["folders"] == ["Catalogue", "cats"]
    assert ask(trained, "folders", typed="cats/1")[1]["folders"] == ["cats/10_tabby"]
    assert ask(trained, "folders", typed="bundled: nano-c")[1]["folders"] == ["bundled: nano-concept"]
    for typed in ("../", "/", "cats/../../", "/etc/"):
        assert ask(trained, "folders", typed=typed)[1]["folders"] == []


def test_a_running_training_obeys(server):
    graph = workflow("obeying", steps=100_000)
    queued = server.queue(graph)

    def state():
        found = ask(server, "runs", name="obeying")[1]["runs"]
        return found[0] if found and found[0]["mine"] else None

    def tell(name, **more):
        assert ask(server, name, {"run_id": "obeying", **more}) == (200, {"ok": True})

    def events():
        file = server.base / "output" / "lumina2" / "obeying" / "events.jsonl"
        return [json.loads(line).get("event") for line in file.read_text().splitlines()]

    try:
        with Page(server.url) as page:
            began = time.monotonic()
            obeys(server, state, tell, events)
            most = (time.monotonic() - began) * 4 + 3  # four a second, and those of the beginning
    finally:
        ask(server, "stop", {"run_id": "obeying"})
        server.wait(queued)
    of_others = page.count(lambda message: message["type"] == "progress" and message["data"]["node"] != "train")
    begins_and_ends = 2 * len(graph)  # of which ComfyUI tells by itself
    for kind, besides in {"lumina2.run": 0, "progress": of_others, "progress_state": begins_and_ends}.items():
        assert 3 < page.count(lambda message, kind=kind: message["type"] == kind) <= most + besides, kind
    assert run_json(server, "obeying")["status"] == "stopped"
    assert run_json(server, "obeying")["learning_rate"] == 5e-4


def obeys(server, state, tell, events):
    wait_for(lambda: state() and state()["step"] > 3)
    tell("pause")
    wait_for(lambda: "Paused" in events())
    assert state()["status"] == "paused"
    status, answer = ask(server, "delete", {"run_id": "obeying"})
    assert (status, "Stop it first" in answer["error"]) == (404, True)
    tell("learning-rate", rate=5e-4)
    assert "choose a number" in ask(server, "learning-rate", {"run_id": "obeying", "rate": "fast"})[1]["error"]
    assert "above 0" in ask(server, "learning-rate", {"run_id": "obeying", "rate": 0})[1]["error"]
    tell("save")
    tell("resume")
    wait_for(lambda: "LoRASaved" in events())


def test_a_deleted_run_is_forgotten_by_comfyui_too(trained):
    prompt = workflow("going away", steps=3)
    trained.run(prompt)
    lora = trained.base / "models" / "loras" / "lumina2" / "going away.safetensors"
    assert lora.exists()
    status, answer = ask(trained, "delete", {"run_id": "going away"})
    assert (status, sorted(answer["deleted"])) == (200, ["going away", "going away.safetensors"])
    assert not lora.exists()
    time.sleep(3)  # right behind a prompt, ComfyUI collects garbage before it hears
    trained.run(prompt)
    assert lora.exists(), "the same prompt trains again, though nothing in it changed"
    assert (trained.base / "output" / "lumina2" / "routed").exists()
