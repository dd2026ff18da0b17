"""What reaches the judge, what comes back, and what goes wrong on the way."""

from __future__ import annotations

import json
import threading
import time
from email.utils import formatdate

import pytest

from saemill.evaluate.errors import JudgeMissing, SettingInvalid
from saemill.evaluate.evals.autointerp.judge import KEY, Answer, Answers, Judge, Question, ask_all, seconds_in

from ....free_port import free_port
from ...fake_judge import NAME, failing, send, torn
from .conftest import KEY as SECRET

QUESTIONS = [Question(f"question {number}", 20) for number in range(12)]


@pytest.fixture
def client(judge):
    """client(**changes): a client of the judge."""
    return lambda **how: Judge(**{"endpoint": judge.url, "model": "fake", "seed": 7, "timeout": 20.0} | how)


@pytest.fixture
def answers(tmp_path):
    """Those in the file, read anew."""
    return lambda: Answers(tmp_path / "evals" / "answers.jsonl")


def keyed(client, questions=QUESTIONS):
    return {client.key_of(question): question for question in questions}


def ask_every(client, answers, at_once=3):
    kept = answers()
    refused = ask_all(client, kept.lacking(keyed(client)), kept, at_once, lambda _: None)
    return kept, refused


def test_each_question_is_asked_once_and_its_answer_kept(judge, client, answers):
    judge.answer = lambda prompt: prompt.upper()
    one = client()
    kept, refused = ask_every(one, answers)
    assert not refused and len(judge.requests) == len(QUESTIONS)
    assert {one.key_of(question): Answer(question.text.upper(), NAME) for question in QUESTIONS} == kept.found
    assert answers().found == kept.found
    first = judge.requests[0]
    assert first.pop("messages")[0]["role"] == "user"
    assert first == {"model": "fake", "max_tokens": 20, "temperature": 0, "seed": 7}
    assert judge.headers[0]["Authorization"] == f"Bearer {SECRET}"
    ask_every(one, answers)
    assert len(judge.requests) == len(QUESTIONS), "nothing is asked again"


def test_an_answer_belongs_to_what_was_asked_and_to_no_address(client):
    known = client().key_of(QUESTIONS[0])
    assert client(endpoint="http://127.0.0.1:1/v1").key_of(QUESTIONS[0]) == known
    others = [client(model="other"), client(seed=8)]
    assert known not in {one.key_of(QUESTIONS[0]) for one in others} | {client().key_of(Question("question 0", 21))}


def test_a_torn_line_and_lines_of_others_cost_only_themselves(judge, client, answers):
    kept, _ = ask_every(client(), answers)
    lines = kept.path.read_bytes().splitlines(keepends=True)
    strange = [b"[]\n", b'{"key": 1}\n', b'{"key": "a", "answer": 2, "model": ""}\n', b"\xff\n", b"[" * 100_000 + b"\n"]
    kept.path.write_bytes(b"".join([*lines[:-2], *strange, lines[-1], lines[-2][:20]]))
    judge.requests.clear()
    again, _ = ask_every(client(), answers)
    assert len(judge.requests) == 1 and again.found == kept.found == answers().found


@pytest.mark.parametrize(
    "faults",
    [
        [failing(429), failing(429, Retry_After="0.05")],
        [failing(503), failing(500), failing(408)],
        [torn],
        [lambda handler: handler.wfile.close()],
        [lambda handler: send(handler, 200, b"<html>busy</html>")],
        [lambda handler: send(handler, 200, {"choices": []})],
    ],
)
def test_what_passes_is_asked_again(judge, client, answers, faults):
    judge.faults += faults
    kept, refused = ask_every(client(), answers, at_once=1)
    assert len(kept.found) == len(QUESTIONS) and not refused
    assert len(judge.requests) == len(QUESTIONS) + len(faults)


def test_a_server_is_asked_again_when_it_says(judge, client, answers):
    judge.faults.append(failing(429, Retry_After="0.6"))
    started = time.monotonic()
    ask_every(client(), answers)
    assert time.monotonic() - started > 0.6
    judge.faults.append(failing(429, Retry_After="3600"))
    with pytest.raises(JudgeMissing, match=r"asks to wait 3,600 seconds: status 429"):
        client().check()
    assert seconds_in(None) is seconds_in("soon") is None
    assert seconds_in("-3") == 0 and 50 < seconds_in(formatdate(time.time() + 60, usegmt=True)) < 61


