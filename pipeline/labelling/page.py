"""The page where people compare replies: a server for this machine alone, HTML forms, and a little JavaScript for keys.

Every page works without the script; the script sends the same forms and puts the answer in the page's place.
"""

import contextlib
import logging
import signal
import socket
import unicodedata
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from flask import Flask, Response, abort, redirect, render_template, request, send_from_directory
from omegaconf import DictConfig
from werkzeug.serving import make_server

from threefold.config.compose import make_command
from threefold.config.overrides import as_arguments
from threefold.errors import UserError
from threefold.labelling import votes_arena
from threefold.labelling.queue import CHOICES, Labelling
from threefold.labelling.votes import in_words, kappa_in_words, only_writer, read_pool, summary

ADDRESS = "127.0.0.1"
LONGEST_NAME, LONGEST_REASON = 40, 1000  # characters
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers would send `Origin: null` with our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def serve(config: DictConfig, overrides: list[str]) -> None:
    """Serve the page until Ctrl-C. Raises `UserError` for a missing or malformed file and for a port in use."""
    evaluated = config.label.pairs == votes_arena.EVALUATION
    pairs, votes = pairs_and_votes(config)
    if not pairs.is_file():
        stage = "evaluate" if evaluated else "comparisons"
        raise UserError(
            f"{pairs}: no such file of pairs; make it with threefold run target={stage}, or set label.pairs"
        )
    pool = votes_arena.pool(votes_arena.read_samples(pairs)) if evaluated else read_pool(pairs)
    with only_writer(votes), _listening(config.label.port) as listening:
        labelling = Labelling(pool, votes, config.label.seed)
        command = report_command(overrides) if evaluated else next_command(votes, overrides)
        page = make_page(labelling, votes, command)
        before = len(labelling.votes.rows)
        with _until_interrupted():
            _announce(labelling, pairs, votes, listening.getsockname()[1])
            _answer_requests(page, listening)
        with labelling.lock:  # an answer that is being written is written to its end
            _say_goodbye(labelling, votes, len(labelling.votes.rows) - before)


def pairs_and_votes(config: DictConfig) -> tuple[Path, Path]:
    """The file that pairs are read from, and the one that votes are appended to."""
    if config.label.pairs == votes_arena.EVALUATION:
        return votes_arena.samples_file(config), votes_arena.votes_file(config)
    run = Path(config.runs) / config.run
    pairs = Path(config.label.pairs or run / "comparisons" / "pool.jsonl")
    return pairs, Path(config.label.votes or run / "votes.jsonl")


def report_command(overrides: list[str]) -> str:
    """The command that shows the arena by people's votes, with the overrides that chose this run and its votes."""
    return f'make report ARGS="{as_arguments(overrides)}"'


def next_command(votes: Path, overrides: list[str]) -> str:
    """The command that trains a reward model on the votes, with the overrides that chose this run."""
    of_votes = [f"data.preferences.path={votes}", "data.preferences.format=arena"]
    return make_command("reward", [*overrides, *of_votes], "label")


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        raise UserError(f"label.port={port}: cannot be used ({error.strerror}); choose another") from error


