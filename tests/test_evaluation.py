"""evaluation.py through lmms-eval's own code: scores, manifests, what is kept, what is refused."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="needs requirements-eval.txt")

from lmms_eval.tasks import TaskManager, get_task_dict  # noqa: E402

import clips  # noqa: E402
import evaluation  # noqa: E402
from commands import evaluation_harness  # noqa: E402
from commands.evaluation_attention import WrongAttention  # noqa: E402
from commands.evaluation_manifest import code_digest, weights_digest  # noqa: E402
from commands.evaluation_model import generation_settings, refuse_all_unreadable  # noqa: E402
from paths import ROOT


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def task(home):
    folder = str(ROOT / "benchmarks" / "clips")
    manager = TaskManager(include_path=folder, include_defaults=False, model_name="videonsa")
    task = get_task_dict(["clips_8"], manager, "chat")["clips_8"]
    task.build_all_requests(limit=4)
    return task


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Makes models that keep their answers in this test's folder."""
    monkeypatch.setattr(evaluation_harness.VideoNSA, "folder", tmp_path / "answers")

    def load(folder=ROOT, **arguments):
        return evaluation_harness.VideoNSA(str(folder), **arguments)

    return load


def answer(model, task, requests=None):
    model.task_dict = {"clips_8": task.dataset}
    return [given.text for given in model.generate_until(requests or task.instances)]


def copy_checkpoint(folder):
    """The root checkpoint's files alone, to be changed."""
    folder.mkdir()
    for pattern in ("*.json", "*.py", "*.jinja", "model.safetensors"):
        for file in ROOT.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return folder


def again(model):
    return [bool(record.get("again")) for record in model.records]


OPTIONS = ["red", "green", "blue", "white"]
LISTED = [f"{mark}. {option}" for mark, option in zip("ABCD", OPTIONS, strict=True)]
MLVU = {
    "question": "What colour is it?\n(A) red\n(B) green\n(C) blue\n(D) white",
    "answer": "A",
    "task_type": "count",
}
VIDEOMME = {
    "videoID": "v",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Law",
    "task_type": "OCR Problems",
    "question_id": "001-1",
    "question": "What colour is it?",
    "options": LISTED,
    "answer": "A",
}
LONGVIDEOBENCH = {
    "id": "v_0",
    "video_path": "v.mp4",
    "question": "How many bars are white?",
    **{f"option{index}": option for index, option in enumerate(["2", "1", "5", "N/A", "N/A"])},
    "correct_choice": 2,
    "duration": 2.0,
    "duration_group": 15,
    "question_category": "S2E",
}
TIMESCOPE = {
    "id": "1",
    "video": "v.mp4",
    "input": "\n".join(["What colour is it?", *LISTED]),
    "answer": "C",
    "type": "QA",
    "length": 60,
}
TOMATO = {
    "id": "1",
    "video_path": "videos/v.mp4",
    "question": "What colour is it?",
    "options": OPTIONS,
    "answer": 1,
    "reason_type": "count",
    "demonstration_type": "human",
}
VSI_CHOICES = [
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
]
VSI_NUMBERS = [
    "object_abs_distance",
    "object_counting",
    "object_size_estimation",
    "room_size_estimation",
]
VSI = {"dataset": "scannet", "scene_name": "v"}


