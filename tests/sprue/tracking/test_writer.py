"""What is written to the tracking server is written in turn, and nobody waits for a server that is away."""

import pytest
from mlflow.exceptions import MlflowException

from sprue.tracking import writer


@pytest.fixture
def calls():
    return []


def fail(calls, error):
    calls.append(type(error).__name__)
    raise error


def written(calls, *errors):
    """Submits a call for each error, which raises it if there is one, and waits."""
    tracking = writer.TrackingWriter()
    for error in errors:
        tracking.submit(*((fail, calls, error) if error else (calls.append, "written")))
    tracking.close()
    return calls


def test_calls_are_made_in_their_order(calls):
    tracking = writer.TrackingWriter()
    for number in range(100):
        tracking.submit(calls.append, number)
    tracking.close()
    assert calls == list(range(100))


def test_a_server_that_does_not_answer_is_left_alone(calls, caplog):
    assert written(calls, None, MlflowException("no answer"), None, None) == ["written", "MlflowException"]
    assert "the tracking server did not answer (no answer)" in caplog.text


def test_a_server_that_is_back_is_written_to(calls, monkeypatch):
    monkeypatch.setattr(writer, "PAUSE_S", 0.0)
    assert written(calls, MlflowException("no answer"), None) == ["MlflowException", "written"]


def test_a_defect_is_logged_and_later_calls_are_made(calls, caplog):
    assert written(calls, KeyError("brick"), None) == ["KeyError", "written"]
    assert "KeyError: 'brick'" in caplog.text
