"""Fingerprints change whenever the result can: one row for each way in which they once stayed."""

import ctypes
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import composed

from threefold import chain
from threefold.artifacts import digests
from threefold.chain import making, plans
from threefold.execution import precision


def fingerprint(stage, *overrides):
    """All that the fingerprint of a stage covers, with files and packages read anew."""
    for cached in (digests.file_digest, digests.package_version, digests._installed_in, precision.computes_in_bf16):
        cached.cache_clear()
    importlib.invalidate_caches()
    return json.dumps(chain.fingerprint_parts(composed(*overrides), stage), sort_keys=True)


def texts(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / ".".join(name.rsplit("__", 1))).write_text(text)


def splits_change_places(folder, monkeypatch):
    rows = {"a": '{"text": "one"}\n', "b": '{"text": "two"}\n'}
    texts(folder, train__jsonl=rows["a"], test__jsonl=rows["b"])
    options = [f"data.text.path={folder}", "data.text.format=text", "+data.text.splits.train=train*.jsonl"]
    ask = ("tokenizer", *options, "+data.text.splits.test=test*.jsonl")
    return ask, lambda: texts(folder, train__jsonl=rows["b"], test__jsonl=rows["a"]), ask


def files_of_a_folder_change_places(folder, monkeypatch):
    texts(folder, a__jsonl='{"text": "one"}\n', b__jsonl='{"text": "two"}\n')
    ask = ("tokenizer", f"data.text.path={folder}", "data.text.format=text")
    return ask, lambda: texts(folder, a__jsonl='{"text": "two"}\n', b__jsonl='{"text": "one"}\n'), ask


def the_same_bytes_with_another_suffix(folder, monkeypatch):
    texts(folder, rows__jsonl='{"text": "one"}\n', rows__txt='{"text": "one"}\n')
    first, second = (
        ("tokenizer", f"data.text.path={folder}/rows.{s}", "data.text.format=text") for s in ("jsonl", "txt")
    )
    return first, lambda: None, second