@contextlib.contextmanager
def _until_interrupted() -> Generator[None]:
    """Ctrl-C or SIGTERM ends what is inside."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: shells start background jobs with it ignored
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _answer_requests(page: Flask, listening: socket.socket) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for every request
    port = listening.getsockname()[1]
    # threads: a browser keeps connections open that it does not use yet, which would block a single one
    make_server(ADDRESS, port, page, threaded=True, fd=listening.fileno()).serve_forever()


def _announce(labelling: Labelling, pairs: Path, votes: Path, port: int) -> None:
    for journal in (labelling.votes, labelling.skips):
        if journal.mended:
            print(journal.mended)
    print(f"compare replies at http://{ADDRESS}:{port}/ (Ctrl-C ends)")
    print(f"{len(labelling.pool):,} pairs from {pairs}")
    print(f"votes go to {votes}, which holds {len(labelling.votes.rows):,}", flush=True)


def _say_goodbye(labelling: Labelling, votes: Path, given: int) -> None:
    total = len(labelling.votes.rows)
    print(f"\n{total:,} vote{'' if total == 1 else 's'} in {votes}, {given:+,} in this session")
    for line in summary(labelling.votes.rows)[:1]:
        print(in_words(line))


def make_page(labelling: Labelling, votes: Path, command: str) -> Flask:
    """The application; `command` is what the last page says to run next."""
    page = Flask(__name__, static_folder=None, template_folder=".")
    page.config["MAX_CONTENT_LENGTH"] = 1 << 16
    page.jinja_options = {"trim_blocks": True, "lstrip_blocks": True}
    page.jinja_env.filters |= {"in_words": in_words, "kappa": kappa_in_words}
    notices: dict[str, str] = {}  # labeller → what the next page says first

    def render(**values: Any) -> str:
        return render_template("page.html", longest_name=LONGEST_NAME, longest_reason=LONGEST_REASON, **values)

    @page.get("/")
    def show() -> str | tuple[str, int]:
        if "labeller" not in request.args:
            return render(labellers=labelling.labellers(), votes=votes)
        labeller = tidy_name(request.args["labeller"])
        if not labeller:
            wrong = f"A name has 1 to {LONGEST_NAME} characters."
            return render(labellers=labelling.labellers(), votes=votes, wrong=wrong), 400
        progress = labelling.progress(labeller)
        return render(
            labeller=labeller,
            shown=labelling.next(labeller),
            progress=progress,
            notice=notices.pop(labeller, ""),
            labellers={labeller: progress.done} | labelling.labellers(),
            agreements=summary(labelling.all_votes()),
            votes=votes,
            command=command,
        )

    @page.get("/label_page.<any(css, js):kind>")
    def part(kind: str) -> Response:
        return send_from_directory(Path(__file__).parent, f"page.{kind}")

    @page.errorhandler(OSError)
    def not_written(error: OSError) -> tuple[str, int, dict[str, str]]:
        return f"Nothing was recorded: {votes} cannot be written ({error.strerror or error}).", 500, PLAIN

    _take_answers(page, labelling, notices)
    page.before_request(refuse_strangers)
    page.after_request(add_headers)
    return page


def _take_answers(page: Flask, labelling: Labelling, notices: dict[str, str]) -> None:
    """Record what the page's forms send; `notices` gets what the next page of a labeller says first."""

    @page.post("/answer")
    def answer() -> Any:
        form = request.form
        labeller, choice, reason = tidy_name(form.get("labeller", "")), form.get("choice", ""), form.get("reason", "")
        if not labeller or len(reason) > LONGEST_REASON:
            abort(400)
        if choice in CHOICES:
            reason = reason.replace("\r\n", "\n").strip()  # forms send line breaks as CR LF
            message = labelling.record(labeller, form.get("token", ""), choice, reason)
        elif choice == "undo":
            message = labelling.undo(labeller)
        elif choice == "skipped":
            message = labelling.take_up_skipped(labeller)
        else:
            abort(400)
        notices[labeller] = message
        return redirect(f"/?{urlencode({'labeller': labeller})}", 303)


PLAIN = {"Content-Type": "text/plain; charset=utf-8"}


def tidy_name(name: str) -> str:
    """A labeller's name with single spaces and composed characters; empty when it is none or too long."""
    tidied = " ".join(unicodedata.normalize("NFC", name).split())
    return tidied if tidied.isprintable() and len(tidied) <= LONGEST_NAME else ""


def refuse_strangers() -> tuple[str, int, dict[str, str]] | None:
    """Answer only requests for this machine's own name, and only forms of our own pages.

    Another site can point its own name at 127.0.0.1 (DNS rebinding): its requests carry that name as Host. It can
    also send a form here: that carries its own Origin. Any port is let through, so that a tunnel may end on another.
    """
    if request.host.rsplit(":", 1)[0] not in (ADDRESS, "localhost"):
        return "This page answers to 127.0.0.1 and localhost only.\n", 403, PLAIN
    if request.method not in ("GET", "HEAD", "OPTIONS") and request.origin != f"http://{request.host}":
        return "Only this page's own forms are taken.\n", 403, PLAIN
    return None


def add_headers(response: Response) -> Response:
    """Nothing is loaded from, sent to, framed by or kept for anybody else."""
    response.headers.update(HEADERS)
    return response
