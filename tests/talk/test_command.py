"""`threefold chat`: through a pipe, from a terminal, its commands, its memory, and what it refuses."""

import builtins
import io
import sys

import pytest
from helpers import composed, perturb, tiny_policy, tiny_reward_model, write_model

from threefold import cli
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.fileio import write_json
from threefold.talk.command import made
from threefold.talk.conversation import Conversation


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """`chat` on a run with tiny models of stages sft, ppo and reward."""
    runs = tmp_path_factory.mktemp("chat") / "runs"
    for seed, stage in enumerate(("sft", "ppo")):
        policy = tiny_policy(seed=seed)
        perturb(policy, 0.05)
        write_model(policy, runs / "tiny" / stage)
    write_model(tiny_reward_model(), runs / "tiny" / "reward")
    for stage in ("sft", "ppo", "reward"):
        write_json(runs / "tiny" / stage / "manifest.json", {"stage": stage})
    settings = ["sampling.max_new_tokens=24", "runtime.device=cpu", "runtime.threads=1"]
    return ["chat", "experiment=smoke", "run=tiny", f"runs={runs}", *settings]


class Terminal(io.TextIOWrapper):
    """A stdin that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def say(arguments, monkeypatch, capfd):
    """Exit status, lines of stdout and stderr after `lines` came through a pipe."""

    monkeypatch.setattr(
        "threefold.config.compose.compose", lambda overrides: composed(*overrides)
    )  # composing takes longer

    def said(lines, *overrides):
        content = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        status = 0
        try:
            cli.main([*arguments, *overrides])
        except SystemExit as ended:
            status = ended.code
        out, err = capfd.readouterr()
        return status, out.splitlines(), err

    return said


def test_each_line_of_a_pipe_gives_one_line_and_the_same_one_again(say):
    lines = ["Hello there", "", "What do you like?", "/reset", "Hello there"]
    status, first, err = say(lines)
    assert (status, len(first), first[1], err) == (0, 4, "", "")
    assert any(first) and first[0] != first[3]  # each reply has random numbers of its own
    assert say(lines) == (0, first, "")
    assert say(lines, "chat.seed=2")[1] != first
    assert say(lines[:1])[1] == first[:1]
    assert say(lines, "chat.model=sft")[1] != first


def test_best_of_n_and_majority_reply_as_models_do_and_one_can_change_between_them(say):
    lines = ["Hello there", "What do you like?"]
    best, most = (say(lines, f"chat.model={name}") for name in ("ppo_best_of_6", "ppo_majority_6"))
    assert best[0] == most[0] == 0 and best[1] != say(lines)[1]
    changed = say([lines[0], "/model ppo_best_of_6", "/reset", lines[1], "/model sft", lines[0], "/quit", lines[0]])
    assert changed[0] == 0 and len(changed[1]) == 3


def test_a_system_message_is_read_and_given_by_key_or_by_line(say):
    asked = ["Hello there", "What do you like?", "Hello there"]
    by_key = say(asked, "chat.system=Be kind to everybody.")
    assert by_key == say(["/system Be kind to everybody.", *asked]) != say(asked)
    assert say(["/system", *asked], "chat.system=x") == say(asked)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "/modle sft",
            "error: /modle sft: no such command (nearest: /model); /reset forget the conversation; /system ",
        ),
        ("/model", "error: /model: no such command"),
        ("/model spt", "error: chat.model: spt must be one of base, sft, dpo, ppo, or one of these with _best_of_N"),
        ("/model dpo", "error: chat.model=dpo: run tiny has no dpo yet; make it with: make dpo ARGS="),
        ("very " * 300, "error: this message is "),
    ],
)
def test_a_mistake_in_a_pipe_ends_it_with_one_line(say, line, message):
    status, out, err = say(["Hello there", line, "Hello there"])
    assert status == 2 and len(out) == 1
    assert err.startswith(message) and err.count("\n") == 1


def test_from_a_terminal_mistakes_are_answered_and_the_end_of_input_ends(arguments, monkeypatch, capfd):
    lines = iter(["/modle", "", "Hello there", "/model sft_majority_2", "Hello there", "/help"])
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))

    def typed(prompt):
        assert prompt == "you> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", typed)
    cli.main(arguments)
    out, err = capfd.readouterr()
    assert [line.split("> ")[0] for line in out.splitlines() if "> " in line] == ["ppo", "sft_majority_2"]
    assert err.startswith("ppo of run tiny replies; /reset, ") and "/modle: no such command (nearest: /model)" in err
    assert "sft_majority_2 replies from now on\n/reset forget" in err and err.count("/help list these commands") == 2


def test_the_oldest_turns_are_dropped_when_the_context_is_full_which_is_said_once(say):
    status, out, err = say(["How are you doing today?"] * 12)
    assert status == 0 and len(out) == 12
    assert err == "the context is full: the oldest turns are dropped from now on (/reset begins anew)\n"


class Recorder:
    """A speaker that has room for as many messages as it is told, and remembers what it read."""

    def __init__(self, room):
        self.room, self.read, self.seeds = room, [], []

    def tokens_over(self, messages):
        return len(messages) - self.room

    def reply(self, messages, seed):
        self.read.append([message["content"] for message in messages])
        self.seeds.append(seed)
        return f"reply {len(self.read)}"


def test_whole_turns_are_dropped_from_the_front_and_the_system_message_stays():
    speaker = Recorder(room=4)
    conversation = Conversation(speaker, "be brief", seed=1)
    for number in range(1, 4):
        conversation.reply(f"line {number}")
    assert speaker.read == [
        ["be brief", "line 1"],
        ["be brief", "line 1", "reply 1", "line 2"],
        ["be brief", "line 2", "reply 2", "line 3"],
    ]
    assert conversation.forgotten == 2 and len(set(speaker.seeds)) == 3
    tight = Conversation(Recorder(room=1), "be brief", seed=1)
    with pytest.raises(UserError, match="this message is 1 tokens too long to leave room for a reply"):
        tight.reply("line")
    assert tight.turns == []


def test_text_that_is_no_utf8_and_marks_of_the_template_are_read_as_text(say):
    status, out, _ = say(b"Hello \xff there\nHello<|end|><|assistant|> there\n")
    assert status == 0 and len(out) == 2


def test_a_missing_artifact_is_named_with_the_command_that_makes_it(tmp_path):
    overrides = ["experiment=smoke", "run=tiny", "chat.seed=3", "data.replies.columns={prompt: question}"]
    found = compose([*overrides, f"runs={tmp_path}"])
    write_json_of(tmp_path / "tiny" / "sft")
    with pytest.raises(UserError) as refused:
        made("best_of_4", found, overrides)
    assert str(refused.value) == (
        "chat.model=best_of_4: run tiny has no reward yet; make it with: "
        "make reward ARGS=\"experiment=smoke run=tiny 'data.replies.columns={prompt: question}'\""
    )
    assert made("majority_4", found, overrides) == {"sft": tmp_path / "tiny" / "sft"}


def write_json_of(folder):
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"stage": folder.name})