def test_a_slow_server_is_asked_again_and_named_in_the_end(judge, client, answers):
    judge.faults += [lambda _: judge.stuck.wait(5) and None] * 8
    with pytest.raises(JudgeMissing, match=r"no answer within 0.1 seconds \(autointerp.timeout\)"):
        ask_every(client(timeout=0.1), answers, at_once=1)
    assert len(judge.requests) == 4


def test_when_the_server_is_lost_nothing_that_was_answered_is(judge, client, answers):
    judge.faults += [lambda _: True] * 5 + [failing(502)] * 100
    with pytest.raises(JudgeMissing, match="status 502"):
        ask_every(client(), answers, at_once=1)
    assert len(judge.requests) == 5 + 4, "the other questions are not tried in vain"
    assert len(answers().found) == 5
    judge.faults.clear()
    judge.requests.clear()
    kept, _ = ask_every(client(), answers)
    assert len(judge.requests) == len(QUESTIONS) - 5 and len(kept.found) == len(QUESTIONS)


def test_the_error_that_stops_all_is_the_one_that_is_said(judge, client, answers, monkeypatch):
    """One request waits to be asked again when the key of the other is refused."""

    class Slow(threading.Event):
        def set(self):
            was_set = self.is_set()
            super().set()
            if not was_set:
                time.sleep(0.2)  # in which others notice

    monkeypatch.setattr(threading, "Event", Slow)
    judge.faults += [failing(429, Retry_After="30"), lambda handler: time.sleep(0.3) or failing(401)(handler)]
    with pytest.raises(JudgeMissing, match="is refused"):
        ask_all(client(), keyed(client(), QUESTIONS[:2]), answers(), 2, lambda _: None)


def test_a_stop_takes_no_time_and_loses_no_answer(judge, client, answers):
    """Ctrl-C while some requests hang."""
    judge.faults += [lambda _: True] * 4 + [lambda _: judge.stuck.wait(60) and None] * 100
    kept, came = answers(), []

    def advance(_):
        came.append(1)
        if len(came) == 4:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask_all(client(), keyed(client()), kept, 3, advance)
    assert time.monotonic() - started < 10
    assert len(answers().found) >= 4
    threads = [thread for thread in threading.enumerate() if thread.name == "saemill-judge"]
    assert all(thread.daemon for thread in threads), "the program's end waits for none"


def test_what_the_server_does_not_take_is_said_and_asked_another_time(judge, client, answers):
    """Such as a passage that a provider's filter refuses."""
    judge.faults.append(failing(400, "filtered"))
    kept, refused = ask_every(client(), answers, at_once=1)
    assert list(refused.values()) == ["status 400: " + json.dumps({"error": {"message": "filtered"}})]
    assert len(kept.found) == len(QUESTIONS) - 1
    kept, refused = ask_every(client(), answers)
    assert not refused and len(kept.found) == len(QUESTIONS)


