"""rltrain report RUN --watch: the page as the run is now, to this machine alone."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rltrain.analysis.pages.live import live_server
from rltrain.cli.compare import watch_command
from rltrain.errors import UserError
from rltrain.report.sinks import JsonLines
from support.report_runs import training_step, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "live")


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    server = live_server(run, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_page_follows_the_run_and_passes_over_half_a_line(run: Path, port: int):
    status, page = get(port, "/")
    version = get(port, "/version")[1]
    assert status == 200 and f'watch("{version}")' in page and "101" not in version
    metrics = run / "metrics.jsonl"
    with open(metrics, "ab") as file:
        file.write(b'{"step": 101, "time/st')
    assert get(port, "/version")[1] != version
    assert get(port, "/")[1].partition("<script>")[0] == page.partition("<script>")[0]
    lines = JsonLines(metrics)  # cuts the half line off
    for step in range(101, 131):
        lines.log(step, training_step(step))
    lines.close()
    later = get(port, "/")[1]
    assert "130" in later and len(later) != len(page)


def test_only_this_machine_and_only_the_page_is_served(port: int):
    assert get(port, "/", host="evil.example:80")[0] == 403
    assert get(port, "/", host=f"localhost:{port}")[0] == 200
    assert get(port, "/recipe.resolved.yaml")[0] == 404


def test_a_run_without_a_step_is_waited_for(run: Path, port: int):
    (run / "metrics.jsonl").unlink()
    status, page = get(port, "/")
    assert status == 200 and "no training step yet" in page and "watch(" in page


def test_what_is_no_run_or_several_are_refused(run: Path, port: int, tmp_path: Path):
    with pytest.raises(UserError, match="holds no run"):
        live_server(tmp_path, 0)
    with pytest.raises(UserError, match=rf"port {port} .* cannot be used"):
        live_server(run, port)
    with pytest.raises(UserError, match="one run, and 2 are given"):
        watch_command(["a", "b"], 0)
