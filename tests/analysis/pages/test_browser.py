"""The pages in headless Chromium or Chrome, where one is installed with its driver: apt install chromium
chromium-driver.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rltrain.analysis.comparison import Comparison
from rltrain.analysis.curves import Curves
from rltrain.analysis.pages.comparison_page import write_comparison
from rltrain.analysis.pages.live import live_server
from rltrain.analysis.pages.run_page import write_missing_report
from rltrain.report.sinks import JsonLines
from support.report_runs import training_step, write_run
from support.scripts import script

pages = script("report_pages")
HAS_SELENIUM = importlib.util.find_spec("selenium") is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        pages.find_browser() is None,
        reason="no chromium (or google-chrome) and chromedriver on the PATH",
    ),
    pytest.mark.skipif(not HAS_SELENIUM, reason="selenium is not installed"),
]

Opener = Callable[..., Any]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_missing_report(write_run(tmp_path_factory.mktemp("runs") / "mine"))
    assert path is not None
    return path


@pytest.fixture
def open_page() -> Iterator[Opener]:
    """Opens a page at a width, in the system's dark or light mode; checks at the end that no page wrote an
    error to the console.
    """
    opened: list[Any] = []
    with ExitStack() as stack:

        def start(path: Path | str, width: int = 1400, scheme: str = "light") -> Any:
            driver = stack.enter_context(pages.open_browser(width, 900, scheme))
            opened.append(driver)
            driver.get(path if isinstance(path, str) else path.as_uri())
            return driver

        yield start
        logs = [driver.get_log("browser") for driver in opened]
    assert not [line for log in logs for line in log if line["level"] == "SEVERE"]


def fill(driver: Any, element: str, text: str) -> None:
    driver.find_element("id", element).send_keys(text)


def counted(driver: Any) -> str:
    return driver.find_element("id", "count").text


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not come to the expected state"
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_in_both_schemes(
    page: Path, open_page: Opener, width: int, scheme: str
) -> None:
    driver = open_page(page, width, scheme)
    widths = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [width, width]
    back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(17, 21, 27)") == (scheme == "dark")
    driver.find_element("id", "theme").click()
    other = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (other == "rgb(17, 21, 27)") == (scheme == "light")
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_cursor_over_a_chart_shows_values_and_a_drag_zooms_every_chart(
    page: Path, open_page: Opener
) -> None:
    from selenium.webdriver import ActionChains

    driver = open_page(page)
    driver.execute_script("document.getElementById('curves').scrollIntoView()")
    plots = wait_for(lambda: driver.find_elements("css selector", "#charts .u-over"))
    ActionChains(driver).move_to_element(plots[0]).perform()
    values = wait_for(
        lambda: [
            cell.text
            for cell in driver.find_elements("css selector", "#charts .chart:first-child .u-value")
            if cell.text not in ("", "-")
        ]
    )
    assert values[0] in ("49", "50", "51")  # the middle of 100 steps
    ActionChains(driver).move_to_element(plots[0]).click_and_hold().move_by_offset(60, 0).release().perform()
    first = wait_for(lambda: driver.find_element("id", "from").get_attribute("value"))
    ranges = (
        "return [...charts.built.values()].filter((one) => !one.data.xLabel)"
        ".map((one) => one.plot.scales.x.min)"
    )
    assert set(wait_for(lambda: driver.execute_script(ranges))) == {int(first)}
    driver.find_element("id", "whole").click()
    assert driver.find_element("id", "from").get_attribute("value") == ""
    driver.find_element("id", "smooth").click()
    driver.find_element("css selector", "#more summary").click()
    wait_for(lambda: driver.find_elements("css selector", "#others .chart"))


def test_filters_choose_completions(page: Path, open_page: Opener) -> None:
    from selenium.webdriver.support.select import Select

    driver = open_page(page)
    assert counted(driver) == "4 prompts, 8 completions"
    driver.find_element("id", "ungraded").click()
    assert counted(driver) == "1 prompts, 1 completions"
    assert "ungraded: timeout" in driver.find_element("id", "group").text
    driver.find_element("id", "clear").click()
    driver.find_element("id", "turned").click()
    assert counted(driver) == "2 prompts, 4 completions"
    assert "</script><b>4</b>" in driver.find_element("id", "group").text
    driver.find_element("id", "clear").click()
    fill(driver, "step-low", "50")
    fill(driver, "step-high", "60")
    fill(driver, "score-low", "0.5")
    assert counted(driver) == "1 prompts, 1 completions"
    group = driver.find_element("id", "group").text
    assert "turn 1" in group and "look it up" in group and "1 more completions do not pass" in group
    driver.find_element("id", "clear").click()
    fill(driver, "length-low", "7")
    fill(driver, "length-high", "8")
    assert counted(driver) == "2 prompts, 2 completions"
    fill(driver, "text", "no idea")
    assert counted(driver) == "1 prompts, 1 completions"
    driver.find_element("id", "clear").click()
    Select(driver.find_element("id", "order")).select_by_value("rate-down")
    assert driver.find_element("id", "group").text.startswith("1+1, step 100")
    Select(driver.find_element("id", "stage")).select_by_value("eval")
    assert counted(driver) == "0 prompts, 0 completions"


def test_tokens_are_coloured_by_what_the_reader_chooses(page: Path, open_page: Opener) -> None:
    from selenium.webdriver.support.select import Select

    driver = open_page(page)
    choice = Select(driver.find_element("id", "colour"))
    assert [option.get_attribute("value") for option in choice.options] == [
        "",
        "entropy",
        "weight",
        "touched",
        "clip",
        "version",
    ]
    choice.select_by_value("entropy")
    driver.execute_script("document.getElementById('group').scrollIntoView()")
    tokens = driver.find_elements("css selector", "#group .token")
    assert [token.text for token in tokens] == ["1", "2", "\u00b7"]
    backs = [token.value_of_css_property("background-color") for token in tokens]
    assert len(set(backs)) == 3 and backs[2] == "rgba(0, 0, 0, 0)"  # no number, no colour
    assert "out" in tokens[1].get_attribute("class")  # weight 0
    assert "2 more tokens without numbers" in driver.find_element("id", "group").text
    assert "2 or more nats" in driver.find_element("id", "legend").text
    choice.select_by_value("clip")
    tokens = driver.find_elements("css selector", "#group .token")
    backs = [token.value_of_css_property("background-color") for token in tokens]
    assert backs[0] == backs[2] != backs[1]
    assert "2 or more updates" in driver.find_element("id", "legend").text
    choice.select_by_value("touched")
    tokens = driver.find_elements("css selector", "#group .token")
    backs = [token.value_of_css_property("background-color") for token in tokens]
    assert backs[0] != backs[1] == backs[2]
    choice.select_by_value("version")
    tokens = driver.find_elements("css selector", "#group .token")
    backs = [token.value_of_css_property("background-color") for token in tokens]
    assert backs[0] == backs[1] != backs[2]  # sampled by weights 3, 3 and 4
    assert "each version of the weights" in driver.find_element("id", "legend").text
    driver.execute_script("document.getElementById('clear').click()")
    assert not driver.find_elements("css selector", "#group .token")


def test_a_colour_brings_prompts_whose_tokens_have_it_to_the_top(page: Path, open_page: Opener) -> None:
    from selenium.webdriver.support.select import Select

    driver = open_page(page)
    Select(driver.find_element("id", "order")).select_by_value("rate-down")
    assert not driver.find_elements("css selector", "#group .token")
    Select(driver.find_element("id", "colour")).select_by_value("touched")
    assert driver.find_element("id", "group").text.startswith("1+1, step 1")
    assert driver.find_elements("css selector", "#group .token")
    assert "coloured" in driver.find_element("css selector", "#prompts button").text


def test_the_timeline_shows_the_phases_of_chosen_steps(page: Path, open_page: Opener) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.select import Select

    driver = open_page(page)
    driver.execute_script("document.getElementById('timeline').scrollIntoView()")
    names = driver.find_element("id", "time-names").text.splitlines()
    assert names == ["rollout 65 %", "update 32 %", "evaluation 3 %"]
    assert driver.find_elements("css selector", "#time-overview rect:not(.chosen)")
    first = driver.find_element("id", "time-from")
    first.clear()
    first.send_keys("25\t")
    Select(driver.find_element("id", "time-count")).select_by_value("1")
    bars = driver.find_elements("css selector", "#time-lanes rect")
    assert len(bars) == 3 and driver.find_element("id", "time-span").text == "step 25: 2.5 s"
    ActionChains(driver).move_to_element(bars[0]).perform()
    note = wait_for(lambda: "step" in (text := driver.find_element("id", "time-note").text) and text)
    assert note == "step 25: rollout 1 s, 40 % of the step"
    driver.find_element("id", "time-later").click()
    assert driver.find_element("id", "time-span").text == "step 26: 1.5 s"
    ActionChains(driver).move_to_element_with_offset(
        driver.find_element("id", "time-overview"), 0, 0
    ).click().perform()
    assert driver.find_element("id", "time-span").text == "step 50: 2.5 s"


def test_lanes_show_who_was_busy_when(page: Path, open_page: Opener) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.select import Select

    driver = open_page(page)
    driver.execute_script("document.getElementById('lanes').scrollIntoView()")
    assert driver.find_element("id", "lanes-names").text.splitlines() == ["learner", "pushes", "worker"]
    bars = driver.find_elements("css selector", "#lanes-picture rect")
    assert len(bars) == 40
    ActionChains(driver).move_to_element(bars[0]).perform()
    note = wait_for(lambda: ": " in (text := driver.find_element("id", "lanes-note").text) and text)
    assert note == "worker: sample at 0 s; 4 s; requests 2"
    Select(driver.find_element("id", "lanes-span")).select_by_value("10")
    assert len(driver.find_elements("css selector", "#lanes-picture rect")) < 10
    driver.find_element("id", "lanes-later").click()
    assert driver.find_element("id", "lanes-from").text == "8 s"


def test_a_run_of_2000_steps_loads_in_two_seconds(open_page: Opener, tmp_path: Path) -> None:
    path = write_missing_report(write_run(tmp_path / "long", steps=2000))
    assert path is not None
    driver = open_page(path)
    script = "return performance.timing.loadEventEnd - performance.timing.navigationStart"
    milliseconds = [driver.execute_script(script)]
    while min(milliseconds) >= 2000 and len(milliseconds) < 20:  # of a machine that does other work
        driver.refresh()
        milliseconds.append(driver.execute_script(script))
    assert min(milliseconds) < 2000


def test_a_comparison_fits_a_phone(open_page: Opener, tmp_path: Path) -> None:
    methods = {
        name: [
            Curves.read(write_run(tmp_path / name / f"seed-{seed}", shift=shift + seed / 50))
            for seed in (0, 1)
        ]
        for name, shift in (("grpo", 0.0), ("cov", 0.1))
    }
    path = write_comparison(Comparison("two methods", (), methods), tmp_path / "out")[2]
    driver = open_page(path, 390, "dark")
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    driver.execute_script("document.getElementById('curves').scrollIntoView()")
    wait_for(lambda: driver.find_elements("css selector", "#charts .u-over"))


def test_a_watched_page_shows_new_steps_and_waits_for_a_reader_who_filters(
    open_page: Opener, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "live")
    server = live_server(run, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        driver = open_page(f"http://127.0.0.1:{server.server_port}/")
        last = "return Math.max(...JSON.parse(document.getElementById('data').textContent).charts[0].x)"
        assert driver.execute_script(last) == 100
        log_steps(run, range(101, 111))
        wait_for(lambda: driver.execute_script(last) == 110, 60)
        fill(driver, "text", "no idea")
        log_steps(run, range(111, 121))
        button = wait_for(lambda: driver.find_elements("id", "newer"), 60)[0]
        assert driver.execute_script(last) == 110 and counted(driver) == "1 prompts, 1 completions"
        button.click()
        wait_for(lambda: driver.execute_script(last) == 120, 60)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def log_steps(run: Path, steps: range) -> None:
    lines = JsonLines(run / "metrics.jsonl")
    for step in steps:
        lines.log(step, training_step(step))
    lines.close()