def stand_ins(folder):
    """Data in the layout of the benchmarks' repositories; returns (folder, HF_HOME, task names).

    `datasets` takes a folder of a repository's name for the repository, and lmms-eval does not
    download videos that lie where it would unpack them.
    """
    home = folder / "home"

    def repository(name, rows, videos, split="test"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for video in videos:
            (home / video).parent.mkdir(parents=True, exist_ok=True)
            clips.write_clip(home / video, 20)

    repository(
        "sy1998/MLVU_Test",
        [{**MLVU, "video_name": f"{index}.mp4"} for index in range(8)],
        [f"mlvu_test/{index}.mp4" for index in range(6)],
    )
    (home / "mlvu_test" / "6.mp4").write_bytes(b"")  # and there is no 7.mp4
    repository("lmms-eval/Video-MME", [VIDEOMME], ["videomme/data/v.mp4"])
    place = "datasets/longvideobench/videos/v.mp4"
    repository("longvideobench/LongVideoBench", [LONGVIDEOBENCH], [place], "validation")
    repository("Apollo-LMMs/TimeScope", [TIMESCOPE], ["timescope/v.mp4"])
    repository("Apollo-LMMs/LongTimeScope2", [TIMESCOPE], ["longtimescope/v.mp4"])
    repository("lmms-eval/TOMATO", [TOMATO], ["TOMATO/videos/v.mp4"])
    choices = {"question": "Which?", "options": LISTED, "ground_truth": "B"}
    numbers = {"question": "How many?", "options": None, "ground_truth": "2"}
    rows = [{**VSI, **choices, "question_type": kind} for kind in VSI_CHOICES]
    rows += [{**VSI, **numbers, "question_type": kind} for kind in VSI_NUMBERS]
    repository("nyu-visionx/VSI-Bench", rows, ["vsibench/scannet/v.mp4"])
    configuration = "- config_name: full\n  data_files:\n  - split: test\n    path: test.jsonl"
    card = folder / "nyu-visionx" / "VSI-Bench" / "README.md"
    card.write_text(f"---\nconfigs:\n{configuration}\n---\n")
    tasks = "mlvu_test,videomme,longvideobench_val_v,timescope,longtimescope,tomato,vsibench"
    return folder, home, tasks


def test_stock_tasks_run_and_a_killed_run_goes_on(tmp_path):
    folder, home, tasks = stand_ins(tmp_path)
    command = [sys.executable, ROOT / "evaluation.py", "--model", ROOT, "--preset", "mlvu"]
    command += ["--tasks", tasks, "--output_path", tmp_path / "out"]
    command += ["--model_args", "num_frames=4,min_pixels=784,max_pixels=12544"]
    command = list(map(str, command))
    settings = {
        "cwd": folder,
        "env": {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
    }
    process = subprocess.Popen(command, **settings)
    answers = tmp_path / "out" / "answers"
    while not any(file.stat().st_size for file in answers.glob("*/*.jsonl")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list((tmp_path / "out").rglob("*_results.json"))

    done = subprocess.run(command, **settings)
    assert done.returncode == 0, done.stderr.decode()
    manifests = [read(file) for file in (tmp_path / "out").rglob("*_manifest_*.json")]
    manifests = {manifest["task"]["name"]: manifest for manifest in manifests}
    assert set(manifests) == set(tasks.split(","))
    for one in manifests.values():
        assert one["proof"]["sparse_share_of_tokens"] == one["proof"]["sparse_share_of_layers"] == 1
        assert one["samples"]["scored"] == one["samples"]["of"] == len(one["per_sample"])
    kept = [one["samples"].pop("from_an_earlier_run") for one in manifests.values()]
    assert 1 <= sum(kept) < 21
    questions = {name: one["multiple_choice"]["questions"] for name, one in manifests.items()}
    assert questions == {**dict.fromkeys(manifests, 1), "mlvu_test": 8, "vsibench": 6}

    manifest = manifests["mlvu_test"]
    assert manifest["samples"] == {"scored": 8, "of": 8, "answered": 6, "undecodable": 2}
    reasons = [sample["reason"] for sample in manifest["undecodable"]]
    assert "6.mp4 is empty" in reasons[0] and "7.mp4 does not exist" in reasons[1]
    assert list(manifest["scores"]) == ["mlvu_percetion_score"]
    assert manifest["task"]["dataset"] == "sy1998/MLVU_Test"
    (video,) = manifest["per_sample"][0]["videos"]
    assert video == {"frames": 4, "height": 84, "width": 140, "fps": 2.0, "tokens": 30}
    assert manifest["preset"]["yours"]["num_frames"] == "4"
    (applied,) = manifest["generation"]["by_task"]
    assert applied["applied"]["max_new_tokens"] == 16
    assert manifest["settings"]["video"]["total_pixels"] == 90316800


def read(file):
    return json.loads(file.read_text())


def run(tmp_path, *arguments):
    common = ["--model", ROOT, "--tasks", "clips_8", "--limit", 2, "--output_path", tmp_path]
    return evaluation.main(list(map(str, [*common, *arguments])))


def test_a_dense_run_says_so_and_the_table_has_both(tmp_path, capsys):
    assert run(tmp_path, "--attention", "dense") == 0
    (manifest,) = [read(file) for file in tmp_path.rglob("*_manifest_clips_8.json")]
    assert manifest["settings"]["attention"]["asked"] == "dense"
    assert not any(manifest["settings"]["attention"]["gates"].values())
    assert manifest["proof"]["sparse_tokens_by_layer"] == [0] * 4
    assert manifest["proof"]["vision_tokens"] == 2 * 64
    assert manifest["samples"]["scored"] == 2 and manifest["samples"]["of"] == 80

    assert run(tmp_path, "--branches", "compressed,window", "--window", 16) == 0
    capsys.readouterr()
    assert evaluation.main(["--compare", str(tmp_path)]) == 0
    head, _, weights, code, *rows = capsys.readouterr().out.splitlines()
    assert ", dense" in head and ", sparse, compressed+window, b4 w16" in head
    digest = manifest["settings"]["checkpoint"]["weights"]
    assert weights == f"|  | weights | {digest} | {digest} |" and "code" in code
    assert "| clips_8 | samples | 2 of 80 | 2 of 80 |" in rows


def test_a_task_of_ones_own_runs_as_the_docs_have_it(tmp_path, monkeypatch):
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    (tasks / "mine_task.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    shutil.copyfile(ROOT / "examples/clips/circle.mp4", tasks / "a.mp4")
    row = {"video": "a.mp4", "question": "What colour is the shape?", "answer": "Red"}
    (tasks / "mine.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(ROOT), "--tasks", "mine", "--include_path", "tasks"]
    assert evaluation.main([*arguments, "--output_path", "out"]) == 0
    (manifest,) = Path("out").rglob("*_manifest_mine.json")
    manifest = read(manifest)
    (sample,) = manifest["per_sample"]
    assert sample["files"][0]["file"] == "a.mp4" and sample["vision_tokens"] == 128
    assert manifest["scores"] == {"exact_match": 1.0}  # of "red", whose case the task ignores


NO_VISION = """

make_any_plan = make_plan


def make_plan(vision, *arguments, **settings):
    return make_any_plan(torch.zeros_like(vision), *arguments, **settings)
"""


def test_attention_forced_dense_ends_the_run_without_a_score(tmp_path, capsys):
    folder = copy_checkpoint(tmp_path / "forced")
    # Every row through the dense function, as if there were only text.
    modeling = folder / "modeling_videonsa.py"
    modeling.write_text(modeling.read_text() + NO_VISION)
    assert run(tmp_path / "out", "--model", folder) == 1
    assert "0 to 0 went through the sparse attention" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*_results.json"))
    assert not list((tmp_path / "out").rglob("*_manifest_*.json"))


def test_a_dense_model_inside_is_noticed_at_the_first_answer(load, task):
    model = load()
    model.model.config.text_config.nsa_enabled = False
    with pytest.raises(WrongAttention):
        answer(model, task)
    assert not list(model.cache.folder.glob("*"))


def test_answers_are_kept_and_used_once(load, task):
    first = load()
    given = answer(first, task)
    assert given == [doc["answer"] for doc in task.dataset["test"].select(range(4))]
    assert again(first) == [False] * 4
    (file,) = first.cache.folder.glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    # A half-written line, and an answer that two processes gave.
    file.write_text("".join(lines[:3]) + lines[0] + lines[3][:50])
    second = load()
    assert answer(second, task) == given
    assert again(second) == [True, True, True, False]
    third = load()
    assert answer(third, task) == given and again(third) == [True] * 4


@pytest.mark.parametrize(
    "change",
    [
        {"window": 16},
        {"blocks": 3},
        {"branches": "selected"},
        {"attention": "dense"},
        {"max_pixels": 3136},
        {"dtype": "bfloat16"},
        {"batch_size": 2},
    ],
    ids=str,
)
def test_a_changed_setting_takes_no_old_answer(load, change):
    before = load(fps=2)
    assert load(fps=2).fingerprint == before.fingerprint
    assert load(fps=2, **change).fingerprint != before.fingerprint


def test_other_weights_take_no_old_answer_wherever_they_lie(load, tmp_path):
    folder = copy_checkpoint(tmp_path / "copy")
    copied = load(folder)
    assert copied.fingerprint == load().fingerprint
    copied.model.model.language_model.layers[0].self_attn.g_proj_2.bias.data[0] += 0.5
    assert weights_digest(copied.model) != copied.settings["checkpoint"]["weights"]
    swapped = weights_digest(copied.model)
    weight = copied.model.model.language_model.layers[0].self_attn.g_proj_2.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert weights_digest(copied.model) != swapped
    # The code that runs, which is transformers' copy of the checkpoint's.
    for loaded, name in (
        (copied.model, "nsa_reference"),
        (copied.processor, "processing_videonsa"),
    ):
        before = code_digest(copied.model, copied.processor)
        code = Path(inspect.getfile(type(loaded))).with_name(f"{name}.py")
        code.write_text(code.read_text() + "\n")
        assert code_digest(copied.model, copied.processor) != before


def test_an_asked_question_is_part_of_its_key(load, task):
    answer(load(), task)
    model, request = load(), task.instances[0]
    arguments = list(request.arguments)
    arguments[2] = {**arguments[2], "max_new_tokens": 1}
    kept, request.arguments = request.arguments, tuple(arguments)
    try:
        answer(model, task, [request])
    finally:
        request.arguments = kept
    assert again(model) == [False]


def test_another_video_of_the_same_name_is_asked_about_again(load, task):
    answer(load(), task)
    docs = task.dataset["test"]
    path, *_ = task.doc_to_visual(docs[0])
    other, *_ = task.doc_to_visual(docs[len(docs) - 1])
    first = Path(path).read_bytes()
    Path(path).write_bytes(Path(other).read_bytes())
    try:
        model = load()
        answer(model, task, task.instances[:1])
        assert again(model) == [False]
    finally:
        Path(path).write_bytes(first)


def test_a_batch_answers_as_its_samples_alone(load, task):
    assert answer(load(batch_size=3), task) == answer(load(), task)


def test_other_semantics_are_what_runs_and_are_recorded(load, task):
    model = load(semantics="released", batch_size=2)
    answer(model, task)
    assert model.settings["attention"]["semantics"] == "released"
    for record in model.records:
        report = record["attention"]
        assert report["settings"]["semantics"] == "released"
        # The tokens whose time, height and width are equal count as text.
        assert 0 < record["vision_tokens"] < record["prompt_tokens"] - 5
        assert set(report["sparse_tokens_by_layer"]) == {record["vision_tokens"]}
    with pytest.raises(ValueError, match="branches can be closed under the paper's semantics only"):
        load(semantics="released", branches="window")


def test_what_the_checkpoint_brings_does_not_leak_in(load, task, tmp_path):
    folder = copy_checkpoint(tmp_path / "brings")
    settings = read(folder / "generation_config.json")
    hidden = {"top_k": 1, "repetition_penalty": 1.05, "temperature": 1e-6, "do_sample": True}
    hidden |= {"min_new_tokens": 5}  # which would show in every answer
    (folder / "generation_config.json").write_text(json.dumps({**settings, **hidden}))
    model = load(folder)
    given = answer(model, task)
    shutil.rmtree(model.cache.folder)  # the other checkpoint would take these answers
    assert given == answer(load(), task)
    assert model.checkpoint_generation["overridden"] == {**hidden, "max_new_tokens": 64}
    assert model.checkpoint_generation["kept"]["eos_token_id"] == [1004, 1002]


def test_generation_settings_are_applied_or_said_to_have_no_effect():
    greedy = generation_settings(
        {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "until": ["\n\n"], "frames": 8}
    )
    assert greedy["applied"] == {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    assert greedy["without_effect"] == {"temperature": 0.0, "top_p": 1.0, "frames": 8}
    assert greedy["until"] == []
    cold = generation_settings({"do_sample": True, "temperature": 0})
    assert cold["applied"]["do_sample"] is False
    drawn = generation_settings({"temperature": 0.7, "top_p": 0.9, "until": "END"})
    assert drawn["applied"]["do_sample"] and drawn["applied"]["temperature"] == 0.7
    assert drawn["without_effect"] == {} and drawn["until"] == ["END"]


def test_drawn_answers_are_drawn_alike_after_a_restart(load, task, tmp_path):
    requests = task.instances[:3]
    kept = [request.arguments for request in requests]
    for request in requests:
        words, messages, _, *rest = request.arguments
        drawn = {"do_sample": True, "temperature": 50.0, "max_new_tokens": 6}
        request.arguments = (words, messages, drawn, *rest)
    try:
        given = answer(load(), task, requests)
        twice = answer(load(), task, [requests[0], requests[0]])
        assert twice[0] == given[0] != twice[1]  # asked again, it is drawn again
        shutil.rmtree(tmp_path / "answers")
        assert answer(load(), task, requests[2:]) == given[2:]
    finally:
        for request, arguments in zip(requests, kept, strict=True):
            request.arguments = arguments
    assert len(set(given)) == 3  # at that temperature they are noise


def test_paddings_between_processes_are_not_answered(load, task):
    model = load()
    padding = evaluation_harness.harness.evaluator._clone_padding_request(task.instances[0])
    assert answer(model, task, [padding]) == [""]
    assert model.records == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 8}, "model_args have frames, which nothing reads"),
        ({"attention": "full"}, "choose sparse or dense"),
        ({"branches": "sliding"}, "choose from compressed, selected, window"),
        ({"blocks": 0}, "nsa_num_selected_blocks is 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_a_qwen_is_refused(load, tmp_path):
    folder = copy_checkpoint(tmp_path / "qwen")
    config = read(folder / "config.json")
    del config["auto_map"]
    config["model_type"], config["text_config"]["model_type"] = "qwen2_5_vl", "qwen2_5_vl_text"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a qwen2_5_vl, which has no sparse attention"):
        load(folder)


def test_an_adapter_without_a_base_is_refused(load, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base: give its base_model_name_or_path"):
        load(tmp_path)


def test_nothing_readable_is_an_error():
    records = [{"task": "a", "error": "x.mp4 is empty"}, {"task": "b", "error": None}]
    with pytest.raises(RuntimeError, match="none of the 1 samples of a could be read.*empty"):
        refuse_all_unreadable(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--use_cache", "x"], "old answers of other weights"),
        (["--model_args", "fps"], "--model_args is 'fps'; give name=value"),
        (["--attention", "full"], "invalid choice: 'full'"),
    ],
)
def test_wrong_options_are_refused_before_anything_loads(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--model", str(ROOT), "--tasks", "clips_8", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "frames", "tokens", "new"),
    [
        ("longvideobench", 256, 512, 32),
        ("longtimescope", 512, 128, 16),
        ("timescope", 2048, 64, 16),
        ("mlvu", 512, 128, 16),
        ("vsibench", 128, 256, 16),
    ],
)
def test_presets_are_the_papers(name, frames, tokens, new):
    options, others = evaluation.parse_arguments(["--model", "m", "--tasks", "t", "--preset", name])
    arguments, record = evaluation.harness_arguments(options, others)
    model_args = arguments[arguments.index("--model_args") + 1].split(",")
    assert f"num_frames={frames}" in model_args and f"max_pixels={tokens * 784}" in model_args
    assert arguments[arguments.index("--gen_kwargs") + 1] == f"max_new_tokens={new}"
    assert "max_pixels" in record["paper"] and "num_frames" in record["ours"]


def test_what_a_user_says_wins_over_the_preset():
    command = "--model m --tasks t --preset mlvu --model_args fps=1,max_num_frames=64 --limit 3"
    options, others = evaluation.parse_arguments([*command.split(), "--gen_kwargs", "top_p=1"])
    arguments, record = evaluation.harness_arguments(options, others)
    model_args = dict(
        pair.split("=") for pair in arguments[arguments.index("--model_args") + 1].split(",")
    )
    assert model_args["fps"] == "1" and model_args["max_frames"] == "64"
    assert "num_frames" not in model_args and model_args["max_pixels"] == "100352"
    assert record["yours"] == {"fps": "1", "max_frames": "64"}
    assert arguments[-2:] == ["--limit", "3"]
    assert "max_new_tokens=16,top_p=1" in arguments


def test_the_clips_cover_every_kind_and_depth(task):
    docs = task.dataset["test"]
    assert len(docs) == 80 and len(set(zip(docs["clip"], docs["question"], strict=True))) >= 60
    needles = [depth for depth in docs["depth"] if depth >= 0]
    assert sorted(set(needles)) == [0, 1, 2, 3] and len(needles) == 20
    assert docs["kind"].count("order") == 10


def test_the_long_clips_ask_for_letters_and_have_their_tokens(home, load):
    folder = str(ROOT / "benchmarks" / "clips")
    manager = TaskManager(include_path=folder, include_defaults=False, model_name="videonsa")
    task = get_task_dict(["clips_4k"], manager, "chat")["clips_4k"]
    doc = task.dataset["test"][0]
    assert "\nB. " in doc["question"] and doc["answer"] in "ABCD"
    right = doc["choices"]["ABCD".index(doc["answer"])]
    assert task.process_results(doc, [f"I think it is {right}."])["accuracy"] == 1
    assert task.process_results(doc, ["E"])["accuracy"] == 0
    preset = evaluation.PRESETS["clips"].ours
    processor = load().processor
    plan = processor.video_processor.plan(task.doc_to_visual(doc)[0], **preset)
    assert (plan.frames, plan.height, plan.width, plan.tokens) == (32, 448, 448, 4096)
