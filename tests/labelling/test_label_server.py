"""The labelling page without a browser: what its server lets through, what it shows, and its command."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pools import opened, row, vote_on, write_pool

from threefold import chain
from threefold.config.compose import compose
from threefold.fileio import read_lines
from threefold.labelling import page

HERE = {"base_url": "http://127.0.0.1:8010"}
OURS = {**HERE, "headers": {"Origin": "http://127.0.0.1:8010"}}


@pytest.fixture
def client(pool, votes):
    return page.make_page(opened(pool, votes), votes, "make reward").test_client()


def test_every_answer_carries_the_headers_that_keep_others_out(client):
    for path, status in (("/", 200), ("/?labeller=anna", 200), ("/label_page.js", 200), ("/label_page.css", 200),
                         ("/report.html", 404), ("/label_page.py", 404), ("/?labeller=", 400)):  # fmt: skip
        answer = client.get(path, **HERE)
        assert answer.status_code == status, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert "http" not in policy
        for name, value in page.HEADERS.items():
            assert answer.headers[name] == value


@pytest.mark.parametrize("host", ["127.0.0.1:8010", "localhost:8010", "localhost", "127.0.0.1:9999"])
def test_this_machine_is_answered(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8010", "localhost.evil.example", "127.0.0.1.evil.example:8010", "0.0.0.0"]
)
def test_another_name_for_this_machine_is_refused(client, host):
    assert client.get("/?labeller=anna", headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:8011", "https://127.0.0.1:8010",
               "http://localhost:8010"]
)  # fmt: skip
def test_a_form_from_elsewhere_changes_nothing(client, votes, origin):
    headers = {"Origin": origin} if origin else {}
    form = {"labeller": "anna", "choice": "undo"}
    assert client.post("/answer", data=form, base_url=HERE["base_url"], headers=headers).status_code == 403
    assert votes.read_bytes() == b""


def token_of(client, labeller: str) -> str:
    html = client.get("/", query_string={"labeller": labeller}, **HERE).text
    return html.split('name="token" value="')[1].split('"')[0]


def test_a_vote_a_skip_and_an_undo_through_forms(client, votes):
    for choice, said in (("first", "Recorded: reply 1 is better."), ("tie", "Recorded: a tie."), ("skip", "Skipped"),
                         ("undo", "last skip is taken back"), ("undo", "last vote is taken back")):  # fmt: skip
        form = {"labeller": "anna", "token": token_of(client, "anna"), "choice": choice, "reason": "one\r\ntwo"}
        answer = client.post("/answer", data=form, follow_redirects=True, **OURS)
        assert said in answer.text
    [line] = read_lines(votes)
    assert line["reason"] == "one\ntwo"


@pytest.mark.parametrize(
    "form",
    [
        {"labeller": "", "choice": "undo"},
        {"labeller": "anna", "choice": "third"},
        {"labeller": "anna"},
        {"labeller": "a" * 41, "choice": "undo"},
        {"labeller": "anna", "choice": "tie", "reason": "x" * 1001},
        {"labeller": "a\x00b", "choice": "undo"},
    ],
)
def test_a_form_that_no_page_of_ours_sends_is_refused(client, form, votes):
    assert client.post("/answer", data=form, **OURS).status_code == 400
    assert votes.read_bytes() == b""


def test_a_form_that_is_too_large_is_refused(client):
    form = {"labeller": "anna", "choice": "tie", "reason": "x" * 100_000}
    assert client.post("/answer", data=form, **OURS).status_code == 413


def test_a_vote_that_cannot_be_written_is_said_and_not_counted(client, votes, monkeypatch):
    form = {"labeller": "anna", "token": token_of(client, "anna"), "choice": "tie"}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = client.post("/answer", data=form, **OURS)
    assert answer.status_code == 500
    assert answer.text == f"Nothing was recorded: {votes} cannot be written (No space left on device)."
    assert votes.read_bytes() == b"" and "<b>0</b> of 12" in client.get("/?labeller=anna", **HERE).text


def test_text_is_escaped_and_models_and_pairs_are_not_named(tmp_path, votes):
    names = {"pair": "sft-against-ppo", "model_a": "sft-model", "model_b": "ppo-model"}
    wild = {"response_a": "<script>alert(1)</script>\n  & more", "response_b": '"><img src=x onerror=alert(1)>'}
    prompt = [{"role": "<b>", "content": "</div><h1>"}]
    file = write_pool(tmp_path / "pool.jsonl", [row(0, prompt=prompt, **wild, **names)])
    html = page.make_page(opened(file, votes), votes, "x").test_client().get("/?labeller=<i>anna", **HERE).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n  &amp; more</div>" in html
    for raw in ("<script>alert", "<img", "</div><h1>", "<B>", "<i>anna"):
        assert raw not in html
    for name in names.values():
        assert name not in html


@pytest.mark.parametrize(
    ("name", "tidied"),
    [("  Anna   B ", "Anna B"), ("Zoe\u0308", "Zoë"), ("", ""), (" ", ""), ("x" * 40, "x" * 40), ("x" * 41, ""),
     ("a\u202eb", "")],
)  # fmt: skip
def test_names_are_tidied(name, tidied):
    assert page.tidy_name(name) == tidied


def test_the_last_page_says_what_to_run_next(tmp_path, votes):
    file = write_pool(tmp_path / "pool.jsonl", [row(0)])
    command = page.next_command(Path("runs/mine/votes.jsonl"), ["run=mine", "label.port=9", "experiment=hh"])
    assert command == (
        'make reward ARGS="run=mine experiment=hh data.preferences.path=runs/mine/votes.jsonl'
        ' data.preferences.format=arena"'
    )
    client = page.make_page(opened(file, votes), votes, command).test_client()
    form = {"labeller": "anna", "token": token_of(client, "anna"), "choice": "first"}
    html = client.post("/answer", data=form, follow_redirects=True, **OURS).text
    assert "All pairs are labelled" in html and "0 skipped" not in html
    assert "data.preferences.format=arena" in html


def test_no_stage_sees_the_settings_of_labelling():
    plain, other = (chain.plan(compose(o)) for o in ([], ["label.port=9", "label.seed=9", "label.pairs=x"]))
    assert {n: p.fingerprint for n, p in plain.items()} == {n: p.fingerprint for n, p in other.items()}


# runs the command line and says at its end whether torch was imported
TOLD = """
import sys
from threefold import cli
try:
    cli.main(["label", *sys.argv[1:]])