def package(folder, name, content, version="1.0"):
    """An installed package, with its word list."""
    site = folder / "site-packages"
    texts(site / name, __init____py="", words__txt=content)
    texts(site / f"{name}-{version}.dist-info", METADATA=f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return site


def the_word_list_of_chitchat_is_upgraded(folder, monkeypatch):
    site = package(folder, "better_profanity", "")
    texts(site / "better_profanity", profanity_wordlist__txt="one\n")
    texts(folder, talk__json="{}")
    monkeypatch.syspath_prepend(site)
    ask = ("tokenizer", f"data.text.path={folder}/talk.json", "data.text.format=chitchat")
    return ask, lambda: texts(site / "better_profanity", profanity_wordlist__txt="one\ntwo\n"), ask


def judged_by(folder, monkeypatch, code, **modules):
    """A judge in `folder`, with what makes its stage's fingerprint."""
    texts(folder, my_judge__py=code, **modules)
    monkeypatch.syspath_prepend(folder)
    for name in ("my_judge", "lexicon", "mypkg", "impl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return ("comparisons", "comparisons.judge.function=my_judge:score", "comparisons.judge.args={}")


def a_lexicon_is_upgraded(folder, monkeypatch):
    site = package(folder, "lexicon", "good 1\n")
    monkeypatch.syspath_prepend(site)
    ask = judged_by(folder, monkeypatch, "def score(**rows):\n    from lexicon import x\n    return [1]\n")

    def upgrade():
        shutil.rmtree(site / "lexicon-1.0.dist-info")
        package(folder, "lexicon", "good 1\n", "1.1")

    return ask, upgrade, ask


def a_lexicon_is_edited(folder, monkeypatch):
    site = package(folder, "lexicon", "good 1\n")
    monkeypatch.syspath_prepend(site)
    ask = judged_by(folder, monkeypatch, "import lexicon.more\ndef score(**rows): return [1]\n")
    return ask, lambda: texts(site / "lexicon", words__txt="good 2\n"), ask


def imported(code, place):
    def change(folder, monkeypatch):
        ask = judged_by(folder, monkeypatch, code)
        texts(folder / "mypkg", __init____py="")
        texts((folder / place).parent, **{Path(place).name.replace(".", "__"): "def score(**rows): return [1]\n"})
        return ask, lambda: (folder / place).write_text("def score(**rows): return [2]\n"), ask

    return change


def through_another_module(folder, monkeypatch):
    ask = judged_by(folder, monkeypatch, "from mypkg.impl import score\n")
    texts(
        folder / "mypkg", __init____py="", impl__py="from .deep import score\n", deep__py="def score(**r): return 1\n"
    )
    return ask, lambda: texts(folder / "mypkg", deep__py="def score(**r): return 2\n"), ask


def auto_on_another_machine(folder, monkeypatch):
    monkeypatch.setattr(precision, "torch_platforms", lambda: {"cuda"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(precision, "capability", lambda visible: 0)
    ask = ("pretrain", "precision=auto")
    return ask, lambda: monkeypatch.setattr(precision, "capability", lambda visible: 9), ask


def the_way_that_templates_are_rendered(folder, monkeypatch):
    ask = ("tokenizer", "model.checkpoint=org/name")
    return ask, lambda: monkeypatch.setattr(plans, "RENDERING", 99), ask


def a_variable_of_the_template(folder, monkeypatch):
    ask = ("tokenizer", "model=hf", "++model.checkpoint=org/name")
    return ask, lambda: None, (*ask, "+model.chat_template_kwargs.enable_thinking=false")


def a_value_of_the_environment(folder, monkeypatch):
    monkeypatch.setenv("THREEFOLD_DATA", "org/one")
    ask = ("tokenizer", "+data.text.revision=${oc.env:THREEFOLD_DATA}", "data.text.path=org/name")
    return ask, lambda: monkeypatch.setenv("THREEFOLD_DATA", "org/two"), ask


CHANGES = {
    "training and test change places": splits_change_places,
    "two files of a folder change places": files_of_a_folder_change_places,
    "a suffix": the_same_bytes_with_another_suffix,
    "the word list of a format": the_word_list_of_chitchat_is_upgraded,
    "the version of a judge's package": a_lexicon_is_upgraded,
    "the lexicon of a judge's package": a_lexicon_is_edited,
    "from package.module import": imported("from mypkg.impl import score\n", "mypkg/impl.py"),
    "from package import module": imported("from mypkg import impl\nscore = impl.score\n", "mypkg/impl.py"),
    "import module": imported("import impl\nscore = impl.score\n", "impl.py"),
    "import module as": imported("import mypkg.impl as f\nscore = f.score\n", "mypkg/impl.py"),
    "import in the function": imported(
        "def score(**rows):\n    import impl\n    return impl.score(**rows)\n", "impl.py"
    ),
    "the package's own file": imported("import mypkg.impl\nscore = 1\n", "mypkg/__init__.py"),
    "an import of an import": through_another_module,
    "precision=auto on another machine": auto_on_another_machine,
    "how rows are made with a checkpoint's template": the_way_that_templates_are_rendered,
    "a variable of a checkpoint's template": a_variable_of_the_template,
    "a value that the environment gives": a_value_of_the_environment,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_fingerprint_changes_with_the_result_and_stays_without(change, tmp_path, monkeypatch):
    before, happen, after = change(tmp_path, monkeypatch)
    first = fingerprint(*before)
    assert fingerprint(*before) == first
    happen()
    assert fingerprint(*after) != first


def test_what_auto_comes_to_is_what_the_stage_sees_and_equals_saying_so(monkeypatch):
    for major, expected in ((0, "fp32"), (7, "fp32"), (8, "bf16"), (9, "bf16")):
        monkeypatch.setattr(precision, "torch_platforms", lambda: {"cuda"})
        monkeypatch.setattr(precision, "capability", lambda visible, major=major: major)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert fingerprint("pretrain", "precision=auto") == fingerprint("pretrain", f"precision={expected}")
        assert chain.view(composed("precision=auto"), "pretrain").precision == expected
        assert fingerprint("pretrain", "precision=auto", "runtime.device=cpu") == fingerprint(
            "pretrain", "precision=fp32"
        )
    for visible in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert fingerprint("pretrain", "precision=auto") == fingerprint("pretrain", "precision=fp32")
    monkeypatch.setattr(precision, "torch_platforms", set)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert fingerprint("pretrain", "precision=auto") == fingerprint("pretrain", "precision=fp32")


def test_in_slurm_auto_is_what_the_job_asks_for_wherever_it_is_asked(monkeypatch):
    monkeypatch.setattr(precision, "capability", lambda visible: 0)
    slurm = ["precision=auto", "launcher.kind=slurm"]
    asked = [*slurm, "resources.gpus=0", "resources.stages.pretrain.gpus=1"]
    assert precision.resolved(composed(*asked), "pretrain") == "bf16"
    assert precision.resolved(composed(*asked), "sft") == "fp32"
    assert precision.resolved(composed(*slurm, "resources.gpus=2"), "sft") == "bf16"
    assert precision.resolved(composed(*slurm, "resources.gpus=2", "runtime.device=cpu"), "sft") == "fp32"
    assert precision.resolved(composed("precision=auto", "resources.gpus=1"), "sft") == "bf16"  # threefold submit


@pytest.mark.parametrize(("visible", "answer"), [("0", 9), ("GPU-abc", 9), ("1", 7), ("NoDevFiles", 0), ("", 0)])
def test_the_capability_of_the_first_gpu_is_asked_of_nvml(visible, answer, monkeypatch):
    class Nvml:
        def nvmlInit_v2(self):
            return 0

        def nvmlShutdown(self):
            return 0

        def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
            handle._obj.value = 100 + index
            return 0

        def nvmlDeviceGetHandleByUUID(self, name, handle):
            handle._obj.value = 100 if name == b"GPU-abc" else 0
            return 0

        def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
            major._obj.value = {100: 9, 101: 7}[handle.value]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    assert precision.capability(visible) == answer


@pytest.mark.parametrize(
    ("given", "heard"), [(["precision=auto", "resources.gpus=1"], True), (["precision=bf16"], False)]
)
def test_bf16_of_a_gpu_that_torch_does_not_see_is_said(given, heard, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("threefold.execution.job.execute", lambda job, _: {"bf16": job.device.bf16})
    config = composed(*given, f"runs={tmp_path}", "tracker=none", "runtime.threads=1")
    entry = chain.plan(config, ["tokenizer", "pretrain"])["pretrain"]
    entry.artifact.open()
    assert making._execute(config, entry, {}, None) == {"bf16": True}
    assert ("precision=auto is bf16 here, as of a GPU, and torch sees none" in capsys.readouterr().out) == heard


def test_without_a_driver_there_is_no_capability(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert precision.capability("0") == 0


def test_reasons_for_staleness_name_the_new_parts_in_words(tmp_path, monkeypatch):
    site = package(tmp_path, "lexicon", "good 1\n")
    monkeypatch.syspath_prepend(site)
    stage, *overrides = judged_by(tmp_path, monkeypatch, "import lexicon, impl\nscore = 1\n", impl__py="x = 1\n")
    names = ["tokenizer", "pretrain", "sft", "comparisons"]
    fingerprint(stage, *overrides)
    old = chain.plan(composed(*overrides), names)[stage].parts
    shutil.rmtree(site / "lexicon-1.0.dist-info")
    package(tmp_path, "lexicon", "good 1\n", "1.1")
    texts(tmp_path, impl__py="x = 2\n")
    fingerprint(stage, *overrides)
    reason = chain.stale_reason({"parts": old | {"precision": "bf16"}}, chain.plan(composed(*overrides), names)[stage])
    digest = old["comparisons.judge.packages.lexicon"].split()[1]
    assert set(reason.split(", ")) == {
        "precision bf16 → fp32", "comparisons.judge.imports changed",
        f"comparisons.judge.packages.lexicon 1.0 {digest} → 1.1 {digest}",
    }  # fmt: skip


def test_a_fresh_artifact_says_with_which_other_libraries_it_was_made(monkeypatch):
    made = {name: digests.version_of(name) for name in digests.VERSIONED}
    assert chain.made_with({"environment": made}) == "" and chain.made_with({}) == ""
    other = made | {"torch": "2.12.0", "trl": "1.15.0"}
    assert chain.made_with({"environment": other}) == "made with torch 2.12.0, trl 1.15.0"


def test_local_and_installed_imports_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(package(tmp_path, "lexicon", ""))
    judged_by(
        tmp_path,
        monkeypatch,
        "import os, lexicon, impl, no_such_module\n",
        impl__py="from threefold.models import chat\n",
    )
    importlib.invalidate_caches()
    digests._installed_in.cache_clear()
    local, packages = digests.followed(tmp_path / "my_judge.py", "my_judge")
    assert local == {"my_judge": tmp_path / "my_judge.py", "impl": tmp_path / "impl.py"} and packages == {"lexicon"}
    assert digests.function_parts("trl.rewards:think_format_reward")["packages.trl"].startswith(
        digests.version_of("trl")
    )
    assert set(digests.function_parts("rewards.length:length")) == {"source"}