def test_settings_that_a_server_refuses_are_not_sent_again(judge, client):
    judge.faults += [
        failing(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        failing(400, "'temperature' does not support 0"),
        failing(422, "unknown field: seed"),
    ]
    one = client()
    one.check()
    assert set(judge.requests[-1]) == {"model", "messages", "max_completion_tokens"}
    assert one.refused == ["max_tokens", "temperature", "seed"]
    assert one.key_of(QUESTIONS[0]) == client().key_of(QUESTIONS[0])


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (failing(401), f"the key in {KEY} is refused"),
        (failing(404, "no such model"), "has no model fake, or no chat completions .*/v1.*no such model"),
        (failing(400, "odd"), "refuses a small request to fake: status 400.*odd"),
        (failing(418), "status 418"),
        (lambda handler: send(handler, 200, b"<html>hello</html>"), "expected the JSON of a chat completion.*hello"),
        (lambda handler: send(handler, 200, b"[" * 100_000), "expected the JSON of a chat completion"),
        (lambda handler: send(handler, 200, b"x" * (2 << 20)), "expected the JSON of a chat completion"),
        (failing(307, Location="http://127.0.0.1:1/"), "status 307"),
        (torn, "no connection|expected the JSON"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_named_at_once(judge, client, fault, expected):
    judge.faults.append(fault)
    with pytest.raises(JudgeMissing, match=expected):
        client().check()
    assert len(judge.requests) == 1


def test_a_missing_key_and_a_missing_server_are_named(judge, client, monkeypatch):
    monkeypatch.delenv(KEY)
    judge.faults.append(failing(401))
    with pytest.raises(JudgeMissing, match=f"a key is needed: set {KEY}"):
        client().check()
    assert "Authorization" not in judge.headers[0]
    with pytest.raises(JudgeMissing, match=r"no connection \(.*refused\): is the server running"):
        client(endpoint=f"http://127.0.0.1:{free_port()}/v1").check()
    for odd in (f"{judge.url}/\u00fc", f"http://{'a' * 70}.invalid"):
        with pytest.raises(JudgeMissing, match="no connection .*is the address right"):
            client(endpoint=odd).check()
    client(endpoint=f"{judge.url}/").check()
    client(endpoint=f"{judge.url}/chat/completions").check()


def test_without_a_judge_nothing_is_asked_and_the_message_says_what_to_type(client):
    for missing in ({"endpoint": None}, {"model": None}):
        with pytest.raises(JudgeMissing, match=r"--set autointerp.endpoint=http://localhost:8000/v1 --set autoin"):
            client(**missing)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://judge.example/v1", f"neither https nor on this machine, and the key in {KEY} would travel readable"),
        ("http://10.0.0.7:8000/v1", "forward a local port"),
        ("https://user:password@judge.example/v1", "expected no user, password or parameters"),
        ("https://judge.example/v1?key=1", "expected no user, password or parameters"),
        ("ftp://judge.example", "expected an address like http://localhost:8000/v1"),
        ("file:///etc/passwd", "expected an address like"),
        ("localhost:8000", "expected an address like"),
        ("http://[::1", "expected an address like"),
    ],
)
def test_addresses_that_give_a_key_away_are_refused(client, endpoint, expected):
    with pytest.raises(SettingInvalid, match=expected) as caught:
        client(endpoint=endpoint)
    assert SECRET not in str(caught.value)


def test_other_addresses_are_taken(client, monkeypatch):
    for endpoint in ("https://judge.example/v1", "http://localhost:1", "http://[::1]:8000/v1", "http://127.1.2.3"):
        client(endpoint=endpoint)
    monkeypatch.setenv(KEY, "")
    client(endpoint="http://judge.example/v1")


def test_a_key_that_no_header_takes_is_refused_without_being_shown(client, monkeypatch):
    for key in ("sk-1234\nsk-5678", "sk-\u00e4\u00e4", "sk-1234 sk"):
        monkeypatch.setenv(KEY, key)
        with pytest.raises(SettingInvalid, match="expected printable ASCII") as caught:
            client()
        assert "sk-" not in str(caught.value)


def test_a_server_that_repeats_the_key_does_not_bring_it_into_files_or_messages(judge, client, answers):
    judge.answer = lambda prompt: f"{prompt} {SECRET}"
    judge.faults.append(failing(400, f"wrong: {SECRET}"))
    kept, refused = ask_every(client(), answers, at_once=1)
    assert SECRET not in kept.path.read_text() and "(key)" in kept.path.read_text()
    assert "(key)" in str(refused) and SECRET not in str(refused)
    judge.faults.append(failing(403, f"\x1b[31m{SECRET}"))
    with pytest.raises(JudgeMissing) as caught:
        client().check()
    assert SECRET not in str(caught.value) and str(caught.value).isprintable()


def test_a_word_that_stands_for_no_key_does_not_change_answers(judge, client, answers, monkeypatch):
    monkeypatch.setenv(KEY, "none")
    judge.answer = lambda _: "none"
    kept, _ = ask_every(client(), answers)
    assert {answer.text for answer in kept.found.values()} == {"none"}


def test_a_proxy_is_asked_for_other_machines_only(judge, client, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    client().check()
    assert len(judge.requests) == 1
    monkeypatch.delenv(KEY)
    with pytest.raises(JudgeMissing, match="refused"):
        client(endpoint="http://judge.invalid/v1").check()