finally:
    print("torch" if "torch" in sys.modules else "no torch", flush=True)
"""


def started(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-u", "-c", TOLD, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_and_ends_cleanly(how, pool, votes):
    other = opened(pool, votes)
    for name in ("anna", "ben"):
        vote_on(other, name, "tie")
    votes.write_bytes(votes.read_bytes() + b'{"pair": "pa')
    server = started(f"label.pairs={pool}", f"label.votes={votes}", "label.port=0")
    said = [server.stdout.readline().strip() for _ in range(4)]
    assert said[0].endswith("cut an unfinished last line of 12 bytes, left by a crash")
    assert said[1].startswith("compare replies at http://127.0.0.1:")
    assert said[2:] == [f"12 pairs from {pool}", f"votes go to {votes}, which holds 2"]
    server.send_signal(how)
    out, err = server.communicate(timeout=30)
    assert (server.returncode, err) == (0, "")
    assert f"2 votes in {votes}, +0 in this session\nanna and ben agree on 100% of 1 shared pair" in out
    assert out.endswith("no torch\n")


@pytest.mark.slow
def test_a_mistake_is_answered_on_one_line(pool, votes, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        broken = tmp_path / "broken.jsonl"
        broken.write_text("{\n")
        mistakes = [
            ([f"label.port={port}", f"label.pairs={pool}"], f"label.port={port}: cannot be used (Address already in"),
            ([f"label.pairs={tmp_path}/none"], f"{tmp_path}/none: no such file of pairs; make it with threefold run"),
            ([f"runs={tmp_path}/runs"], f"{tmp_path}/runs/demo/comparisons/pool.jsonl: no such file of pairs"),
            ([f"label.pairs={broken}"], f"{broken}, line 1: is not JSON"),
            ([f"label.pairs={pool}", f"label.votes={pool}"], f"{pool}, line 1: has no"),
            (["label.port=70000"], "label.port=70000: must be at most 65535"),
            (["label.prot=1"], "label.prot is not a configuration key (nearest: label.port)"),
        ]
        for arguments, message in mistakes:
            given = [] if any("label.votes" in a for a in arguments) else [f"label.votes={votes}"]
            server = started(*arguments, *given)
            out, err = server.communicate(timeout=30)
            assert (server.returncode, out) == (2, "no torch\n"), err
            assert err.startswith(f"error: {message}") and err.count("\n") == 1, err
